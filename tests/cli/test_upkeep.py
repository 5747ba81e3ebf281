"""`kvstore verify`, `snapshots`, `rm`, `gc`, `doctor`, `demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import run_json, run_main
from kvstore.cli.main import COMMANDS

from kvstore import answering, bundled, demo, relogits
from kvstore.errors import IntegrityError
from kvstore.relogits import TierCheck
from kvstore.store import Store


def damage(store: Path, array: str) -> None:
    """Flip a bit in the middle of a tier's shard."""
    (shard,) = store.glob(f"packs/*/{array}/c.0.0.0.0")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def test_verify(built: Path) -> None:
    ran = run_main("verify", "--store", built)
    assert ran.status == 0 and ran.out.startswith("1 pack, 4 segments (") and ran.out.endswith(", 1 snapshot read: every digest matches\n")
    found = run_json("verify", "--store", built)
    assert (found["ok"], found["logits"], found["problems"]) == (True, None, [])


def test_verify_reports_damage(store: Path) -> None:
    damage(store, "t1")
    found = run_json("verify", "--store", store, status=6)
    assert not found["ok"] and found["problems"][0]["severity"] == "error" and "t1" in found["problems"][0]["what"]
    ran = run_main("verify", "--logits", "--store", store)
    assert ran.status == IntegrityError.exit_status and ran.out.startswith("error: packs/") and "1 problem" in ran.out
    assert (
        run_json("load", *Store(store).sources(), "--query", "What?", "--reuse", "blocks", "--tier", "fine", "--store", store, status=6)["error"][
            "code"
        ]
        == "integrity"
    )


def test_verify_logits(built: Path) -> None:
    logits = run_json("verify", "--logits", "2", "--store", built)["logits"]
    assert (logits["segments"], logits["of"], logits["problems"]) == (2, 3, [])
    assert [c["tier"] for c in logits["checks"]] == ["standard", "fine", "lossless"] * 2
    for check in logits["checks"]:
        assert check["equal"] == check["exact"] == (check["tier"] == "lossless")
        assert check["kl"] == 0 if check["exact"] else 0 < check["kl"] < 0.05
    assert "2 of 3 segments prefilled again" in run_main("verify", "--logits", "2", "--store", built).out
    assert run_json("verify", "--logits", "0", "--store", built, status=2)["error"]["code"] == "usage"


def test_output_that_is_not_finite_is_a_problem(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relogits, "_distributions", lambda model, cache, following: torch.full((len(following), 8), float("nan")))
    logits = run_json("verify", "--logits", "1", "--store", built, status=6)["logits"]
    assert len(logits["problems"]) == 3 and all(0 < c["kl"] < float("inf") for c in logits["checks"])


