"""Every family and every use: stored, reloaded, continued, cut, batched, static, moved logits equal live ones, or the use is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)
from torch import nn
from transformers import DynamicCache

from kvstore import checkup, prompt
from kvstore.checkup import CHECKS, PREFIX, SUFFIX, Check, check_up, probe_tokens, text_ids, unfilled
from kvstore.errors import IncompatibleError, InputError
from kvstore.families import assemble
from kvstore.families.assemble import dynamic_cache, static_slots
from kvstore.families.capture import prefill
from kvstore.families.latent import cached, fold, to_cache, unfold
from kvstore.families.masking import mask_dropped
from kvstore.families.measure import inspect_model, require_layout
from kvstore.families.refuse import config_problems, context_tokens
from kvstore.families.slots import kv_slots
from kvstore.manifest import Layout

LIVE = {"store and reload": "exact", "continue": "exact", "cut": "rounding", "batch": "rounding", "static cache": "exact", "move": "rounding"}
STATE = {"cut": "no whole segment", "batch": "a model with a recurrent state cannot have", "move": "another place"}
# products of complex numbers round otherwise than ours: bit for bit in bfloat16, not in float32
ROUNDED = {"deepseek_v2": ("store and reload", "continue", "static cache")}
ALL = [*tiny.SUPPORTED, *tiny.FAMILIES, *tiny.HYBRIDS]
HEAD, DOCUMENT, REST = list(range(10, 34)), list(range(40, 90)), list(range(100, 112))


def tried(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Check]:
    model, layout = tiny.measured(name, dtype)
    return {c.name: c for c in check_up(model, layout, text_ids(model), **more)}


@pytest.mark.parametrize("name", ALL)
def test_the_matrix(name: str) -> None:
    found = tried(name)
    assert found.keys() == CHECKS.keys() == LIVE.keys()
    for use, check in found.items():
        if name in tiny.HYBRIDS and use in STATE:
            assert check.outcome == "refused" and STATE[use] in check.detail
            continue
        assert check.outcome == ("rounding" if use in ROUNDED.get(name, ()) else LIVE[use]), check
        assert check.difference is not None and check.difference < 2e-5


@pytest.mark.parametrize("name", ["gpt_oss", "cohere2", "deepseek_v2"])
def test_in_half_precision_what_is_loaded_is_live_bit_for_bit(name: str) -> None:
    found = tried(name, torch.bfloat16)
    assert {found[use].outcome for use in ("store and reload", "continue", "static cache")} == {"exact"}
    assert all(check.ok or check.outcome == "refused" for check in found.values()), found


def test_refused_models_say_why() -> None:
    found = inspect_model(tiny.refused("llama4"))
    assert found.layout is None and "chunked_attention attends within chunks that begin at fixed places" in found.problems[0]


@pytest.mark.parametrize(("name", "codec"), [("gemma3", "scalar"), ("deepseek_v3", "raw"), ("deepseek_v3", "scalar"), ("deepseek_v3", "cachegen")])
def test_every_codec_takes_them(name: str, codec: str) -> None:
    """A coarse tier is off by its own error and no more: latents put together wrongly would be off by their own size."""
    found = tried(name, codec=codec)["store and reload"]
    assert found.difference is not None and (found.outcome == "exact" if codec == "raw" else 0 < found.difference < 0.3)


# the checks themselves can fail


def test_a_window_counted_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the obvious constructor does: it counts the tokens that the window kept as all there were."""

    def obvious(config: Any, layers: Any, states: Any = ()) -> Any:
        cache = dynamic_cache(config, layers)
        for layer in cache.layers:
            layer.cumulative_length = layer.keys.shape[-2]
        return cache

    monkeypatch.setattr(checkup, "dynamic_cache", obvious)
    assert tried("mistral-window")["continue"].outcome == "wrong"


def test_padding_inside_a_window_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "slides", lambda config: False)
    assert tried("gemma3")["batch"].outcome == "wrong"
    assert tried("llama")["batch"].ok


def test_a_static_window_filled_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "_count", lambda layer, length: None)
    assert tried("mistral-window")["static cache"].outcome == "wrong"


