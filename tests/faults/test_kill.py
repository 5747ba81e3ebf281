"""Forty kills in every test run, and proof that the harness would notice. The full run is `python -m tests.faults.kill`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def outcome(*command: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The tallies by phase, and what was logged. A process of its own, because threads and forks do not go together."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    tallies: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == int(any(t["lost"] + t["corrupt"] + t["redone"] for t in tallies.values()))
    return tallies, done.stderr


@pytest.mark.slow
def test_killed_at_any_moment_nothing_that_was_stored_is_lost(tmp_path: Path) -> None:
    tallies, log = outcome("-m", "tests.faults.kill", "--rounds", "40", "--json", "--folder", str(tmp_path / "store"))
    assert sum(t["kills"] for t in tallies.values()) == 40
    assert "damaged" not in log
    assert min(t["kills"] for t in tallies.values()) >= 3
    assert [d for t in tallies.values() for d in t["details"]] == []
    assert {(t["lost"], t["corrupt"], t["redone"]) for t in tallies.values()} == {(0, 0, 0)}


LIE = """
from tests.faults import workload
flush = workload.Builder._flush
def lying(self, removed):
    self.say("stored " + " ".join(r.source for r in self.waiting))
    flush(self, removed)
workload.Builder._flush = lying
"""
HALF = """
import shutil
from kvstore.storage.local import LocalStorage
def copying(self, staged, name, mend=False):
    import os
    self.path(name).mkdir()
    for path in sorted(staged.rglob("*"), reverse=True):
        target = self.path(name) / path.relative_to(staged)
        target.parent.mkdir(exist_ok=True, parents=True)
        if path.is_file():
            os.link(path, target)
    shutil.rmtree(staged)
    return True
LocalStorage.publish = copying
"""
FORGET = """
from kvstore import reach
reach.Reach.keys = lambda self, encoding: set()
"""
AGAIN = """
from tests.faults import workload
compile = workload.Builder._compile
def forgetful(self, task):
    if self.trap.kind == "":  # the run after the kill
        self.say(f"made {task.key}")
    compile(self, task)
workload.Builder._compile = forgetful
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "phases", "notices"),
    [
        pytest.param(LIE, ["link"], "lost", id="reported before it is stored"),
        pytest.param(HALF, ["link"], "corrupt", id="published file by file"),
        pytest.param(FORGET, ["encode"], "corrupt", id="collected though reached"),
        pytest.param(AGAIN, ["encode"], "redone", id="compiled again though stored"),
    ],
)
def test_harness_notices(tmp_path: Path, sabotage: str, phases: list[str], notices: str) -> None:
    code = f"""
import json, sys
from pathlib import Path
{sabotage}
from tests.faults import kill
tallies = kill.run(6, 1, Path({str(tmp_path)!r}), {phases!r})
print(json.dumps({{p: vars(t) for p, t in tallies.items()}}))
sys.exit(not all(t.clean for t in tallies.values()))
"""
    tallies, _ = outcome("-c", code)
    assert sum(t[notices] for t in tallies.values()) > 0