def test_verify_logits_of_segments_after_a_system_prompt(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You answer from the text.")
    run_json(
        "build", sample, "--store", tmp_path / "s", "--codec", "raw", "--regime", "both", "--system", tmp_path / "system.txt", "--model", "bundled"
    )
    checks = run_json("verify", "--logits", "2", "--store", tmp_path / "s")["logits"]["checks"]
    assert [c["regime"] for c in checks] == ["prefix", "isolated"] and all(c["equal"] and c["kl"] == 0 for c in checks)


def test_values_that_are_not_the_models_are_a_problem() -> None:
    ours: dict[str, Any] = {"source": "a.md", "passage": 0, "regime": "prefix", "agreement": 1.0}
    assert TierCheck(**ours, tier="lossless", exact=True, equal=False, kl=0.001).problem is None  # another machine's rounding
    assert "KL 0.5" in (TierCheck(**ours, tier="lossless", exact=True, equal=False, kl=0.5).problem or "")
    assert TierCheck(**ours, tier="standard", exact=False, equal=False, kl=0.5).problem is None
    assert TierCheck(**ours, tier="standard", exact=False, equal=False, kl=5.0).problem


def test_rm_and_snapshots(store: Path) -> None:
    would = run_json("rm", "silver-tower.md", "--dry-run", "--store", store)
    assert (would["snapshot"], would["dry_run"], [r["source"] for r in would["removed"]]) == (1, True, ["silver-tower.md"])
    assert run_json("rm", "silver-tower.md", "nothing.md", "--store", store, status=3)["error"]["code"] == "not-found"
    assert run_json("snapshots", "--store", store)["newest"] == 1
    assert run_main("rm", "silver-tower.md", "--store", store).out.endswith("snapshot 2: 1 document removed\n")
    assert Store(store).sources() == ["hidden-garden.md", "stone-bridge.md"]
    first, second = run_json("snapshots", "--store", store)["snapshots"]
    assert (first["number"], first["full"], first["changed"], first["note"]) == (1, True, 3, "build")
    assert (second["number"], second["full"], second["removed"], second["note"]) == (2, False, 1, "rm")


def test_tags(store: Path) -> None:
    run_json("rm", "silver-tower.md", "--store", store)
    run_json("snapshots", "--tag", "before", "1", "--store", store)
    found = run_json("snapshots", "--tag", "now", "--store", store)["snapshots"]
    assert [s["tags"] for s in found] == [["before"], ["now"]]
    assert run_json("snapshots", "--tag", "now", "--store", store, status=2)["error"]["code"] == "taken"
    assert run_json("snapshots", "--tag", "../x", "--store", store, status=2)["error"]["code"] == "input"
    assert run_json("snapshots", "--tag", "x", "9", "--store", store, status=3)["error"]["code"] == "not-found"
    assert run_json("snapshots", "--untag", "nosuch", "--store", store, status=3)["error"]["code"] == "not-found"
    assert [s["tags"] for s in run_json("snapshots", "--untag", "before", "--store", store)["snapshots"]] == [[], ["now"]]


def test_gc(store: Path) -> None:
    run_json("rm", "silver-tower.md", "hidden-garden.md", "--store", store)
    words = ("gc", "--keep", "1", "--store", store)
    young = run_json(*words)
    assert (young["packs_removed"], young["packs_rewritten"], young["packs_kept"]) == ([], {}, 1)
    before = sorted(p for p in store.rglob("*") if p.is_file())
    would = run_json(*words, "--grace", "0", "--dry-run")
    assert would["dry_run"] and would["artifacts_dropped"] == 2 and sorted(p for p in store.rglob("*") if p.is_file()) == before
    done = run_json(*words, "--grace", "0")
    assert len(done["packs_rewritten"]) == 1 and done["artifacts_dropped"] == 2 and done["bytes_freed"] > 0
    assert run_json("verify", "--store", store)["ok"] and Store(store).sources() == ["stone-bridge.md"]
    assert "0 artifacts dropped" in run_main(*words, "--grace", "0").out
    assert run_json("gc", "--keep", "0", "--store", store, status=2)["error"]["code"] == "input"


def test_gc_drops_damage_so_that_the_next_build_mends_it(sample: Path, store: Path) -> None:
    damage(store, "t1")
    dropped = run_json("gc", "--drop-damaged", "--grace", "0", "--store", store)
    assert dropped["damaged"] and dropped["artifacts_dropped"] >= 1
    again = run_json("build", sample, "--store", store, "--regime", "both", "--lossless", "--codec", "scalar")
    assert again["compiled"] >= 1 and run_json("verify", "--store", store)["ok"]


def test_doctor() -> None:
    found = run_json("doctor", "bundled")
    assert found["supported"] and found["class"] == "LlamaForCausalLM" and found["layout"]["capture"] == "hooked"
    text = run_main("doctor", "bundled").out
    assert "0-63" in text and "\nsupported: " in text and "continue          ok, bit for bit as live" in text
    uses = {u["name"]: u["outcome"] for u in found["uses"]}
    assert uses.keys() == {"store and reload", "continue", "cut", "batch", "static cache", "move"}
    assert uses["store and reload"] == uses["continue"] == "exact" and set(uses.values()) <= {"exact", "rounding"}


def test_doctor_refuses_what_it_cannot_store(tmp_path: Path, bundled_tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=256)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    bundled_tokenizer.save_pretrained(tmp_path / "m")
    ran = run_main("doctor", tmp_path / "m")
    assert ran.status == 4 and "refused:" in ran.out and "values move with position" in ran.out
    found = run_json("doctor", tmp_path / "m", status=4)
    assert found["layout"] is None and found["problems"] and {u["outcome"] for u in found["uses"]} == {"refused"}
    assert run_json("doctor", tmp_path / "nothing", status=2)["error"]["code"] == "input"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, sample: Path) -> None:
    """A demo of three documents instead of all of them."""
    asked = [q._replace(source=Path(q.source).name) for q in bundled.questions()]
    monkeypatch.setattr(answering, "RUNS", 1)
    monkeypatch.setattr(bundled, "corpus_path", lambda: sample)
    monkeypatch.setattr(bundled, "questions", lambda: [q for q in asked if (sample / q.source).exists()])


@pytest.mark.usefixtures("few")
def test_demo_runs_again_and_makes_a_damaged_store_of_its_own_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_CACHE", str(tmp_path))
    first = run_json("demo")
    assert first["ok"] and first["right"] == len(first["asked"]) >= 3 and first["build"]["compiled"] == len(first["documents"]) == 3
    assert [t["name"] for t in first["stats"]["encodings"][0]["tiers"]] == list(first["first_token"])
    assert all(a["same"] and a["live"] == a["expected"] for a in first["asked"])
    assert all(list(a["stored"]) == ["standard", "fine", "lossless"] for a in first["asked"])
    assert list(first["first_token"]) == ["draft", "standard", "fine", "lossless"]
    again = run_json("demo")
    assert (again["build"]["compiled"], again["store"]) == (0, first["store"])
    (Path(first["store"]) / "zarr.json").write_text("{}")
    text = run_main("demo").out
    assert "compiled   3 of 3 documents" in text and "silver-tower.md" in text and "kvstore build PATH..." in text


@pytest.mark.usefixtures("few")
def test_demo_fails_where_an_answer_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "live_answer", lambda *given: "something else.")
    ran = run_main("demo", "--store", tmp_path / "s")
    assert ran.status == 1 and "these differ:" in ran.out and "something else" in ran.out


def test_the_demo_promises_the_live_answer_from_fine_on() -> None:
    asked = demo.Asked("a.md", "Who?", "Ives", "Ives", {"standard": "Iv", "fine": "Ives", "lossless": "Ives"})
    assert asked.same
    assert not replace(asked, stored={**asked.stored, "fine": "Iv"}).same and not replace(asked, stored={**asked.stored, "lossless": ""}).same


def test_every_command_is_tested() -> None:
    folder = Path(__file__).parent
    text = "".join(p.read_text() for p in folder.glob("test_*.py"))
    assert [name for name in COMMANDS if f'run_json("{name}"' not in text] == []
