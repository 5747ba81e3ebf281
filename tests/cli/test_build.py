"""`kvstore build`: what it stores, what it leaves alone, what it says."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from cli_run import Ran, run_json, run_main
from kvstore.cli import build as command

import kvstore
from kvstore import builder
from kvstore.store import Store


def files(path: Path) -> list[tuple[str, int]]:
    return sorted((p.relative_to(path).as_posix(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file())


def test_the_summary_names_everything(sample: Path, built: Path) -> None:
    ran = run_main("build", sample, "--store", built, "--regime", "both", "--lossless", "--codec", "scalar")
    assert ran.status == 0 and ran.err == ""  # the store's own model, so no warning
    assert ran.out.startswith("3 documents: 0 compiled, 3 unchanged, 0 removed, 0 skipped\n")
    assert f"{built}, snapshot 1: serves one document directly after the head exactly" in ran.out


def test_building_twice_writes_nothing(sample: Path, built: Path) -> None:
    before = files(built)
    found = run_json("build", sample, "--store", built, "--regime", "both", "--lossless", "--codec", "scalar")
    assert (found["compiled"], found["unchanged"], found["segments"], found["packs"]) == (0, 3, 0, [])
    assert files(built) == before


def test_an_edit_compiles_one_and_a_removed_file_leaves_the_snapshot(corpus: Path, tmp_path: Path) -> None:
    words = ("build", corpus, "--store", tmp_path / "s", "--codec", "raw", "--model", "bundled")
    first = run_json(*words)
    assert (first["compiled"], first["removed"]) == (3, 0) and first["bytes_per_token"]["raw"] == pytest.approx(3072, rel=0.01)
    (corpus / "silver-tower.md").write_text("The keeper of the silver tower is Mercer.")
    (corpus / "stone-bridge.md").unlink()
    again = run_json(*words)
    assert (again["compiled"], again["unchanged"], again["removed"], again["segments"]) == (1, 1, 1, 1)
    assert Store(tmp_path / "s").sources() == ["hidden-garden.md", "silver-tower.md"]
    assert len(Store(tmp_path / "s").snapshots.rows(1)) == 3


def test_another_encoding_is_stored_beside_the_first(sample: Path, store: Path) -> None:
    found = run_json("build", sample, "--store", store, "--codec", "raw")
    assert (found["compiled"], found["removed"]) == (3, 0)
    listed = run_json("ls", "--store", store)["documents"]
    assert len(listed) == 6 and {tuple(d["tiers"]) for d in listed} == {("raw",), ("standard", "fine", "lossless")}
    assert "3 documents in 6 versions" in run_main("ls", "--store", store, "--all").out
    assert run_json("show", "silver-tower.md", "--store", store, status=2)["error"]["code"] == "ambiguous"


def test_what_cannot_be_compiled_is_named(corpus: Path, tmp_path: Path) -> None:
    (corpus / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (corpus / "empty\x1b.md").write_text("  \n")
    words = ("build", corpus, "--store", tmp_path / "s", "--codec", "raw", "--model", "bundled")
    strict = run_main(*words, "--strict")
    assert strict.status == 2 and "binary.txt: not UTF-8 text" in strict.err
    ran = run_main(*words)
    assert ran.status == 0 and "3 compiled, 0 unchanged, 0 removed, 2 skipped\n" in ran.out
    assert "  skipped binary.txt: not UTF-8 text\n" in ran.out and "  skipped empty\\x1b.md: empty\n" in ran.out
    assert len(run_json(*words)["skipped"]) == 2


def test_a_mistyped_name_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the library a lone word may be a text, on the command line it is always a path."""
    monkeypatch.chdir(tmp_path)
    for name in ("build", "calibrate"):
        found = run_json(name, "corpsu", "--store", tmp_path / "s", "--model", "bundled", status=2)["error"]
        assert "no file or folder at corpsu" in found["message"] and found["code"] == "no-path"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    found = run_json("build", sample, "--store", tmp_path / "s", "--dry-run", "--model", "bundled")
    assert (found["compiled"], found["dry_run"]) == (3, True) and found["tokens"] > 500
    words = ("build", sample, "--store", tmp_path / "s", "--dry-run", "--model", "bundled")
    said = run_main(*words).out
    assert "3 to compile" in said and "would be compiled" in said and "calibration" not in said
    assert "a calibration would be learnt" in run_main(*words, "--recalibrate").out
    assert found["store"] == str(tmp_path / "s")
    assert [p.name for p in tmp_path.rglob("*")] == ["scratch"]


