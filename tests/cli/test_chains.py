"""`kvstore build --chains`, and what the other commands say of chains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_run import run_json, run_main

BRIDGE, TOWER = "stone-bridge.md", "silver-tower.md"
LOG = [{"documents": [BRIDGE, TOWER], "count": 3}, {"query": "Where?", "documents": [TOWER]}, {"documents": [BRIDGE, "gone.md"]}]
AS_BUILT = ("--regime", "both", "--lossless", "--codec", "scalar", "--certify", "none")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "queries.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LOG))
    return path


@pytest.fixture(scope="module")
def chained(sample: Path, built: Path, log: Path) -> Path:
    """Read only."""
    store = Path(shutil.copytree(built, log.parent / "kv.zarr"))
    ran = run_main("build", sample, "--store", store, *AS_BUILT, "--chains", log)
    assert ran.status == 0, ran.err
    assert "chains: 1 segment and 308 tokens, 1 of them new\n" in ran.out
    assert "  of 5 requests in the log 80% are stored to their last document (without chains 20%), and 100% of their documents' tokens" in ran.out
    assert "  1 request not served whole: documents that are not there, the first 'gone.md'" in ran.out
    return store


def test_a_log_is_compiled_once_and_loaded_in_another_order(sample: Path, chained: Path, log: Path) -> None:
    again = run_json("build", sample, "--store", chained, *AS_BUILT, "--chains", log)
    assert (again["segments"], again["snapshot"], again["chains"]["compiled"], again["chains"]["segments"]) == (0, 2, 0, 1)
    assert (again["chains"]["missing"], again["chains"]["unknown"], again["chains"]["requests"]) == ("gone.md", 1, 5)
    assert again["chains"]["served"]["requests"] == 0.8 and again["chains"]["before"]["requests"] == 0.2
    assert run_json("build", sample, "--store", chained, *AS_BUILT)["chains"] is None
    load = ("load", TOWER, BRIDGE, "--query", "What is the access code of the silver tower?", "--max-new-tokens", "1", "--store", chained)
    cached = run_json(*load, "--order", "cached")["receipt"]
    assert [(d["source"], d["action"]) for d in cached["documents"][1:]] == [(BRIDGE, "reused"), (TOWER, "reused")]
    assert (cached["order"], cached["given"]) == ("cached", [TOWER, BRIDGE])


def test_what_other_commands_say(chained: Path) -> None:
    ran = run_main("ls", "--store", chained)
    assert "both, 1 chain" in next(line for line in ran.out.splitlines() if line.startswith(TOWER))
    assert {d["source"]: d["chains"] for d in run_json("ls", "--store", chained)["documents"]}[TOWER] == 1
    assert "1 passage of them stored after others (chains)" in run_main("stats", "--store", chained).out
    assert run_json("stats", "--store", chained)["chains"] == 1
    assert f"after {BRIDGE}" in run_main("show", TOWER, "--store", chained).out
    (chain,) = [s for s in run_json("show", TOWER, "--store", chained)["segments"] if s["regime"] == "chain"]
    assert chain["after"] == [BRIDGE] and chain["tokens"] == 308
    assert "chains, 0 -> 1 chain" in run_main("diff", "1", "--store", chained).out
    (changed,) = run_json("diff", "1", "--store", chained)["changed"]
    assert (changed["fields"], changed["chains"]) == (["chains"], 1)
    assert run_json("verify", "--store", chained)["ok"]


def test_match_says_what_a_document_is_stored_after(sample: Path, chained: Path) -> None:
    assert f"are '{TOWER}', also after '{BRIDGE}'" in run_main("match", sample / TOWER, "--store", chained).out
    assert run_json("match", sample / TOWER, "--store", chained)["chains"] == [[BRIDGE]]


def test_rm_takes_the_chains_after_a_document_along(chained: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(chained, tmp_path / "kv.zarr"))
    run_json("rm", BRIDGE, "--store", store)
    assert run_json("stats", "--store", store)["chains"] == 0
    collected = run_json("gc", "--store", store, "--keep", "1", "--grace", "0")
    assert collected["artifacts_dropped"] == 2, "the bridge and the tower after it"


def test_a_dry_run_chooses_and_writes_nothing(sample: Path, built: Path, log: Path) -> None:
    before = sorted(p for p in built.rglob("*"))
    ran = run_main("build", sample, "--store", built, *AS_BUILT, "--chains", log, "--dry-run")
    assert "chains: 1 segment and 308 tokens, at most" in ran.out and sorted(p for p in built.rglob("*")) == before
    found = run_json("build", sample, "--store", built, *AS_BUILT, "--chains", log, "--dry-run", "--chain-budget", "307")["chains"]
    assert (found["segments"], found["budget"]) == (0, 307)


def test_wrong_command_lines_and_logs(sample: Path, chained: Path, tmp_path: Path) -> None:
    words, log = ("build", sample, "--store", chained, *AS_BUILT), tmp_path / "log.jsonl"
    assert run_json(*words, "--chain-budget", "5", status=2)["error"]["code"] == "usage"
    log.write_text("[]\n")
    error = run_json(*words, "--chains", log, status=2)["error"]
    assert error["code"] == "log" and "line 1" in error["message"]
    assert run_json("stats", "--store", chained)["chains"] == 1
