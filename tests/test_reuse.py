"""Reuse modes over a store and the bundled model: what they choose, what comes out, what the receipt says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import kvstore
from kvstore import Document
from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import dynamic_cache
from kvstore.families.attention import configs, observing
from kvstore.families.recompute import Recomputer
from kvstore.families.twin import twin_of
from kvstore.manifest import StateTensor
from kvstore.models import ModelSource
from kvstore.reuse import mode_of
from kvstore.reuse.scene import LiveScene
from tests import masked_forward
from tests.contracts.mode import FakeScene, ModeContract

TEXTS = {
    "tower.md": "The silver tower stands at the end of the harbour road. The access code of the silver tower is 4821. Nobody lives there.",
    "lantern.md": "An old lantern hangs by the door of the inn. The keeper of the old lantern is Mercer. He lights it when the fog comes in.",
    "garden.md": "Behind the house lies a garden with a wall of grey stone. The colour of the quiet garden is crimson in the autumn.",
}
NEW = Document("The owner of the tall bridge is Vickers. Travellers pay him a coin.", "new.md")
QUERY = "What is the access code of the silver tower?"
NAMES = ["lantern.md", "tower.md", "garden.md"]


class TestPrefix(ModeContract):
    name: ClassVar[str] = "prefix"
    recomputes: ClassVar[bool] = False


class TestBlocks(ModeContract):
    name: ClassVar[str] = "blocks"
    recomputes: ClassVar[bool] = False


class TestEpic(ModeContract):
    name: ClassVar[str] = "epic"

    def test_takes_the_beginnings(self) -> None:
        assert mode_of("epic", 2).choose(FakeScene(5, 1, 4)).tolist() == [3, 4, 8, 9, 10]


class TestCacheBlend(ModeContract):
    name: ClassVar[str] = "cacheblend"
    measures: ClassVar[list[str]] = ["deviation"]


class TestQuery(ModeContract):
    name: ClassVar[str] = "query"
    measures: ClassVar[list[str]] = ["mass"]


@pytest.fixture(scope="module")
def source() -> Iterator[ModelSource]:
    """In float32, where equal passes agree to five digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = ModelSource(None, dtype="float32")
    yield ModelSource(found.model, found.tokenizer)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, source: ModelSource) -> kvstore.OpenStore:
    path = tmp_path_factory.mktemp("reuse") / "kv.zarr"
    documents = [Document(text, name) for name, text in TEXTS.items()]
    kvstore.build(documents, path, source.model, source.tokenizer, regime="both", codec="scalar", lossless=True, certify="none")
    return kvstore.open(path, source.model, source.tokenizer)


def last_logits(prompt: kvstore.Prompt, model: Any) -> torch.Tensor:
    inputs = prompt.inputs
    with torch.inference_mode():
        rest = inputs["input_ids"][:, prompt.receipt.cached_tokens :]
        return model(rest, past_key_values=inputs["past_key_values"], use_cache=True).logits[0, -1]


def live_logits(prompt: kvstore.Prompt, model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(prompt.input_ids).logits[0, -1]


def pieces(store: kvstore.OpenStore, names: list[str]) -> list[list[int]]:
    return [list(store.view.renderer.document(TEXTS[name])) for name in names]


def expected(store: kvstore.OpenStore, chosen: list[int]) -> torch.Tensor:
    """After the last token of QUERY: head and first document exact, the others moved, `chosen` places computed anew."""
    renderer, (first, *moved) = store.view.renderer, pieces(store, NAMES)
    return masked_forward.expected(store.model, [*renderer.head_ids, *first], renderer.anchor_ids, moved, chosen, renderer.query(QUERY))[-1]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-4)


def test_blocks_equal_a_forward_pass_under_a_block_mask(store: kvstore.OpenStore) -> None:
    prompt = store.compose(NAMES, QUERY, reuse="blocks")
    found = last_logits(prompt, store.model)
    assert close(found, expected(store, [])) and not close(found, live_logits(prompt, store.model))


