"""`kvstore load`: the answer, the receipt, the time to the first token, and the exported file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import run_json, run_main
from safetensors import safe_open
from transformers import DynamicCache
from transformers.models.llama import modeling_llama as llama

from kvstore import bundled
from kvstore.errors import ResourceError
from kvstore.store import Store

QUERY = "What is the access code of the silver tower?"
ASK = ("load", "silver-tower.md", "--query", QUERY, "--max-new-tokens", "6")


def test_it_answers_and_says_how_long_it_took(built: Path) -> None:
    ran = run_main(*ASK, "--store", built)
    assert ran.status == 0 and ran.err == ""
    answer = (built.parent / "corpus" / "silver-tower.md").read_text().split("access code of the silver tower is ")[1].split(".")[0]
    assert ran.out.startswith(f"{answer}.")
    assert "silver-tower.md: 308 tokens reused (stored after these tokens); same prefix, lossless" in ran.out
    assert "ms from the store" in ran.out and "ms by a cold prefill of 331 tokens" in ran.out


def test_the_object(built: Path) -> None:
    found = run_json(*ASK, "--store", built)
    took = found["first_token"]
    assert (
        found["query"] == QUERY and took["tokens"] == found["receipt"]["prompt_tokens"] and took["cached_tokens"] == found["receipt"]["cached_tokens"]
    )
    assert took["stored"] > 0 and took["ratio"] == pytest.approx(took["cold"] / took["stored"]) and took["runs"] >= 1


def test_a_dialogue(built: Path, tmp_path: Path) -> None:
    file, words = tmp_path / "turns.json", ("load", "silver-tower.md", "--max-new-tokens", "6", "--store", built)
    turns = [{"role": "user", "content": "Who lives there?"}, {"role": "assistant", "content": "Nobody."}, {"role": "user", "content": QUERY}]
    file.write_text(json.dumps(turns))
    found = run_json(*words, "--messages", file)
    assert found["messages"] == turns and found["receipt"]["prompt_tokens"] > run_json(*ASK, "--store", built)["receipt"]["prompt_tokens"]
    file.write_text(json.dumps(turns[2:]))
    assert run_json(*words, "--messages", file)["answer"] == run_json(*ASK, "--store", built)["answer"]
    for wrong in ("{}", "[", json.dumps(turns[:2]), "[]"):
        file.write_text(wrong)
        run_json(*words, "--messages", file, status=2)


def test_some_tokens_computed_anew(built: Path) -> None:
    words = ("load", "stone-bridge.md", "silver-tower.md", "--query", QUERY, "--max-new-tokens", "6", "--store", built)
    found = run_json(*words, "--reuse", "epic", "--recompute", "8")["receipt"]
    assert (found["reuse"], found["recompute"], [d["recomputed"] for d in found["documents"]]) == ("epic", 8, [0, 0, 8])
    assert found["documents"][-1]["action"] == "recomputed" and found["documents"][-1]["context"] == "approximate"
    assert run_json(*words, "--reuse", "query")["receipt"]["recompute"] == 0.15
    assert "computes nothing anew" in run_json(*words, "--recompute", "8", status=2)["error"]["message"]
    assert "neither a number" in run_json(*words, "--reuse", "epic", "--recompute", "many", status=2)["error"]["message"]


def test_several_documents_side_by_side(built: Path) -> None:
    words = ("load", "stone-bridge.md", "silver-tower.md", "--query", QUERY, "--max-new-tokens", "6", "--store", built)
    moved = run_json(*words, "--reuse", "blocks")["receipt"]["documents"]
    assert [d["action"] for d in moved] == ["reused", "reused", "moved"] and moved[-1]["context"] == "approximate"
    kept = run_json(*words)["receipt"]["documents"]
    assert [d["action"] for d in kept] == ["reused", "reused", "prefilled"]


@pytest.mark.parametrize(
    ("wish", "tier"),
    [
        (["--tier", "standard"], "standard"),
        (["--tier", "fine"], "fine"),
        (["--max-kl", "0"], "lossless"),
        (["--max-kl", "0.5"], "cheapest"),
        (["--max-bytes", "300K"], "fine"),
        (["--max-bytes", "120000"], "standard"),
        (["--deadline", "60"], "lossless"),
        ([], "lossless"),
    ],
)
def test_wishes_for_quality(built: Path, tmp_path: Path, wish: list[str], tier: str) -> None:
    receipt = run_json("load", "silver-tower.md", "--out", tmp_path / "a.safetensors", "--store", built, *wish)["receipt"]
    tiers = Store(built)["silver-tower.md"].tiers
    assert (receipt["tier"], receipt["source"]) == (tiers[0] if tier == "cheapest" else tier, "silver-tower.md")
    assert receipt["kl"] == Store(built)["silver-tower.md"].quality[receipt["tier"]]


def test_wishes_that_cannot_be_met(built: Path, tmp_path: Path) -> None:
    words = ("load", "silver-tower.md", "--out", tmp_path / "a", "--store", built)
    assert "standard, fine, lossless" in run_json(*words, "--tier", "draft", status=3)["error"]["message"]
    assert run_json(*words, "--max-bytes", "10", status=ResourceError.exit_status)["error"]["code"] == "resource"
    assert not (tmp_path / "a").exists()


def test_the_file_holds_what_a_live_prefill_computes(built: Path, tmp_path: Path, bundled_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lossless, bit for bit."""
    out = tmp_path / "kv.safetensors"
    ran = run_main("load", "silver-tower.md", "--out", out, "--store", built)
    assert ran.status == 0 and ran.out.startswith(f"{out}: 308 tokens of silver-tower.md at tier lossless, ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kv.safetensors"]
    store, layers = Store(built), bundled_model.config.num_hidden_layers
    head, ids = list(store.templates()[0].head.ids), store["silver-tower.md"].token_ids
    with safe_open(out, "pt") as file:
        assert set(file.keys()) == {"token_ids"} | {f"layers.{n}.{k}" for n in range(layers) for k in ("keys", "values")}
        receipt = json.loads(file.metadata()["receipt"])
        assert receipt["position"] == 0 and receipt["tokens"] == 308 and receipt["encoding"] == store.row("silver-tower.md").encoding
        assert file.get_tensor("token_ids").dtype == torch.int64 and file.get_tensor("token_ids").tolist() == ids
        for n, (keys, values) in enumerate(live_at_zero(bundled_model, head, ids, monkeypatch)):
            assert torch.equal(file.get_tensor(f"layers.{n}.keys"), keys)
            assert torch.equal(file.get_tensor(f"layers.{n}.values"), values)


