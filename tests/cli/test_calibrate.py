"""`kvstore calibrate`: what it stores and says, and that a build uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.calibration import learn
from tests.cli_run import run_json, run_main
from tests.tiny_models import one_thread  # noqa: F401


def test_a_calibration_is_stored_and_the_next_build_uses_it(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "HELD_TOKENS", 512)
    words = (sample, "--store", tmp_path / "s", "--model", "bundled")
    found = run_json("calibrate", *words, "--metric", "identity", "--tokens", "512", "--group-layers", "1", "--tiers", "2", "--target-ratio", "10")
    assert (found["current"], found["metric"], len(found["ranks"]), len(found["kl"])) == (found["digest"], "identity", 6, 2)
    assert 16 / found["bits"][-1] == pytest.approx(10, rel=0.2) and (tmp_path / "s" / "calibrations" / found["digest"]).is_dir()
    built = run_json("build", *words, "--certify", "none")
    assert built["calibration"] == found["digest"] and set(built["nbytes"]) == {"standard", "fine"} and built["seconds"]["calibrate"] == 0


def test_what_it_says(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn, "HELD_TOKENS", 256)
    words = ("--store", tmp_path / "s", "--model", "bundled", "--metric", "identity", "--tokens", "256", "--tiers", "1")
    ran = run_main("calibrate", sample, *words)
    assert ran.status == 0 and "fewer than 16 a dimension" in ran.err
    assert ran.out.startswith("calibration ") and "1 group of up to 6 layers" in ran.out and f"new builds into {tmp_path / 's'} use it" in ran.out


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run_json("calibrate", tmp_path / "empty", "--store", tmp_path / "s", "--model", "bundled", status=2)["error"]["code"] == "input"
    assert run_json("calibrate", tmp_path, "--target-kl", "1e-3", "--target-ratio", "8", status=2)["error"]["code"] == "usage"
