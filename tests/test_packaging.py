"""What an import costs, what the source must never contain, and which way imports run."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where the source of each import package lies in the checkout.
FOLDERS = {"kvstore": ROOT / "kvstore", "kvstore.cli": ROOT / "cli", "kvstore.schemas": ROOT / "schemas"}
HEAVY = ("torch", "transformers", "zarr", "numba", "safetensors", "numpy")
# The torch-free side of a store: open, list, verify, collect.
TORCH_FREE = ("kvstore.pack", "kvstore.index", "kvstore.snapshot", "kvstore.store")

# Imports run from a higher rank to the same or a lower one. The longest prefix of a module's name counts.
LAYERS = [
    "errors digest receipt wording hot",
    "identity manifest storage bundled schemas zarr_json provenance",
    "codecs transforms quantizers policies calibration",
    "pack pack_files pack_writer arrays index snapshot tags checkpoint devices families scoring fingerprint validate",
    "store artifact prefixes prefix_table chain_rows records certificates quality_upkeep reach gc collector inventory detail diff zarr_view models "
    "verify_pack calibration_gc verify_calibrations",
    "asking chain_log documents sources objects tables tokens vocabulary cutting template turns passages",
    "calibration.live calibration.sample calibration.metric calibration.attention calibration.statistics",
    "calibration.solve calibration.trial calibration.target calibration.learn plan chain_plan prefill parts encode viewing placing decode "
    "device quality lookup",
    "prompt chains reuse",
    "answering asking certify checkup compose evaluate export plotting compiling build_report build_job builder build loader load match relogits "
    "verify calibrator",
    "api",
    "demo cli integrations",
]
RANKS = {f"kvstore.{name}": rank for rank, names in enumerate(LAYERS) for name in names.split()}
# Facades that hand out names from above, at first use.
MAY_LOOK_UP = {"kvstore", "kvstore.__main__"}

NO_SOCKETS = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("opened a socket")
socket.socket.__init__ = refuse
"""


class Import(NamedTuple):
    """One import statement: who imports what, where."""

    module: str
    target: str
    line: int


def module_name(path: Path) -> str:
    package, folder = max(
        ((name, folder) for name, folder in FOLDERS.items() if path.is_relative_to(folder)),
        key=lambda pair: len(str(pair[1])),
    )
    parts = [package, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield other
                yield from walk(other)
        else:
            yield child
            yield from walk(child)


def targets(node: ast.AST, known: set[str]) -> list[str]:
    """Modules of kvstore that one statement imports. `from kvstore import x` means x where x is a module."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in known else node.module for name in full]
    else:
        names = []
    return [name for name in names if name == "kvstore" or name.startswith("kvstore.")]


def imports(known: set[str]) -> list[Import]:
    return [
        Import(module_name(path), target, getattr(node, "lineno", 0))
        for path in sources()
        for node in walk(parse(path))
        for target in targets(node, known)
    ]


def rank(module: str) -> int | None:
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return next((RANKS[p] for p in prefixes if p in RANKS), None)


def test_import_is_light_and_opens_no_socket() -> None:
    code = f"{NO_SOCKETS}\nimport kvstore, kvstore.errors, kvstore.bundled\n"
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_store_side_is_torch_free(module: str) -> None:
    done = run_python(f"import {module}, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_nothing_in_the_source_runs_data(path: Path) -> None:
    for node in walk(parse(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not {n.split(".")[0] for n in names} & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "marshal",
                "shelve",
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "__import__"}, f"line {node.lineno}"
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert options.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert options.get("trust_remote_code", "False") == "False", f"line {node.lineno}"


def test_imports_run_one_way() -> None:
    known = {module_name(path) for path in sources()}
    unranked = sorted(m for m in known if rank(m) is None and m not in MAY_LOOK_UP)
    assert not unranked, f"give these a rank: {unranked}"
    upward = [
        f"{i.module}:{i.line} imports {i.target}"
        for i in imports(known)
        if i.module not in MAY_LOOK_UP and i.target != "kvstore" and (rank(i.target) or 0) > (rank(i.module) or 0)
    ]
    assert not upward, "\n".join(upward)


def test_modules_of_one_rank_do_not_import_in_a_circle() -> None:
    """A circle that runs through functions only works until somebody moves an import."""
    known = {module_name(path) for path in sources()}
    graph: dict[str, set[str]] = {module: set() for module in known}
    for i in imports(known):
        if i.module not in MAY_LOOK_UP and i.target != i.module:
            graph[i.module].add(i.target)
    while free := {m for m, needs in graph.items() if not needs & graph.keys()}:
        graph = {m: needs - free for m, needs in graph.items() if m not in free}
    assert not graph, f"circles among {sorted(graph)}"


def test_every_package_folder_is_listed() -> None:
    """A forgotten one would work in the checkout and be missing from the wheel."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({module_name(path) for path in sources() if path.name == "__init__.py"})


def test_version_is_the_one_of_the_distribution() -> None:
    import kvstore

    assert metadata.version("kvstore-compiler") == kvstore.__version__


def test_zarr_finds_the_codec() -> None:
    points = metadata.entry_points(group="zarr.codecs")
    assert {p.value for p in points if p.name == "kvstore.unit"} == {"kvstore.codecs.zarr_adapter:UnitCodec"}
