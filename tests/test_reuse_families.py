"""Documents side by side, and some of their tokens computed anew, over tiny models of many families: equal to one forward pass under a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvstore.errors import IncompatibleError
from kvstore.families.assemble import dynamic_cache
from kvstore.families.attention import configs
from kvstore.families.capture import forward, prefill
from kvstore.families.latent import cached
from kvstore.families.masking import mask_dropped
from kvstore.families.recompute import Recomputer
from kvstore.families.slots import kv_slots
from kvstore.manifest import Layout
from kvstore.reuse.scene import LiveScene
from tests import masked_forward
from tests.tiny_models import FAMILIES, HYBRIDS, SUPPORTED, Drifting, OddAttention, make, measured, odd_model, one_thread, supported  # noqa: F401

ANCHOR, HEAD = [1], [1, 7, 9]
FIRST, SECOND, THIRD = list(range(20, 38)), list(range(60, 84)), list(range(100, 121))  # longer than a window of 16
QUESTION = [11, 12, 13, 14, 15]
EXACT, MOVED = HEAD + FIRST, [SECOND, THIRD]
DOCUMENTS = HEAD + FIRST + SECOND + THIRD
PLACES = list(range(len(EXACT), len(DOCUMENTS)))
SOME = [21, 22, 30, 44, 45, 47, 59, 65]
NAMES = [*SUPPORTED, *FAMILIES]


def side_by_side(model: nn.Module, layout: Layout) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the prompt's documents as stored ones would stand there: HEAD and FIRST exact, the others moved from after the anchor."""
    pieces = [cached(layout, prefill(model, layout, EXACT)[0], 0)]
    at = len(EXACT)
    for ids in MOVED:
        _, after_anchor = prefill(model, layout, ANCHOR)
        pieces.append(cached(layout, prefill(model, layout, ids, after_anchor)[0], at))
        at += len(ids)
    return [tuple(torch.cat([piece[i][kind] for piece in pieces], -2) for kind in (0, 1)) for i in range(layout.layers)]  # type: ignore[misc]


def recomputed(model: nn.Module, layout: Layout, chosen: list[int]) -> list[tuple[Tensor, Tensor]]:
    layers = side_by_side(model, layout)
    Recomputer(model).run(torch.tensor(DOCUMENTS), torch.tensor(chosen, dtype=torch.long), layers)
    return layers


def asked(model: nn.Module, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([QUESTION]), past_key_values=dynamic_cache(model.config, layers), use_cache=True).logits[0]


