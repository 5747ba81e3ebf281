"""Build, open, compose, answer: what comes back is what a live prefix would have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvstore
from kvstore import Document
from kvstore.errors import IncompatibleError, InputError, NotFoundError

TEXTS = {
    "tower.md": "The silver tower stands at the end of the harbour road. The access code of the silver tower is 4821. Nobody lives there.",
    "lantern.md": "An old lantern hangs by the door of the inn. The keeper of the old lantern is Mercer. He lights it when the fog comes in.",
    "garden.md": "Behind the house lies a garden with a wall of grey stone. The colour of the quiet garden is crimson in the autumn.",
}
QUERY = "What is the access code of the silver tower?"


def documents() -> list[Document]:
    return [Document(text, name) for name, text in TEXTS.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, bundled_model: Any, bundled_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("store") / "kv.zarr"
    kvstore.build(documents(), path, bundled_model, bundled_tokenizer, regime="both", codec="scalar", lossless=True)
    return path


@pytest.fixture(scope="module")
def store(folder: Path, bundled_model: Any, bundled_tokenizer: Any) -> kvstore.OpenStore:
    return kvstore.open(folder, bundled_model, bundled_tokenizer)


def live_logits(model: Any, parts: list[list[int]]) -> torch.Tensor:
    """Logits after prefilling the parts one after another into one cache, batch 1."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for part in parts:
            logits = model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits
    return logits


def stored_logits(model: Any, prompt: kvstore.Prompt) -> torch.Tensor:
    inputs, cached = prompt.inputs, prompt.receipt.cached_tokens
    with torch.inference_mode():
        return model(inputs["input_ids"][:, cached:], past_key_values=inputs["past_key_values"], use_cache=True).logits