def test_a_wrong_rotation_is_seen() -> None:
    model, layout = tiny.measured("deepseek_v3")
    slow = msgspec.structs.replace(layout.ropes[0], inv_freq=(layout.ropes[0].frequencies() / 2).tobytes().hex())
    with pytest.raises(IncompatibleError, match="becomes the cached keys when rotated"):
        check_up(model, msgspec.structs.replace(layout, ropes=(slow,)), text_ids(model))
    found = {c.name: c for c in check_up(model, msgspec.structs.replace(layout, capture="unrotated", ropes=(slow,)), text_ids(model))}
    assert found["store and reload"].ok and found["move"].outcome == "wrong"  # turned and turned back: only a move shows it


def test_a_probe_fills_windows_that_are_not_too_wide() -> None:
    model = tiny.measured("mistral-window")[0]
    assert probe_tokens(model) == PREFIX + SUFFIX and unfilled(model) == []
    wide = tiny.make("mistral", {"sliding_window": 100})
    assert probe_tokens(wide) == 100 + PREFIX // 2 + SUFFIX and unfilled(wide) == []
    wider = tiny.make("mistral", {"sliding_window": 4096})
    assert probe_tokens(wider) == PREFIX + SUFFIX and unfilled(wider) == [4096]
    with pytest.raises(InputError, match="87 tokens to probe with, 88 are needed"):
        check_up(model, tiny.measured("mistral-window")[1], [1] * 87)


# windows


def test_sliding_layers_are_stored_whole_and_windowed_at_load() -> None:
    model, layout = tiny.measured("gemma3")
    layers, live = prefill(model, layout, DOCUMENT)
    assert {k.shape[-2] for k, _ in layers} == {len(DOCUMENT)}
    whole = cached(layout, layers, 0)
    loaded = dynamic_cache(model.config, whole)
    assert [x.keys.shape[-2] for x in loaded.layers] == [tiny.WINDOW - 1, tiny.WINDOW - 1, len(DOCUMENT)]
    for mine, theirs, (k, v) in zip(loaded.layers, live.layers, whole, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert int(mine.get_seq_length()) == int(theirs.get_seq_length()) == len(DOCUMENT)
        assert mine.keys.data_ptr() >= k.data_ptr() and mine.keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()  # no copy
        assert v.shape[-2] == len(DOCUMENT)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3n", "gpt_oss"])
def test_a_chain_of_segments_is_the_live_chain_bit_for_bit(name: str) -> None:
    """The document is longer than the window, and prefilled after a head that is longer too."""
    model, layout = tiny.measured(name)
    head, past = prefill(model, layout, HEAD)
    document, live = prefill(model, layout, DOCUMENT, past)
    parts = (cached(layout, head, 0), cached(layout, document, len(HEAD)))
    joined = [tuple(torch.cat(pair, -2) for pair in zip(a, b, strict=True)) for a, b in zip(*parts, strict=True)]
    assert torch.equal(logits(model, dynamic_cache(model.config, joined)), logits(model, live))


def logits(model: nn.Module, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([REST]), past_key_values=cache, use_cache=True).logits


def test_a_static_window_has_no_slots_to_write_into() -> None:
    model, layout = tiny.measured("mistral-window")
    with pytest.raises(IncompatibleError, match="StaticSlidingWindowLayer, expected StaticLayer"):
        static_slots(model.config, cached(layout, prefill(model, layout, DOCUMENT)[0], 0), 200)


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "gpt_oss"])
def test_dropped_tokens_are_for_full_attention(name: str) -> None:
    model = tiny.supported(name)
    before = model.config._attn_implementation_internal
    with pytest.raises(IncompatibleError, match="uses (softcap|sliding_window|s_aux), which kvstore's attention functions do not know"):
        mask_dropped(model)
    assert model.config._attn_implementation_internal == before


def test_dropped_latents_are_masked_in_every_head() -> None:
    """The mark lies in the latents; each head's keys and values that are expanded from them carry it."""
    model, layout = tiny.supported("deepseek_v3"), tiny.measured("deepseek_v3")[1]
    whole, gone = cached(layout, prefill(model, layout, DOCUMENT)[0], 0), [3, 4, 20]
    mask = torch.ones(1, len(DOCUMENT) + len(REST), dtype=torch.long)
    mask[:, gone] = 0
    places = torch.arange(len(DOCUMENT), mask.shape[1])[None]
    with torch.no_grad():
        wanted = model(torch.tensor([REST]), attention_mask=mask, position_ids=places, past_key_values=dynamic_cache(model.config, whole)).logits
    marked = [(k.clone(), v.clone()) for k, v in whole]
    for keys, _ in marked:
        keys[:, :, gone, : layout.head_dim] = float("nan")  # what is stored as K, of the two halves
    mask_dropped(model)
    found = logits(model, dynamic_cache(model.config, marked))
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(found, logits(model, dynamic_cache(model.config, whole)), atol=1e-2)