def expected(model: nn.Module, chosen: list[int]) -> Tensor:
    return masked_forward.expected(model, EXACT, ANCHOR, MOVED, chosen, QUESTION)


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_chosen_tokens_are_what_a_pass_under_a_mask_computes(name: str) -> None:
    """None of them: documents side by side. All of them: the full forward pass."""
    model, layout = measured(name)
    found = [asked(model, recomputed(model, layout, chosen)) for chosen in ([], SOME, PLACES)]
    assert far(found[0], expected(model, [])) < 2e-4
    assert far(found[1], expected(model, SOME)) < 2e-4
    with torch.no_grad():
        full = model(torch.tensor([DOCUMENTS + QUESTION]), use_cache=False).logits[0, len(DOCUMENTS) :]
    assert far(found[2], full) < 2e-4
    assert min(far(found[0], found[1]), far(found[1], found[2])) > 3e-3  # else the above would show nothing


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "smollm3", "gemma3", "deepseek_v3", "mistral-window"])
def test_a_moved_artifact_is_what_a_forward_pass_at_its_place_computes(name: str) -> None:
    """The anchor just before it, positions that begin elsewhere."""
    model, layout = measured(name)
    layers, at = side_by_side(model, layout), len(EXACT) + len(SECOND)
    cache = DynamicCache(config=model.config)
    forward(model, torch.tensor([ANCHOR + THIRD]), torch.arange(at - len(ANCHOR), at + len(THIRD))[None], cache)
    for pair, slot in zip(layers, kv_slots(cache), strict=True):
        for stored, live in zip(pair, (cache.layers[slot].keys, cache.layers[slot].values), strict=True):
            kept = min(len(THIRD), live.shape[-2])  # sliding layers keep their window
            torch.testing.assert_close(stored[..., -kept:, :], live[..., -kept:, :], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_long_prompts_are_computed_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = measured(name)
    whole = recomputed(model, layout, SOME)
    monkeypatch.setattr("kvstore.families.recompute.ENTRIES", 3 * len(DOCUMENTS))  # three tokens at a time
    for one, other in zip(whole, recomputed(model, layout, SOME), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_pass_that_stops_leaves_its_layer_as_it_was() -> None:
    """What CacheBlend compares: keys of the check layer after the layers below were computed anew, beside the stored ones."""
    model, layout = measured("llama")
    layers = side_by_side(model, layout)
    before = [(keys.clone(), values.clone()) for keys, values in layers]
    keys, values = Recomputer(model).fresh(torch.tensor(DOCUMENTS), torch.tensor(PLACES), layers, 1)
    cache = DynamicCache(config=model.config)
    forward(model, torch.tensor([DOCUMENTS]), torch.arange(len(DOCUMENTS))[None], cache)
    torch.testing.assert_close(keys, cache.layers[1].keys[:, :, PLACES], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values, cache.layers[1].values[:, :, PLACES], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layers[0][1], cache.layers[0].values, atol=1e-4, rtol=1e-4)
    for at in (1, 2):
        assert torch.equal(layers[at][0], before[at][0]) and torch.equal(layers[at][1], before[at][1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_kinds_of_mask(attention: str) -> None:
    model = make(*FAMILIES["gemma3"], attention=attention)
    layout = measured("gemma3")[1]
    assert far(asked(model, recomputed(model, layout, SOME)), expected(model, SOME)) < 2e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropped_tokens_stay_unseen_unless_they_are_computed_anew(attention: str) -> None:
    model, dropped = make(*SUPPORTED["llama"], attention=attention), [4, 22, 30, 31, 50, 59]
    layout = measured("llama")[1]
    mask_dropped(model)
    layers = side_by_side(model, layout)
    for keys, _ in layers:
        keys[:, :, dropped] = torch.nan  # as decoding marks them
    Recomputer(model).run(torch.tensor(DOCUMENTS), torch.tensor(SOME), layers)
    found = asked(model, layers)
    model.set_attn_implementation(attention)
    assert far(found, masked_forward.expected(model, EXACT, ANCHOR, MOVED, SOME, QUESTION, dropped)) < 2e-4
    assert far(found, expected(model, SOME)) > 3e-3


def scene(name: str, masked: bool = False) -> LiveScene:
    model, layout = measured(name)
    at, ends = len(EXACT), len(DOCUMENTS)
    moved = (range(at, at + len(SECOND)), range(at + len(SECOND), ends))
    layers = side_by_side(model, layout)
    return LiveScene(Recomputer(model), torch.tensor(DOCUMENTS), layers, moved, torch.tensor([], dtype=torch.long), tuple(QUESTION), ends, masked)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_the_attention_of_a_question(name: str) -> None:
    model = make(*(SUPPORTED | FAMILIES)[name], attention="eager")
    with torch.no_grad():
        cache = dynamic_cache(model.config, side_by_side(*measured(name)))
        weights = model(torch.tensor([QUESTION]), past_key_values=cache, use_cache=True, output_attentions=True).attentions
    mass = sum(w[0, :, :, : len(DOCUMENTS)].sum((0, 1)) for w in weights)
    np.testing.assert_allclose(scene(name).mass(), mass, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "why"), [("mistral-window", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_attention_that_cannot_be_observed_is_refused(name: str, why: str) -> None:
    with pytest.raises(IncompatibleError, match=f"reuse='query' cannot observe.*uses {why}.*use reuse='epic'"):
        scene(name).mass()
    with pytest.raises(IncompatibleError, match="dropped tokens"):
        scene("llama", masked=True).mass()


def test_a_model_whose_attention_changed_is_tried_again() -> None:
    model = make(*SUPPORTED["llama"])
    tried = Recomputer(model)
    assert tried.current
    model.set_attn_implementation("eager")
    assert not tried.current


@pytest.mark.parametrize("attention", [OddAttention, Drifting])
def test_a_model_that_makes_its_own_mask_is_refused(attention: type[OddAttention]) -> None:
    with pytest.raises(IncompatibleError, match="does not compute chosen tokens as it computes all: layer 1"):
        Recomputer(odd_model(attention))


def test_other_attention_is_refused_by_name() -> None:
    model = make(*SUPPORTED["llama"])
    for config in configs(model):
        config._attn_implementation_internal = "flex_attention"
    with pytest.raises(IncompatibleError, match="attention flex_attention of LlamaForCausalLM cannot compute chosen tokens anew"):
        Recomputer(model)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_recurrent_state_is_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match="recurrent state"):
        Recomputer(supported(name))