def parts_of(store: kvstore.OpenStore, names: list[str], query: str) -> list[list[int]]:
    renderer = store.view.renderer
    return [list(renderer.head_ids), *(list(renderer.document(TEXTS[n])) for n in names), list(renderer.query(query))]


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence of next-token distributions, nats a token."""
    a, b = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_lossless_equals_a_live_prefix_bit_for_bit(store: kvstore.OpenStore, bundled_model: Any) -> None:
    for name in TEXTS:
        prompt = store.compose([name], QUERY, tier="lossless")
        assert prompt.receipt.exact
        assert torch.equal(stored_logits(bundled_model, prompt), live_logits(bundled_model, parts_of(store, [name], QUERY)))


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_exact_codecs_equal_a_live_prefix_bit_for_bit(codec: str, tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    kvstore.build(documents(), tmp_path / "s", bundled_model, bundled_tokenizer, codec=codec)
    store = kvstore.open(tmp_path / "s", bundled_model, bundled_tokenizer)
    prompt = store.compose(["tower.md"], QUERY)
    assert torch.equal(stored_logits(bundled_model, prompt), live_logits(bundled_model, parts_of(store, ["tower.md"], QUERY)))


@pytest.mark.parametrize(("tier", "limit"), [("standard", 0.05), ("fine", 0.005)])
def test_scalar_tiers_stay_close(store: kvstore.OpenStore, bundled_model: Any, tier: str, limit: float) -> None:
    for name in TEXTS:
        live = live_logits(bundled_model, parts_of(store, [name], QUERY))
        found = kl(live, stored_logits(bundled_model, store.compose([name], QUERY, tier=tier)))
        assert 0 < found < limit


def test_the_answer_is_right_and_generating_twice_gives_the_same(store: kvstore.OpenStore, bundled_model: Any, bundled_tokenizer: Any) -> None:
    prompt = store.compose(["tower.md"], QUERY)
    runs = [
        bundled_model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].logits, runs[1].logits, strict=True))
    answer = bundled_tokenizer.decode(runs[0].sequences[0, prompt.input_ids.shape[1] :])
    assert answer.startswith(" 4821.")


def test_static_cache_gives_the_same_tokens(store: kvstore.OpenStore, bundled_model: Any) -> None:
    prompt = store.compose(["tower.md"], QUERY)
    a = bundled_model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)
    b = bundled_model.generate(**prompt.static(6), max_new_tokens=6, do_sample=False)
    assert torch.equal(a, b)


def test_blocks_serve_several_documents_and_say_that_they_are_approximate(
    store: kvstore.OpenStore, bundled_model: Any, bundled_tokenizer: Any
) -> None:
    prompt = store.compose(["lantern.md", "tower.md", "garden.md"], QUERY, reuse="blocks")
    actions = [(d.action, d.context) for d in prompt.receipt.documents]
    assert actions == [("reused", "same prefix"), ("reused", "same prefix"), ("moved", "approximate"), ("moved", "approximate")]
    assert not prompt.receipt.exact
    out = bundled_model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)
    assert bundled_tokenizer.decode(out[0, prompt.input_ids.shape[1] :]).startswith(" 4821.")


def test_prefix_reuses_the_longest_stored_chain_only(store: kvstore.OpenStore, bundled_model: Any) -> None:
    names = ["lantern.md", "tower.md"]
    prompt = store.compose(names, QUERY, tier="lossless")
    assert [d.action for d in prompt.receipt.documents] == ["reused", "reused", "prefilled"]
    parts = parts_of(store, names, QUERY)
    live = live_logits(bundled_model, [parts[0], parts[1], parts[2] + parts[3]])
    assert torch.equal(stored_logits(bundled_model, prompt), live)


def test_blocks_not_stored_are_computed_alone(store: kvstore.OpenStore, bundled_model: Any, bundled_tokenizer: Any) -> None:
    new = Document("The owner of the tall bridge is Vickers. Travellers pay him a coin.", "new.md")
    prompt = store.compose(["lantern.md", new], "Who is the owner of the tall bridge?", reuse="blocks")
    last = prompt.receipt.documents[-1]
    assert (last.action, last.context, last.fidelity) == ("prefilled", "approximate", "live")
    assert prompt.receipt.cached_tokens == sum(d.tokens for d in prompt.receipt.documents)


def test_collate_answers_each_row_as_alone(store: kvstore.OpenStore, bundled_model: Any) -> None:
    asked = [(["tower.md"], QUERY), (["lantern.md", "garden.md"], "Who is the keeper of the old lantern?"), (["garden.md"], "What is it?")]
    prompts = [store.compose(d, q, reuse="blocks") for d, q in asked]
    batch = kvstore.collate(prompts)
    cached = batch["past_key_values"].get_seq_length()
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, cached:]
    with torch.inference_mode():
        together = bundled_model(
            batch["input_ids"][:, cached:], attention_mask=batch["attention_mask"], position_ids=positions, past_key_values=batch["past_key_values"]
        ).logits[:, -1]
    for row, prompt in zip(together, prompts, strict=True):
        assert kl(stored_logits(bundled_model, prompt)[:, -1], row[None]) < 2e-3


def test_text_that_was_changed_is_a_miss(store: kvstore.OpenStore) -> None:
    changed = Document(TEXTS["tower.md"].replace("4821", "4822"), "tower.md")
    receipt = store.compose([changed], QUERY).receipt
    assert receipt.documents[1].action == "prefilled" and receipt.documents[1].why == "changed since build"
    same = store.compose([Document(TEXTS["tower.md"], "another/name.md")], QUERY).receipt
    assert same.documents[1].action == "reused"


def test_load_gives_a_prefix_to_go_on_from(store: kvstore.OpenStore, bundled_model: Any) -> None:
    prefix = store.load("tower.md", tier="lossless")
    assert prefix.cache.get_seq_length() == prefix.input_ids.shape[1] == prefix.receipt.cached_tokens
    composed = store.compose(["tower.md"], QUERY, tier="lossless")
    assert torch.equal(prefix.prompt(QUERY).input_ids, composed.input_ids)
    assert torch.equal(stored_logits(bundled_model, prefix.prompt(QUERY)), stored_logits(bundled_model, composed))


def test_quality_wishes(store: kvstore.OpenStore) -> None:
    sizes = {t: store["tower.md"].nbytes(t) for t in ("standard", "fine", "lossless")}
    assert sizes["standard"] < sizes["fine"] < sizes["lossless"]
    assert store.load("tower.md", max_kl=0.0).receipt.documents[1].fidelity == "lossless"
    small = store.load("tower.md", max_bytes=sizes["fine"] + 2000)
    assert small.receipt.documents[1].fidelity in ("standard", "fine")
    assert store.load("tower.md", deadline=60.0).receipt.documents[1].fidelity == "lossless"
    with pytest.raises(InputError, match="exclude"):
        store.load("tower.md", tier="fine", max_kl=0.1)
    with pytest.raises(NotFoundError, match="stored are standard, fine, lossless"):
        store.load("tower.md", tier="draft")


def test_a_changed_weight_is_refused(folder: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    weight = bundled_model.model.layers[3].mlp.up_proj.weight
    before = weight.data[5, 7].clone()
    try:
        weight.data[5, 7] += 0.5
        with pytest.raises(IncompatibleError, match="weights"):
            kvstore.open(folder, bundled_model, bundled_tokenizer)
    finally:
        weight.data[5, 7] = before
    kvstore.open(folder, bundled_model, bundled_tokenizer)


def test_path_object_and_saved_copy_are_one_model(folder: Path, tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    bundled_model.save_pretrained(tmp_path / "copy")
    bundled_tokenizer.save_pretrained(tmp_path / "copy")
    store = kvstore.open(folder, tmp_path / "copy")
    assert store.compose(["tower.md"], QUERY).receipt.documents[1].action == "reused"
    with pytest.raises(IncompatibleError, match="dtype"):
        kvstore.open(folder, tmp_path / "copy", dtype="float32")


def test_building_again_writes_nothing_and_an_edit_compiles_one(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    corpus, path = tmp_path / "corpus", tmp_path / "s"
    corpus.mkdir()
    for name, text in TEXTS.items():
        (corpus / name).write_text(text)
    first = kvstore.build(corpus, path, bundled_model, bundled_tokenizer, codec="scalar")
    assert (first.documents, first.compiled) == (3, 3)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    again = kvstore.build(corpus, path, bundled_model, bundled_tokenizer, codec="scalar")
    assert (again.compiled, again.unchanged, again.snapshot) == (0, 3, first.snapshot)
    assert sorted(p for p in path.rglob("*") if p.is_file()) == files
    (corpus / "tower.md").write_text(TEXTS["tower.md"] + " The door is green.")
    (corpus / "garden.md").unlink()
    third = kvstore.build(corpus, path, bundled_model, bundled_tokenizer, codec="scalar")
    assert (third.compiled, third.unchanged, third.removed, third.segments) == (1, 1, 1, 1)
    assert kvstore.open(path).sources() == ["lantern.md", "tower.md"]
    other = kvstore.build(corpus, path, bundled_model, bundled_tokenizer, codec="raw")
    assert other.compiled == 2 and len(kvstore.open(path).rows()) == 4


def test_system_prompt_is_compiled_once_as_parent_of_all(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    report = kvstore.build(
        documents(), tmp_path / "s", bundled_model, bundled_tokenizer, system="You answer from the text.", codec="raw", regime="both"
    )
    assert report.segments == 1 + 2 * len(TEXTS)
    store = kvstore.open(tmp_path / "s", bundled_model, bundled_tokenizer)
    prompt = store.compose(["tower.md"], QUERY)
    assert torch.equal(stored_logits(bundled_model, prompt), live_logits(bundled_model, parts_of(store, ["tower.md"], QUERY)))
    moved = store.compose(["lantern.md", "tower.md"], QUERY, reuse="blocks").receipt
    assert [d.action for d in moved.documents] == ["reused", "reused", "moved"]


def test_passages(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    text = "\n\n".join(f"{t} Paragraph {i}." for i, t in enumerate(TEXTS.values()))
    kvstore.build([Document(text, "long.md")], tmp_path / "s", bundled_model, bundled_tokenizer, codec="scalar", passage_tokens=64)
    store = kvstore.open(tmp_path / "s", bundled_model, bundled_tokenizer)
    row = store.row("long.md")
    assert len(row.passages) > 1 and max(p.tokens for p in row.passages) <= 64
    assert store.load("long.md#1").receipt.documents[1].action == "reused"
    with pytest.raises(InputError, match="passages"):
        store.load("long.md")
    with pytest.raises(NotFoundError, match="#9"):
        store.load("long.md#9")