def test_options_reach_the_library(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You answer from the text.")
    (tmp_path / "template.txt").write_text("{system}\n\n{document}\n\nQ: {query}\nA:\n")
    (corpus / "notes.log").write_text("The number of the old log is 12.")
    found = run_json(
        "build",
        corpus,
        "--store",
        tmp_path / "s",
        "--codec",
        "raw",
        "--model",
        "bundled",
        "--template",
        tmp_path / "template.txt",
        "--system",
        tmp_path / "system.txt",
        "--regime",
        "isolated",
        "--passage-tokens",
        "100",
        "--include",
        "s*.md",
        "--include",
        "*.log",
    )
    assert found["documents"] == 3 and "blocks" in found["serves"]
    store = Store(tmp_path / "s")
    assert store.templates()[0].system == "You answer from the text." and store.templates()[0].kind == "file"
    rows = {r.source: r for r in store.rows()}
    assert rows.keys() == {"notes.log", "silver-tower.md", "stone-bridge.md"} and len(rows["silver-tower.md"].passages) > 2
    assert all(p.prefix is None and p.isolated for p in rows["silver-tower.md"].passages)


def test_without_a_model_the_bundled_one_is_used_with_a_warning(sample: Path, tmp_path: Path) -> None:
    ran = run_main("build", sample / "silver-tower.md", "--store", tmp_path / "s", "--codec", "raw")
    assert ran.status == 0 and ran.err.startswith("kvstore: warning: no model given")


@pytest.mark.parametrize(
    ("words", "status"),
    [(["nowhere"], 2), (["--system", "nowhere"], 2), (["--template", "nowhere"], 2), (["--model", "nowhere"], 2), (["--passage-tokens", "3"], 2)],
)
def test_wrong_input(sample: Path, tmp_path: Path, words: list[str], status: int) -> None:
    found = run_json("build", sample, "--store", tmp_path / "s", "--model", "bundled", *words, status=status)
    assert found["error"]["remedy"]


def test_long_documents_may_be_an_error(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "long.md").write_text("One two three four five six seven. " * 1500)
    words = ("build", tmp_path / "long.md", "--store", tmp_path / "s", "--codec", "raw", "--model", "bundled")
    assert run_json(*words, "--long", "error", status=2)["error"]["code"] == "too-long"
    assert run_json(*words, "--long", "skip", sample)["skipped"][0]["source"] == "long.md"


def interrupted_after(documents: int, monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> Ran:
    """A build in which Ctrl-C comes after so many documents."""
    library = kvstore.build

    def build(*given: Any, progress: builder.Progress, **more: Any) -> builder.BuildReport:
        def interrupt(report: builder.BuildReport, name: str) -> None:
            progress(report, name)
            if report.documents == documents:
                raise KeyboardInterrupt

        return library(*given, progress=interrupt, **more)

    with monkeypatch.context() as patch:
        patch.setattr(kvstore, "build", build, raising=False)
        return run_main(*words)


def test_interrupted_it_says_what_is_stored_and_goes_on_from_there(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("build", sample, "--store", tmp_path / "s", "--codec", "raw", "--model", "bundled")
    ran = interrupted_after(2, monkeypatch, *words)
    assert ran.status == command.INTERRUPTED == 130
    assert (
        ran.out.startswith("2 documents: 2 compiled") and "interrupted: snapshot 1 holds 2 documents; run the same command again to go on" in ran.err
    )
    assert Store(tmp_path / "s").sources() == ["hidden-garden.md", "silver-tower.md"]
    assert run_json("verify", "--store", tmp_path / "s")["ok"]
    again = run_json(*words)
    assert (again["compiled"], again["unchanged"]) == (1, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child there")
def test_a_real_interrupt(tmp_path: Path) -> None:
    """Ctrl-C while documents are compiled, wherever it hits: what is said to be stored is stored, and the same command does the rest."""
    (tmp_path / "corpus").mkdir()
    for n in range(400):
        (tmp_path / "corpus" / f"{n:03}.md").write_text(f"The keeper of the red door {n} is Mercer. " * 10)
    words = ["build", str(tmp_path / "corpus"), "--store", str(tmp_path / "s"), "--codec", "scalar", "--model", "bundled"]
    code = "import sys, torch; torch.set_num_threads(1); from kvstore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not list(tmp_path.glob("s/.kvstore/tmp/*/t0/*")):
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, (out, err)
    stored = len(Store(tmp_path / "s"))
    assert (
        0 < stored < 400 and f"interrupted: snapshot 1 holds {stored} documents" in err and out.startswith(f"{stored} documents: {stored} compiled")
    )
    assert run_json("verify", "--store", tmp_path / "s")["ok"]


def test_a_read_only_store(sample: Path, store: Path) -> None:
    """It opens, lists and loads; a build that has something to write is refused."""
    paths = [store, *store.rglob("*")]
    modes = {p: p.stat().st_mode for p in paths}
    for p in paths:
        p.chmod(0o555 if p.is_dir() else 0o444)
    try:
        assert run_main("ls", "--store", store).status == 0
        assert run_json("verify", "--store", store)["ok"]
        assert run_main("load", "silver-tower.md", "--query", "What?", "--store", store, "--max-new-tokens", "1").status == 0
        if not writable(store):
            assert run_json("build", sample, "--store", store, "--codec", "raw", status=7)["error"]["code"] == "storage"
            assert run_json("rm", "silver-tower.md", "--store", store, status=7)["error"]["code"] == "storage"
    finally:
        for p, mode in modes.items():
            p.chmod(mode)


def writable(folder: Path) -> bool:
    """The superuser may write anywhere."""
    try:
        (folder / "probe").touch()
    except OSError:
        return False
    (folder / "probe").unlink()
    return True
