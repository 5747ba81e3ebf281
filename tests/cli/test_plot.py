"""`kvstore plot`: what it prints, writes and refuses; its numbers are those of `kvstore stats`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cli_run import run_json, run_main


def test_plot(built: Path, tmp_path: Path) -> None:
    found = run_json("plot", "--store", built, "--out", tmp_path / "out")
    stats = run_json("stats", "--store", built)
    ((plot,), (total,)) = found["encodings"], stats["encodings"]
    assert [(t["nbytes"], t["load_nbytes"], t["raw_ratio"]) for t in plot["tiers"]] == [
        (t["nbytes"], t["load_nbytes"], t["raw_ratio"]) for t in total["tiers"]
    ]
    assert {k: found[k] for k in ("id", "snapshot", "documents", "nbytes", "tokens")} == {
        k: stats[k] for k in ("id", "snapshot", "documents", "nbytes", "tokens")
    }
    assert [(g["first"], g["last"]) for g in plot["layers"]] == [(n, n) for n in range(6)]
    for group in plot["layers"]:
        for tier, kinds in group["kinds"].items():
            assert kinds["keys"] + kinds["values"] + kinds["shared"] == group["nbytes"][tier] and kinds["units"] == kinds["of"]
    assert [Path(f).name for f in found["files"]] == ["index.html", "curve.png", "layers.png"] and all(Path(f).is_file() for f in found["files"])
    drawn = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    assert all(f"{t['nbytes']:,}" in drawn for t in total["tiers"]) and "silver-tower.md" in drawn and found["id"] in drawn


def test_the_text(built: Path, tmp_path: Path) -> None:
    ran = run_main("plot", "--store", built, "--out", tmp_path / "p.html")
    assert ran.status == 0 and ran.out.splitlines()[1].split() == ["a", "load", "at", "bytes/token", "bits/value", "smaller", "KL"]
    assert ran.out.endswith(f"\nwrote {tmp_path / 'p.html'}\n") and "0 (exact)" in ran.out


def test_choosing(built: Path, tmp_path: Path) -> None:
    (listed,) = run_json("stats", "--store", built)["encodings"]
    for words in (("--encoding", listed["id"][:9]), ("--model", listed["model"][:9]), ("--model", "model")):
        assert len(run_json("plot", "--store", built, "--out", tmp_path / "p.html", *words)["encodings"]) == 1
    for words in (("--encoding", "zzz"), ("--model", "zzz")):
        assert run_json("plot", "--store", built, "--out", tmp_path / "q.html", *words, status=3)["error"]["code"] == "not-found"
    assert not (tmp_path / "q.html").exists()


def test_without_matplotlib(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = run_json("plot", "--store", built, "--out", tmp_path / "out", status=2)["error"]
    assert error["code"] == "matplotlib" and "pip install 'kvstore-compiler[plot]'" in error["remedy"]
    assert (tmp_path / "out" / "index.html").is_file()
    assert run_main("plot", "--store", built, "--out", tmp_path / "p.html").status == 0


def test_what_is_not_ours_stays(built: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("mine")
    assert run_json("plot", "--store", built, "--out", tmp_path, status=2)["error"]["code"] == "input"
    assert (tmp_path / "index.html").read_text() == "mine"
    assert run_json("plot", "--store", tmp_path / "none", status=3)["error"]["code"] == "not-found"


def test_plot_needs_no_torch(built: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from kvstore.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numba', 'zarr'} & sys.modules.keys(); sys.exit(str(heavy) if heavy else status)"
    )
    words = ["plot", "--store", str(built), "--out", str(tmp_path / "out")]
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