def test_moved_artifacts_equal_a_moved_forward_pass(store: kvstore.OpenStore) -> None:
    """Keys rotated to where they are wanted, values as they were: what the model computes at those positions after the anchor."""
    prompt, anchor = store.compose(NAMES, QUERY, reuse="blocks"), list(store.view.renderer.anchor_ids)
    (_, _, third), end = pieces(store, NAMES), prompt.receipt.cached_tokens
    at = end - len(third)
    with torch.inference_mode():
        positions = torch.arange(at - len(anchor), end)[None]
        cache = store.model(torch.tensor([anchor + third]), position_ids=positions, use_cache=True).past_key_values
    for (keys, values), layer in zip(prompt.layers, cache.layers, strict=True):
        torch.testing.assert_close(keys[:, :, at:], layer.keys[:, :, len(anchor) :], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values[:, :, at:], layer.values[:, :, len(anchor) :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["epic", "cacheblend", "query"])
def test_all_tokens_give_the_full_forward_pass_and_none_give_blocks(store: kvstore.OpenStore, mode: Any) -> None:
    blocks = store.compose(NAMES, QUERY, reuse="blocks")
    for everything in (1.0, 500):
        prompt = store.compose(NAMES, QUERY, reuse=mode, recompute=everything)
        assert close(last_logits(prompt, store.model), live_logits(prompt, store.model))
        assert [d.recomputed for d in prompt.receipt.documents] == [0, 0, *(d.tokens for d in prompt.receipt.documents[2:])]
    for nothing in (0, 0.0):
        prompt = store.compose(NAMES, QUERY, reuse=mode, recompute=nothing)
        assert all(torch.equal(a, b) for one, other in zip(prompt.layers, blocks.layers, strict=True) for a, b in zip(one, other, strict=True))
        assert [d.action for d in prompt.receipt.documents] == ["reused", "reused", "moved", "moved"]


def test_epic_computes_the_first_tokens_of_moved_documents_alone(store: kvstore.OpenStore) -> None:
    prompt, (first, second, _) = store.compose(NAMES, QUERY, reuse="epic", recompute=5), pieces(store, NAMES)
    starts = [1 + len(first), 1 + len(first) + len(second)]
    assert close(last_logits(prompt, store.model), expected(store, [s + i for s in starts for i in range(5)]))
    exact = store.compose(NAMES, QUERY)
    for one, other in zip(prompt.layers, exact.layers, strict=True):  # head and the first document are as stored
        assert torch.equal(one[0][:, :, : starts[0]], other[0]) and torch.equal(one[1][:, :, : starts[0]], other[1])


def scene(store: kvstore.OpenStore) -> tuple[LiveScene, list[int]]:
    """NAMES side by side, and all ids of the prompt with its question."""
    prompt, (first, second, third) = store.compose(NAMES, QUERY, reuse="blocks"), pieces(store, NAMES)
    a, b, ids = 1 + len(first), 1 + len(first) + len(second), prompt.input_ids[0].tolist()
    end = b + len(third)
    layers = [(keys.clone(), values.clone()) for keys, values in prompt.layers]
    moved, absent = (range(a, b), range(b, end)), torch.empty(0, dtype=torch.long)
    return LiveScene(Recomputer(store.model), torch.tensor(ids[:end]), layers, moved, absent, tuple(ids[end:]), end), ids


def test_cacheblend_takes_the_keys_that_differ_most_at_its_check_layer(store: kvstore.OpenStore) -> None:
    """All tokens pass the layers before it, so there the fresh keys are those of the full forward pass."""
    seen, ids = scene(store)
    with torch.inference_mode():
        full = store.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    off = (full[1].keys[0, :, : seen.at] - seen.kv[1][0][0]).square().sum((0, 2))
    off[: seen.moved[0].start] = 0
    np.testing.assert_allclose(seen.deviation(1), off, atol=1e-3)
    chosen = off.topk(11).indices.sort().values.tolist()
    prompt = store.compose(NAMES, QUERY, reuse="cacheblend", recompute=0.15)  # of 71 moved tokens
    assert sum(d.recomputed for d in prompt.receipt.documents) == 11
    torch.testing.assert_close(prompt.layers[0][1][0], full[0].values[0, :, : seen.at], atol=1e-4, rtol=1e-4)  # the layer before is all fresh
    deep = (prompt.layers[4][1][0] - seen.kv[4][1][0]).abs().amax((0, 2))
    assert (deep > 0).nonzero()[:, 0].tolist() == chosen  # later ones at the chosen tokens alone


def test_the_question_chooses_what_it_attends_to(store: kvstore.OpenStore) -> None:
    seen, ids = scene(store)
    store.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            cache = dynamic_cache(store.model.config, seen.kv)
            weights = store.model(torch.tensor([seen.question]), past_key_values=cache, use_cache=True, output_attentions=True).attentions
    finally:
        store.model.set_attn_implementation("sdpa")
    mass = sum(w[0, :, :, : seen.at].sum((0, 1)) for w in weights)
    np.testing.assert_allclose(seen.mass(), mass, rtol=1e-3, atol=1e-4)
    prompt = store.compose(NAMES, QUERY, reuse="query", recompute=0.15)
    first = seen.moved[0].start
    chosen = (mass[first:].topk(11).indices + first).sort().values.tolist()
    assert close(last_logits(prompt, store.model), expected(store, chosen))
    assert len(ids) == seen.at + len(seen.question)


def test_the_model_stays_as_it_is_while_the_question_is_observed(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads may be generating with it."""
    seen, during = scene(store)[0], []

    def watching(model: Any, take: Any) -> Any:
        return observing(model, lambda *given: (during.append([c._attn_implementation_internal for c in configs(store.model)]), take(*given)))

    monkeypatch.setattr("kvstore.reuse.scene.observing", watching)
    before = [c._attn_implementation_internal for c in configs(store.model)]
    seen.mass()
    assert len(during) >= store.model.config.num_hidden_layers and all(names == before == ["sdpa"] for names in during)
    twin = twin_of(store.model)
    assert all(a is b for a, b in zip(twin.parameters(), store.model.parameters(), strict=True)) and twin.config is not store.model.config


def test_more_tokens_come_closer_to_the_full_prompt(store: kvstore.OpenStore) -> None:
    live = live_logits(store.compose(NAMES, QUERY), store.model)

    def off(share: float) -> float:
        return float((last_logits(store.compose(NAMES, QUERY, reuse="query", recompute=share), store.model) - live).norm())

    assert off(0.0) > 2 * off(0.5) > 100 * off(1.0)


def test_receipts_say_what_was_computed_anew(store: kvstore.OpenStore) -> None:
    receipt = store.compose(NAMES, QUERY, reuse="epic", tier="fine").receipt
    assert [(d.action, d.context, d.recomputed) for d in receipt.documents] == [
        ("reused", "same prefix", 0),
        ("reused", "same prefix", 0),
        ("recomputed", "approximate", 16),
        ("recomputed", "approximate", 16),
    ]
    assert {d.fidelity for d in receipt.documents} == {"fine"} and not receipt.exact  # fidelity is the stored tokens'
    assert (receipt.reuse, receipt.recompute) == ("epic", 16)
    assert "40 tokens recomputed (stored alone, moved to position 40, 16 tokens computed anew in place); approximate, fine" in str(receipt)
    assert store.compose(NAMES, QUERY).receipt.recompute is None


@pytest.mark.parametrize("mode", ["epic", "cacheblend", "query"])
def test_what_is_not_stored_is_computed_among_the_others(store: kvstore.OpenStore, mode: Any) -> None:
    prompt = store.compose(["lantern.md", NEW, "tower.md", Document("Nobody was here.", "end.md")], QUERY, reuse=mode, recompute=1.0)
    said = [(d.action, d.context, d.recomputed) for d in prompt.receipt.documents[2:]]
    assert said == [("prefilled", "same prefix", 0), ("recomputed", "approximate", 40), ("prefilled", "approximate", 0)]
    assert prompt.receipt.documents[2].why.endswith("computed in place")
    assert prompt.receipt.cached_tokens == sum(d.tokens for d in prompt.receipt.documents[:-1])  # the last is left to the first forward pass
    assert close(last_logits(prompt, store.model), live_logits(prompt, store.model))
    some = store.compose(["lantern.md", NEW, "tower.md"], QUERY, reuse=mode, recompute=4)
    assert torch.isfinite(last_logits(some, store.model)).all() and some.receipt.documents[3].recomputed == 4


def test_a_prompt_that_is_stored_as_it_stands_is_left_alone(store: kvstore.OpenStore) -> None:
    exact = store.compose(["tower.md"], QUERY, reuse="cacheblend")
    assert exact.receipt.exact and [d.action for d in exact.receipt.documents] == ["reused", "reused"]


def test_wrong_modes_and_budgets_are_refused_by_name(store: kvstore.OpenStore) -> None:
    with pytest.raises(InputError, match="unknown reuse mode 'blend'.*choose prefix, blocks, epic, cacheblend or query"):
        store.compose(NAMES, QUERY, reuse="blend")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reuse='blocks' computes nothing anew"):
        store.compose(NAMES, QUERY, reuse="blocks", recompute=4)
    with pytest.raises(InputError, match="reuse='epic': recompute is 1.5"):
        store.compose(NAMES, QUERY, reuse="epic", recompute=1.5)


def test_attention_that_takes_no_mask_of_ours_is_refused(store: kvstore.OpenStore) -> None:
    AttentionInterface.register("somebodys", AttentionInterface()["sdpa"])
    before = [(config, config._attn_implementation_internal) for config in configs(store.model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = "somebodys"
        with pytest.raises(IncompatibleError, match="attention somebodys of LlamaForCausalLM"):
            store.compose(NAMES, QUERY, reuse="epic")
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def test_prompts_with_recomputed_tokens_share_nothing_with_others(store: kvstore.OpenStore, source: ModelSource) -> None:
    """Device caches hand out tensors of earlier prompts: those that were written to must not be among them."""
    hot = kvstore.open(store.path, source.model, source.tokenizer, host_cache=1 << 26, device_cache=1 << 26)
    before = last_logits(hot.compose(NAMES, QUERY, reuse="blocks"), source.model)
    hot.compose(NAMES, QUERY, reuse="epic", recompute=1.0)
    assert torch.equal(before, last_logits(hot.compose(NAMES, QUERY, reuse="blocks"), source.model))


def test_inference_mode_of_the_caller(store: kvstore.OpenStore) -> None:
    with torch.inference_mode():
        prompt = store.compose(NAMES, QUERY, reuse="cacheblend", recompute=0.5)
    assert not prompt.layers[0][0].is_inference() and torch.isfinite(last_logits(prompt, store.model)).all()


@pytest.mark.parametrize("mode", ["blocks", "epic", "cacheblend", "query"])
def test_models_with_a_recurrent_state_take_prefixes_only(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    state = (StateTensor(0, "recurrent0", (2, 3), "float32"),)
    composer = store._composer
    monkeypatch.setattr(composer.view, "layout", msgspec.structs.replace(composer.view.layout, state=state))
    with pytest.raises(IncompatibleError, match=f"reuse='{mode}': this model keeps a recurrent state"):
        store.compose(NAMES, QUERY, reuse=mode)
