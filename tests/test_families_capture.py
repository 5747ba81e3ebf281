"""Prefill: keys before RoPE and values, at the bits that the live cache has."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import dynamic_cache
from kvstore.families.capture import prefill
from kvstore.families.hooks import watched
from kvstore.families.measure import require_layout
from kvstore.families.rope import rotate
from kvstore.manifest import Layout

DTYPES = (torch.float32, torch.bfloat16)
IDS, REST = list(range(10, 50)), list(range(60, 72))
Layers = list[tuple[torch.Tensor, torch.Tensor]]


def rotated(layers: Layers, layout: Layout, start: int = 0) -> Layers:
    """[1, H, T, D] as the model caches it at positions from `start`."""
    made = []
    for (k, v), rope in zip(layers, layout.rope_of, strict=True):
        at = torch.arange(start, start + k.shape[-2])
        made.append(((k if rope is None else rotate(k, at, layout.ropes[rope]))[None], v[None]))
    return made


def live(model: nn.Module, ids: list[int], start: int = 0) -> Any:
    cache = DynamicCache(config=model.config)
    run(model, ids, cache, start)
    return cache


def run(model: nn.Module, ids: list[int], cache: Any, start: int) -> torch.Tensor:
    at = torch.arange(start, start + len(ids))[None]
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=cache, position_ids=at, use_cache=True).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.SUPPORTED)
def test_captured_keys_rotate_to_the_cached_ones_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, layout = tiny.measured(name, dtype)
    layers, cache = prefill(model, layout, IDS)
    other = live(model, IDS)
    for (k, v), mine, theirs in zip(rotated(layers, layout), cache.layers, other.layers, strict=True):
        assert k.dtype == v.dtype == dtype
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(k, theirs.keys)
        assert torch.equal(v, theirs.values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.SUPPORTED)
def test_a_reloaded_cache_continues_with_the_live_ones_logits(name: str, dtype: torch.dtype) -> None:
    model, layout = tiny.measured(name, dtype)
    layers, _ = prefill(model, layout, IDS)
    again = dynamic_cache(model.config, rotated(layers, layout))
    expected = run(model, REST, live(model, IDS), len(IDS))
    assert torch.equal(run(model, REST, again, len(IDS)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.SUPPORTED)
def test_moved_keys_are_the_models_own_at_an_offset(name: str, dtype: torch.dtype) -> None:
    """Layer 0 bit for bit; deeper ones as far as the model's own rounding allows."""
    model, layout = tiny.measured(name, dtype)
    moved = rotated(prefill(model, layout, IDS)[0], layout, start=300)
    theirs = live(model, IDS, start=300).layers
    assert torch.equal(moved[0][0], theirs[0].keys)
    assert torch.equal(moved[0][1], theirs[0].values)
    if dtype == torch.float32:
        for (k, v), layer in zip(moved, theirs, strict=True):
            assert torch.allclose(k, layer.keys, atol=1e-4, rtol=1e-4)
            assert torch.allclose(v, layer.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-yarn", "phi", "glm4", "smollm3"])
def test_positions_continue_after_the_past_which_is_left_alone(name: str) -> None:
    model, layout = tiny.measured(name, torch.bfloat16)
    first, past = prefill(model, layout, IDS)
    kept = [(x.keys.clone(), x.values.clone()) for x in past.layers]
    second, cache = prefill(model, layout, REST, past)
    assert cache.get_seq_length() == len(IDS) + len(REST)
    assert past.get_seq_length() == len(IDS)
    assert all(torch.equal(x.keys, k) and torch.equal(x.values, v) for x, (k, v) in zip(past.layers, kept, strict=True))
    for (a, av), (b, bv), layer in zip(rotated(first, layout), rotated(second, layout, len(IDS)), cache.layers, strict=True):
        assert torch.equal(torch.cat([a, b], 2), layer.keys)
        assert torch.equal(torch.cat([av, bv], 2), layer.values)


def test_one_token_is_enough() -> None:
    model, layout = tiny.measured("llama", torch.bfloat16)
    for past in (None, prefill(model, layout, IDS)[1]):
        layers, cache = prefill(model, layout, [77], past)
        start = 0 if past is None else len(IDS)
        assert layers[2][0].shape == (2, 1, 16)
        assert torch.equal(rotated(layers, layout, start)[2][0], cache.layers[2].keys[:, :, -1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_odd_model_of_ones_own_is_captured(dtype: torch.dtype) -> None:
    model = tiny.odd_model(tiny.OddAttention, dtype)
    layout = require_layout(model)
    layers, cache = prefill(model, layout, IDS)
    assert all(torch.equal(k, x.keys) for (k, _), x in zip(rotated(layers, layout), cache.layers, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_keys_that_cannot_be_seen_are_computed_back(dtype: torch.dtype, limit: float) -> None:
    model = tiny.odd_model(tiny.Inline, dtype)
    layout = require_layout(model)
    assert layout.capture == "unrotated"
    layers, cache = prefill(model, layout, IDS)
    for (k, v), layer in zip(rotated(layers, layout), cache.layers, strict=True):
        assert k.dtype == dtype
        assert float((k.float() - layer.keys.float()).norm() / layer.keys.float().norm()) < limit
        assert torch.equal(v, layer.values)


def test_the_vocabulary_is_not_projected_and_nothing_has_a_gradient() -> None:
    model = tiny.supported("llama")
    layout = require_layout(model)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the LM head ran"))
    layers, cache = prefill(model, layout, IDS)
    assert not any(t.requires_grad for pair in layers for t in pair)
    assert not any(x.keys.requires_grad or x.keys.is_inference() for x in cache.layers)


def test_dropout_is_off_and_training_mode_returns() -> None:
    model = tiny.make("llama", {"attention_dropout": 0.9}).train()
    layout = tiny.measured("llama")[1]
    expected = prefill(*tiny.measured("llama"), IDS)[0]
    got = prefill(model, layout, IDS)[0]
    assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_a_slice_of_fused_projections_does_not_keep_them_alive(name: str) -> None:
    model, layout = tiny.measured(name)
    for pair in prefill(model, layout, IDS)[0]:
        for tensor in pair:
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_functions_are_put_back_after_success_and_after_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = tiny.measured("llama")
    before = dict(vars(modeling_llama))
    prefill(model, layout, IDS)
    assert vars(modeling_llama) == before
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prefill(model, layout, IDS)
    assert vars(modeling_llama) == before


def test_prefills_side_by_side_do_not_disturb_each_other() -> None:
    """Another model of the same class runs all the while, and two prefills run at once."""
    model, layout = tiny.measured("llama", torch.bfloat16)
    other, stop, functions = tiny.supported("llama", torch.bfloat16), threading.Event(), dict(vars(modeling_llama))
    expected = prefill(model, layout, IDS)[0]

    def noise() -> None:
        while not stop.is_set():
            live(other, IDS)

    def same() -> bool:
        runs = [prefill(model, layout, IDS)[0] for _ in range(10)]
        return all(torch.equal(a, b) for run in runs for x, y in zip(run, expected, strict=True) for a, b in zip(x, y, strict=True))

    with ThreadPoolExecutor(3) as pool:
        background = pool.submit(noise)
        results = [pool.submit(same) for _ in range(2)]
        wait(results)
        stop.set()
    assert background.exception() is None
    assert all(result.result() for result in results)
    assert vars(modeling_llama) == functions


def test_only_the_watching_threads_tensors_are_seen() -> None:
    model, _ = tiny.measured("llama")
    q = cos = torch.ones(1, 2, 4, 16)
    seen: list[int] = []
    cache = DynamicCache(config=model.config)

    def call() -> None:
        modeling_llama.apply_rotary_pos_emb(q, q, cos[:, 0], cos[:, 0])

    with watched(model, cache, lambda layer, keys, values, tensors: seen.append(len(tensors))):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        cache.update(q, q, 0)
        call()
        cache.update(q, q, 1)
    assert seen == [0, 4]
    assert "update" not in vars(cache)


def test_keys_that_do_not_fit_the_layout_are_refused() -> None:
    model, _ = tiny.measured("llama")
    with pytest.raises(IncompatibleError, match="layer 0: none of"):
        prefill(model, tiny.measured("llama-linear")[1], IDS)
    assert "apply_rotary_pos_emb" in vars(modeling_llama)


def test_no_ids_and_foreign_caches_are_refused() -> None:
    model, layout = tiny.measured("llama")
    with pytest.raises(InputError, match="no token ids"):
        prefill(model, layout, [])
    with pytest.raises(InputError, match="StaticLayer"):
        prefill(model, layout, IDS, StaticCache(config=model.config, max_cache_len=8))
