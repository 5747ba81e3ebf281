"""cli/README.md is true: every help text is the program's own, and every example runs and prints what the page shows, but for numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_run import schemas
from kvstore.cli.main import COMMANDS
from update_cli_readme import PAGE, Shown, blocks, prepare, run_shown

from kvstore import bundled, errors

HELP = "--help"


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def examples() -> list[Shown]:
    return [s for s in blocks(text()) if not s.command.endswith(HELP)]


@pytest.mark.parametrize("command", ["kvstore --help", *(f"kvstore {name} --help" for name in COMMANDS)])
def test_help(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    on_the_page = {s.command: s.output for s in blocks(text())}
    assert on_the_page[command] == run_shown(command).out, "run python tests/update_cli_readme.py"


def test_every_command_has_an_example() -> None:
    assert {s.command.split()[1] for s in examples()} == set(COMMANDS)


def shape(output: str) -> list[str]:
    """Lines without what differs between runs and machines: numbers, sizes, digests, paths, column widths."""
    output = re.sub(r"\S*/kv\.zarr", "STORE", output)
    output = re.sub(r"/\S+/corpus", "CORPUS", output)
    output = re.sub(r"made by: .*", "made by", output)
    output = re.sub(r"\b[0-9a-f]{12,64}\b", "KEY", output)
    output = re.sub(r"\d[\d,]*(\.\d+)?(e-?\d+)?|\b\d{4}-\S+", "N", output)
    return [re.sub(r"\s+", " ", re.sub(r"N ([KMG]iB|B)\b", "SIZE", line)).strip() for line in output.splitlines()]


def is_demo(example: Shown) -> bool:
    return example.command.startswith("kvstore demo")


def prove(example: Shown) -> None:
    ran = run_shown(example.command)
    assert ran.status == 0, (example.command, ran.err)
    assert shape(ran.out) == shape(example.output), f"{example.command}: run python tests/update_cli_readme.py"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with an empty cache."""
    monkeypatch.setenv("KVSTORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_examples(elsewhere: Path) -> None:
    """In the page's order: later ones build on earlier ones."""
    prepare(elsewhere)
    for example in examples():
        if not is_demo(example):
            prove(example)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_the_demo() -> None:
    """The whole of it: every question of the bundled corpus, answered from the store as live."""
    (example,) = filter(is_demo, examples())
    prove(example)
    asked = re.search(r"^(\d+) questions: (\d+) live .* live ones: \d+ at standard, (\d+) at fine, (\d+) at lossless$", example.output, re.MULTILINE)
    assert asked is not None and set(asked.groups()) == {str(len(bundled.questions()))}


def test_exit_statuses_are_those_of_the_page() -> None:
    kinds = [
        errors.InputError,
        errors.NotFoundError,
        errors.IncompatibleError,
        errors.FormatError,
        errors.IntegrityError,
        errors.StorageError,
        errors.ResourceError,
    ]
    rows = dict(re.findall(r"^\| (\d+) \| `([\w-]+)`", text(), flags=re.MULTILINE))
    assert rows == {str(k.exit_status): k.code for k in kinds}


def test_there_is_a_schema_for_every_command() -> None:
    assert set(schemas()) == {*COMMANDS, "error"}
