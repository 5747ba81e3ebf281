"""`kvstore eval`: the table, the object, the advice, and lines that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

from cli_run import run_json, run_main

from kvstore import bundled

ASKED = [q for q in bundled.questions() if q.source in ("places/silver-tower.md", "places/stone-bridge.md")]


def write(folder: Path, *more: str) -> Path:
    lines = [json.dumps({"query": q.question, "documents": [q.source.removeprefix("places/")], "answer": q.answer}) for q in ASKED]
    path = folder / "questions.jsonl"
    path.write_text("\n".join([*lines, *more]) + "\n")
    return path


def test_the_object_and_the_table(built: Path, tmp_path: Path) -> None:
    words = ("eval", write(tmp_path), "--store", built, "--limit", "2", "--max-new-tokens", "6", "--tier", "fine", "--tier", "lossless")
    found = run_json(*words)
    assert (found["live"]["questions"], found["live"]["exact"]) == (2, 1)
    assert [(t["reuse"], t["tier"], t["agreement"]) for t in found["totals"]] == [("prefix", "fine", 1), ("prefix", "lossless", 1)]
    assert found["totals"][0]["kl"] < 0.05 and len(found["answers"]) == 4
    ran = run_main(*words)
    lines = ran.out.splitlines()
    assert ran.status == 0 and lines[0].split()[:3] == ["answers", "tier", "asked"] and lines[1].startswith("full prefill")
    assert [line.split()[:2] for line in lines[2:4]] == [["prefix", "fine"], ["prefix", "lossless"]] and "--tier" in lines[-1]


def test_what_is_wrong(built: Path, tmp_path: Path) -> None:
    bad = run_json("eval", write(tmp_path, "{}"), "--store", built, status=2)["error"]
    assert f"line {len(ASKED) + 1}" in bad["message"] and bad["remedy"]
    gone = write(tmp_path, json.dumps({"query": "Who?", "documents": ["gone\x1b.md"], "answer": "x"}))
    assert run_json("eval", gone, "--store", built, status=3)["error"]["message"].startswith(f"line {len(ASKED) + 1}")
    assert "\x1b" not in run_main("eval", gone, "--store", built).err
    assert run_json("eval", write(tmp_path), "--limit", "0", "--store", built, status=2)["error"]["code"] == "usage"
    assert run_json("eval", write(tmp_path), "--tier", "nosuch", "--store", built, status=3)["error"]["code"] == "not-found"
