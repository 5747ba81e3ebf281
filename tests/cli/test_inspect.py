"""`kvstore ls`, `show`, `stats`, `match`, `diff`: what they say is what is in the store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cli_run import run_json, run_main

from kvstore.store import Store


def test_ls(built: Path) -> None:
    listed = {d["source"]: d for d in run_json("ls", "--store", built)["documents"]}
    store = Store(built)
    assert list(listed) == store.sources()
    for source, found in listed.items():
        assert (found["tokens"], found["nbytes"], found["passages"]) == (store[source].tokens, store[source].nbytes(), 1)
        assert found["tiers"] == ["standard", "fine", "lossless"] and found["regimes"] == ["prefix", "isolated"]
    lines = run_main("ls", "--store", built).out.splitlines()
    assert lines[0].split() == ["source", "passages", "tokens", "bytes", "tiers", "regime"]
    assert lines[2].split() == [
        "silver-tower.md",
        "1",
        "308",
        *f"{listed['silver-tower.md']['nbytes'] / 1024:.1f} KiB".split(),
        "standard,",
        "fine,",
        "lossless",
        "both",
    ]
    assert lines[-1].startswith("snapshot 1: 3 documents, ")


def test_ls_counts_both_regimes_where_they_are_two_artifacts(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You answer from the text.")
    run_json(
        "build", sample, "--store", tmp_path / "s", "--codec", "raw", "--regime", "both", "--system", tmp_path / "system.txt", "--model", "bundled"
    )
    (found,) = run_json("ls", "silver-tower.md", "--store", tmp_path / "s")["documents"]
    assert found["tokens"] == 308 and found["nbytes"] == 2 * Store(tmp_path / "s")["silver-tower.md"].nbytes()
    segments = run_json("show", "silver-tower.md", "--store", tmp_path / "s")["segments"]
    assert [s["regime"] for s in segments] == ["prefix", "isolated"] and segments[0]["key"] != segments[1]["key"]


def test_names_cannot_drive_the_terminal(corpus: Path, tmp_path: Path) -> None:
    (corpus / "a\x1b[2Jb\n.md").write_text("The keeper of the red door is Mercer.")
    run_json("build", corpus, "--store", tmp_path / "s", "--codec", "raw", "--model", "bundled")
    for words in (("ls",), ("show", "a\x1b[2Jb\n.md"), ("rm", "a\x1b[2Jb\n.md"), ("diff", "0", "1"), ("show", "nothing\x1b")):
        ran = run_main(*words, "--store", tmp_path / "s")
        assert "\x1b" not in ran.out + ran.err and "\\x1b" in ran.out + ran.err


def test_show_adds_up(built: Path) -> None:
    found = run_json("show", "silver-tower.md", "--store", built)
    tiers = {t["name"]: t for t in found["tiers"]}
    for name, tier in tiers.items():
        assert sum(g["nbytes"][name] for g in found["layers"]) == tier["nbytes"]
        assert tier["bits"] == pytest.approx(8 * tier["load_nbytes"] / (found["raw_nbytes"] / 2))
    assert tiers["fine"]["load_nbytes"] == tiers["standard"]["nbytes"] + tiers["fine"]["nbytes"] and tiers["fine"]["requires"] == ["standard"]
    assert (tiers["lossless"]["kl"], tiers["lossless"]["kl_from"]) == (0, "exact")
    assert 0 < tiers["fine"]["kl"] < tiers["standard"]["kl"] < 0.1 and tiers["fine"]["kl_from"] == "artifact"  # all three were sampled
    assert [(g["first"], g["last"]) for g in found["layers"]] == [(n, n) for n in range(found["model"]["layers"])]
    row = Store(built).row("silver-tower.md")
    assert (found["text"], found["encoding"], found["template"]["key"], found["model"]["key"]) == (row.text, row.encoding, row.template, row.model)
    (segment,) = found["segments"]
    assert segment["key"] == row.passages[0].prefix and segment["regime"] == "both" and segment["position"] == 1
    text = run_main("show", "silver-tower.md", "--store", built).out
    assert all(k in text for k in (row.text, row.encoding, row.model, segment["key"], found["provenance"]["torch"]))


def test_show_metadata_and_passages(sample: Path, tmp_path: Path) -> None:
    text = (sample / "silver-tower.md").read_text().replace("\n", "\\n").replace('"', '\\"')
    (tmp_path / "a.jsonl").write_text(f'{{"id": "x/1", "text": "{text}", "author": "Mercer", "year": 1871}}\n')
    run_json("build", tmp_path / "a.jsonl", "--store", tmp_path / "s", "--codec", "raw", "--passage-tokens", "128", "--model", "bundled")
    whole = run_json("show", "a.jsonl/x/1", "--store", tmp_path / "s")
    assert whole["metadata"] == {"author": "Mercer", "year": 1871} and whole["passages"] == len(whole["segments"]) > 2
    second = run_json("show", "a.jsonl/x/1#1", "--store", tmp_path / "s")
    assert [s["passage"] for s in second["segments"]] == [1] and second["tokens"] == whole["segments"][1]["tokens"]
    assert run_json("show", "a.jsonl/x/1#99", "--store", tmp_path / "s", status=3)["error"]["code"] == "not-found"


def test_keys_choose_versions(built: Path) -> None:
    row = Store(built).row("silver-tower.md")
    chosen = ("--model", row.model[:8], "--template", row.template[:8], "--encoding", row.encoding[:8])
    assert len(run_json("ls", *chosen, "--store", built)["documents"]) == 3
    assert len(run_json("ls", "--model", "bundled", "--store", built)["documents"]) == 3
    for name in ("--model", "--template", "--encoding"):
        assert run_json("ls", name, "zzz", "--store", built, status=3)["error"]["code"] == "not-found"


def test_stats_account_for_every_byte(built: Path) -> None:
    found = run_json("stats", "--store", built)
    on_disk = sum(os.stat(p).st_size for p in built.rglob("*") if p.is_file())
    (encoding,) = found["encodings"]
    assert found["nbytes"] == on_disk == sum(t["nbytes"] for t in encoding["tiers"]) + sum(found["overhead"].values())
    assert found["overhead"]["other"] == 0 and found["overhead"]["token ids"] > 0
    assert (found["documents"], found["artifacts"]) == (3, 4)  # the head is an artifact of its own
    assert found["raw_nbytes"] == found["tokens"] * 3072 and found["bytes_per_token"] == pytest.approx(on_disk / found["tokens"])
    assert all(t["raw_ratio"] > 1 for t in encoding["tiers"])
    measured = {t["name"]: (t["kl"], t["upper"]) for t in encoding["tiers"]}
    assert measured["lossless"] == (0, 0) and 0 < measured["fine"][0] < measured["fine"][1] < measured["standard"][1]
    assert "whole store: " in run_main("stats", "--store", built).out


def test_match_finds_the_text_itself(sample: Path, built: Path) -> None:
    found = run_json("match", sample / "silver-tower.md", "--store", built)
    assert found["exact"] and found["sources"] == ["silver-tower.md"] and found["matched"] == found["total"] == found["stored"] == 308
    assert run_main("match", sample / "silver-tower.md", "--store", built).out == "stored: all 308 tokens are 'silver-tower.md'\n"


def test_match_shows_where_a_text_parts(sample: Path, built: Path, tmp_path: Path) -> None:
    text = (sample / "silver-tower.md").read_text()
    place = text.index("access code of the silver tower is ") + len("access code of the silver tower is ")
    found = run_json("match", "--text", text[:place] + "\x1bxyz" + text[place:], "--store", built)
    assert not found["exact"] and found["sources"] == ["silver-tower.md"] and 0 < found["matched"] < 308
    assert (
        found["before"].rstrip().endswith("silver tower is")
        and found["found_text"].strip().startswith(text[place : place + 3])
        and "\x1b" in found["given_text"]
    )
    (tmp_path / "edited.md").write_text(text[:place] + "\x1bxyz" + text[place:])
    lines = run_main("match", tmp_path / "edited.md", "--store", built).out.splitlines()
    assert lines[0].startswith(f"{found['matched']} of {found['total']} tokens match 'silver-tower.md'")
    assert [line.split()[0] for line in lines[1:]] == ["after", "given", "stored"] and "\x1b" not in lines[2]


def test_match_where_one_side_ends_or_nothing_fits(sample: Path, built: Path) -> None:
    text = (sample / "silver-tower.md").read_text().strip()
    longer = run_json("match", "--text", f"{text} And more.", "--store", built)
    assert longer["given"] is not None and longer["matched"] <= 308 < longer["total"]
    assert run_json("match", "--text", "\u2603", "--store", built)["matched"] <= 1


def test_diff(corpus: Path, tmp_path: Path) -> None:
    words = ("build", corpus, "--store", tmp_path / "s", "--codec", "raw", "--model", "bundled")
    run_json(*words)
    run_json("snapshots", "--tag", "first", "--store", tmp_path / "s")
    (corpus / "silver-tower.md").write_text("The keeper of the silver tower is Mercer.")
    (corpus / "stone-bridge.md").rename(corpus / "bridge.md")
    run_json(*words)
    found = run_json("diff", "first", "2", "--store", tmp_path / "s")
    assert [r["source"] for r in found["added"]] == ["bridge.md"] and [r["source"] for r in found["removed"]] == ["stone-bridge.md"]
    (changed,) = found["changed"]
    assert changed["source"] == "silver-tower.md" and {"text", "passages"} <= set(changed["fields"]) and changed["tokens_before"] == 308
    assert found["tokens"] == changed["tokens"] - 308 and found["tokens"] < 0
    lines = run_main("diff", "1", "--store", tmp_path / "s").out.splitlines()
    assert [line[0] for line in lines] == ["+", "-", "~", "s"] and f"308 -> {changed['tokens']} tokens" in lines[2]
    for wrong in ("7", "nosuch"):
        assert run_json("diff", wrong, "--store", tmp_path / "s", status=3)["error"]["code"] == "not-found"
