"""What holds for every command: help, errors, exit statuses, interrupts, and what is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_run import run_main, validate
from kvstore.cli import ls
from kvstore.cli import main as program

import kvstore
from kvstore import errors

ERRORS = [
    errors.InputError,
    errors.NotFoundError,
    errors.IncompatibleError,
    errors.FormatError,
    errors.IntegrityError,
    errors.StorageError,
    errors.ResourceError,
    errors.KvstoreError,
]


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)


def test_help_lists_every_command() -> None:
    ran = run_main("--help")
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.split("commands:\n")[1].split("\n\n")[0].splitlines()] == list(program.COMMANDS)


def test_no_command_shows_the_help_and_fails() -> None:
    assert (run_main().status, run_main().out) == (2, run_main("--help").out)


def test_version() -> None:
    assert run_main("--version").out == f"kvstore {kvstore.__version__}\n"


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_has_help(name: str) -> None:
    ran = run_main(name, "--help")
    assert ran.status == 0 and ran.out.startswith(f"usage: kvstore {name}") and "--json" in ran.out


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_class_has_its_exit_status(monkeypatch: pytest.MonkeyPatch, kind: type[errors.KvstoreError]) -> None:
    def fails(args: Any, out: Any) -> int:
        raise kind("it broke", remedy="mend it")

    monkeypatch.setattr(ls, "run", fails)
    ran = run_main("ls")
    assert ran.status == kind.exit_status and ran.err == "kvstore: error: it broke; mend it\n" and ran.out == ""
    with_json = run_main("ls", "--json")
    assert with_json.json == {"error": {"code": kind.code, "message": "it broke", "remedy": "mend it"}}
    assert (with_json.status, with_json.err) == (ran.status, ran.err)


def test_exit_statuses_differ() -> None:
    assert len({e.exit_status for e in ERRORS}) == len(ERRORS)


@pytest.mark.parametrize(
    "words",
    [
        ["nosuch"],
        ["ls", "--nosuch"],
        ["show"],
        ["load", "a", "--query", "b", "--out", "c"],
        ["load", "a", "--query", "b", "--tier", "x", "--max-kl", "1"],
        ["load", "a"],
        ["match"],
        ["snapshots", "3"],
        ["load", "a", "--query", "b", "--max-bytes", "many"],
        ["build", "x", "--codec", "zip"],
    ],
)
def test_a_wrong_command_line_is_an_input_error(words: list[str]) -> None:
    ran = run_main(*words, "--json")
    assert ran.status == errors.InputError.exit_status
    validate("error", ran.json)
    assert ran.json["error"]["code"] == "usage" and ran.err.startswith("kvstore: error: ")


def test_a_near_miss_is_named() -> None:
    assert "did you mean 'verify'?" in run_main("verfy").err


def test_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: Any, out: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(ls, "run", interrupted)
    ran = run_main("ls")
    assert ran.status == 130 and "stored is kept" in ran.err


def test_a_bug_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: Any, out: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ls, "run", broken)
    with pytest.raises(RuntimeError):
        run_main("ls")


def test_no_store(tmp_path: Path) -> None:
    for words in (["ls"], ["show", "x"], ["stats"], ["verify"], ["snapshots"], ["gc"], ["rm", "x"], ["diff", "0"]):
        ran = run_main(*words, "--store", tmp_path / "none", "--json")
        assert ran.status == 3 and ran.json["error"]["code"] == "not-found", words
    (tmp_path / "other").mkdir()
    assert run_main("ls", "--store", tmp_path / "other").status == 5


def test_the_store_may_come_from_the_environment(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_STORE", str(built))
    assert run_main("ls").out == run_main("ls", "--store", built).out


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from kvstore.cli.main import main; main(sys.argv[1:]); "
        "heavy = {'numpy', 'msgspec', 'torch', 'argparse', 'json', 'logging'} & sys.modules.keys(); sys.exit(str(heavy) if heavy else 0)"
    )
    ran = python(code, *words)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["ls"],
        ["ls", "--all"],
        ["show", "silver-tower.md"],
        ["stats"],
        ["verify"],
        ["snapshots"],
        ["diff", "0"],
        ["gc", "--dry-run"],
        ["rm", "silver-tower.md", "--dry-run"],
    ],
)
def test_store_commands_need_no_torch(built: Path, words: list[str]) -> None:
    code = (
        "import sys; from kvstore.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numba', 'zarr'} & sys.modules.keys(); sys.exit(str(heavy) if heavy else status)"
    )
    ran = python(code, *words, "--store", str(built))
    assert ran.returncode == 0, ran.stderr


def test_python_m_kvstore() -> None:
    ran = subprocess.run([sys.executable, "-m", "kvstore", "nosuch"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "there is no command 'nosuch'" in ran.stderr


def test_nobody_reads_the_output_to_its_end() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([sys.executable, "-m", "kvstore", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert ran.returncode == 141 and ran.stderr == ""