# shared layers


def test_what_a_layer_borrows_is_stored_once() -> None:
    model, layout = tiny.measured("gemma3n")
    cache = DynamicCache(config=model.config)
    assert len(cache.layers) == 6 and kv_slots(cache) == [0, 1, 2, 3] and layout.layers == 4
    layers, live = prefill(model, layout, DOCUMENT)
    assert len(layers) == 4
    assert torch.equal(logits(model, dynamic_cache(model.config, cached(layout, layers, 0))), logits(model, live))


# latents


def test_latents_are_folded_into_halves_and_back() -> None:
    model, layout = tiny.measured("deepseek_v2")
    assert (layout.latent, layout.rotated, layout.kv_heads, layout.head_dim, layout.channels) == ((24, 8), "values", 1, 16, 16)
    assert (layout.widths, layout.turned, layout.ropes[0].layout) == ((24, 8), 1, "interleaved")
    keys, values = torch.randn(1, 5, 24), torch.randn(1, 5, 8)
    first, second = fold(layout, keys, values)
    assert first.shape == second.shape == (1, 5, 16)
    assert torch.equal(first, keys[..., :16]) and torch.equal(second, torch.cat((keys[..., 16:], values), -1))
    assert all(torch.equal(a, b) for a, b in zip(unfold(layout, first, second), (keys, values), strict=True))
    layers, live = prefill(model, layout, DOCUMENT)
    assert {t.shape for pair in layers for t in pair} == {(1, len(DOCUMENT), 16)}
    assert [(x.keys.shape[-1], x.values.shape[-1]) for x in live.layers] == [(24, 8)] * 3


def test_gradients_pass_through_the_fold() -> None:
    layout = tiny.measured("deepseek_v3")[1]
    halves = [torch.randn(1, 5, 16, requires_grad=True) for _ in range(2)]
    keys, values = to_cache(layout, 0, (halves[0], halves[1]), torch.arange(5))
    (keys.sum() + (values * torch.arange(8.0)).sum()).backward()
    assert all(h.grad is not None and bool((h.grad != 0).any()) for h in halves)


def test_an_odd_number_of_channels_together_is_refused() -> None:
    fields = {**tiny.MLA, "num_mtp_layers": 0, "kv_lora_rank": 25}
    with pytest.raises(IncompatibleError, match=r"keys are \[1, 25\] and values \[1, 8\]; expected .* an even number of channels together"):
        require_layout(tiny.make("deepseek_v3", fields))


# frequencies that follow the length of the prompt


@pytest.mark.parametrize(("name", "limit"), [("phi3-longrope", 128), ("llama-dynamic", 512)])
def test_one_regime_is_served(name: str, limit: int) -> None:
    model, layout = tiny.measured(name)
    assert (layout.rope_regime, layout.rope_limit) == ("short", limit)
    assert context_tokens(model.config) == limit <= model.config.max_position_embeddings


def test_a_model_that_saw_a_long_prompt_is_measured_as_before() -> None:
    """Dynamic tables are left behind in the model by whatever ran last."""
    model, layout = tiny.supported("llama-dynamic"), tiny.measured("llama-dynamic")[1]
    with torch.no_grad():
        model(torch.arange(600)[None] % tiny.VOCAB)
    assert require_layout(model) == layout


def test_a_limit_that_the_config_does_not_say_is_refused() -> None:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(rope_parameters={"rope_type": "longrope"})
    model.config.get_text_config = lambda decoder: model.config
    (problem,) = config_problems(model)
    assert problem.startswith("rope type longrope depends on the length of the prompt, and the config does not say")


def test_plain_layouts_are_as_they_were() -> None:
    """Nothing of the new kinds enters the files and keys of the others."""
    layout = tiny.measured("llama")[1]
    assert set(msgspec.to_builtins(layout)) == {"layers", "kv_heads", "head_dim", "dtype", "capture", "rope_of", "ropes"}
    assert {"latent", "tensor"}.isdisjoint(layout.identity())
    assert msgspec.convert(msgspec.to_builtins(layout), Layout) == layout
    latent = tiny.measured("deepseek_v3")[1]
    assert msgspec.json.decode(msgspec.json.encode(latent), type=Layout) == latent
    assert latent.identity()["latent"] == [24, 8] and latent.identity()["tensor"] == "values"