def live_at_zero(model: Any, head: list[int], ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer K and V of `ids` prefilled after `head`, K rotated by the model's own code to positions from 0."""
    own, seen, cache = llama.apply_rotary_pos_emb, [], DynamicCache(config=model.config)

    def spy(queries: torch.Tensor, keys: torch.Tensor, *more: Any, **named: Any) -> Any:
        seen.append(keys.clone())
        return own(queries, keys, *more, **named)

    with torch.inference_mode(), monkeypatch.context() as patch:
        model(torch.tensor([head]), past_key_values=cache)
        patch.setattr(llama, "apply_rotary_pos_emb", spy)
        model(torch.tensor([ids]), past_key_values=cache)
        cos, sin = model.model.rotary_emb(seen[0], torch.arange(len(ids))[None])
        return [(own(k, k, cos, sin)[1], layer.values[:, :, len(head) :]) for k, layer in zip(seen, cache.layers, strict=True)]


def test_the_file_replaces_an_older_one_whole_or_not_at_all(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "kv.safetensors"
    out.write_bytes(b"older")
    assert run_json("load", "nothing.md", "--out", out, "--store", built, status=3)["error"]["code"] == "not-found"
    assert out.read_bytes() == b"older"
    run_json("load", "silver-tower.md#0", "--out", out, "--store", built, "--tier", "standard")
    assert out.stat().st_size > 900_000
    assert run_json("load", "silver-tower.md", "--out", tmp_path / "none" / "x", "--store", built, status=7)["error"]["code"] == "storage"
    assert run_json("load", "silver-tower.md", "stone-bridge.md", "--out", out, "--store", built, status=2)["error"]["code"] == "usage"


def test_no_model_is_loaded_for_a_file(sample: Path, tmp_path: Path) -> None:
    """A store whose model is gone still exports."""
    model = Path(shutil.copytree(bundled.model_path(), tmp_path / "model"))
    run_json("build", sample, "--store", tmp_path / "s", "--codec", "raw", "--model", model)
    shutil.rmtree(model)
    assert run_json("load", "silver-tower.md", "--out", tmp_path / "a", "--store", tmp_path / "s")["receipt"]["tokens"] == 308
    assert run_json(*ASK, "--store", tmp_path / "s", status=2)["error"]["code"] == "input"


def test_another_model_is_refused(built: Path, tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    config = type(bundled_model.config)(**{**bundled_model.config.to_dict(), "rope_theta": 5000.0, "rope_parameters": None})
    other = type(bundled_model)(config)
    other.load_state_dict(bundled_model.state_dict())
    other.to(torch.bfloat16).save_pretrained(tmp_path / "other")
    bundled_tokenizer.save_pretrained(tmp_path / "other")
    found = run_json(*ASK, "--store", built, "--model", tmp_path / "other", status=4)
    assert found["error"]["code"] == "incompatible" and "rope" in found["error"]["message"]


def test_one_of_several_encodings(sample: Path, store: Path, tmp_path: Path) -> None:
    run_json("build", sample, "--store", store, "--codec", "raw")
    words = ("load", "silver-tower.md", "--out", tmp_path / "a", "--store", store)
    assert run_json(*words, status=2)["error"]["code"] == "ambiguous"
    raw = next(d["encoding"] for d in run_json("ls", "--store", store)["documents"] if d["tiers"] == ["raw"])
    assert run_json(*words, "--encoding", raw[:10])["receipt"]["tier"] == "raw"
    assert run_json(*ASK, "--store", store, "--encoding", raw[:10])["receipt"]["encoding"] == raw
    assert run_json(*ASK, "--store", store, status=2)["error"]["code"] == "ambiguous"
