"""Caches by assignment: the same tensors, the same logits, no copies."""

from __future__ import annotations

import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)
from torch import nn

from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import dynamic_cache, share, static_cache, static_slots
from kvstore.families.capture import prefill

IDS, REST = list(range(10, 50)), list(range(60, 72))
Layers = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.measured("llama")[0]


@pytest.fixture
def layers(model: nn.Module) -> Layers:
    """[1, H, T, D] of IDS, rotated."""
    return [(x.keys, x.values) for x in prefill(model, tiny.measured("llama")[1], IDS)[1].layers]


def logits(model: nn.Module, cache: object) -> torch.Tensor:
    at = torch.arange(len(IDS), len(IDS) + len(REST))[None]
    with torch.no_grad():
        return model(torch.tensor([REST]), past_key_values=cache, position_ids=at).logits


def test_dynamic_uses_the_tensors_themselves_and_leaves_them_alone(model: nn.Module, layers: Layers) -> None:
    kept = [(k.clone(), v.clone()) for k, v in layers]
    cache = dynamic_cache(model.config, layers)
    assert cache.get_seq_length() == len(IDS)
    assert all(x.keys is k and x.values is v for x, (k, v) in zip(cache.layers, layers, strict=True))
    expected = logits(model, prefill(*tiny.measured("llama"), IDS)[1])
    assert torch.equal(logits(model, cache), expected)
    assert cache.get_seq_length() == len(IDS) + len(REST)
    assert all(torch.equal(a, b) for x, y in zip(layers, kept, strict=True) for a, b in zip(x, y, strict=True))


def test_static_continues_like_dynamic(model: nn.Module, layers: Layers) -> None:
    cache = static_cache(model.config, layers, len(IDS) + len(REST) + 4)
    assert int(cache.get_seq_length()) == len(IDS)
    assert torch.allclose(logits(model, cache), logits(model, dynamic_cache(model.config, layers)), atol=1e-4)
    assert int(cache.get_seq_length()) == len(IDS) + len(REST)


def test_static_slots_are_views_of_the_cache(model: nn.Module, layers: Layers) -> None:
    cache, slots = static_slots(model.config, layers, 60)
    for (k, v), (into_k, into_v), layer in zip(layers, slots, cache.layers, strict=True):
        assert into_k.shape == k.shape
        into_k.copy_(k)
        into_v.copy_(v)
        assert torch.equal(layer.keys[:, :, : len(IDS)], k)
        assert bool((layer.values[:, :, len(IDS) :] == 0).all())


def test_a_full_static_cache_is_refused(model: nn.Module, layers: Layers) -> None:
    with pytest.raises(InputError, match="40 tokens do not fit a cache of 39"):
        static_cache(model.config, layers, 39)


def test_generating_twice_from_shared_tensors_gives_the_same(model: nn.Module, layers: Layers) -> None:
    cache = dynamic_cache(model.config, layers)
    first, second = (generated(model, share(cache)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, generated(model, None), atol=1e-4)
    assert cache.get_seq_length() == len(IDS)


def generated(model: nn.Module, cache: object) -> torch.Tensor:
    """Logits of six greedy tokens after the whole prompt."""
    ids, more = torch.tensor([IDS + REST]), {} if cache is None else {"past_key_values": cache}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    mask = torch.ones_like(ids)
    return torch.stack(model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options, **more).logits)


def test_share_copies_no_tensor(model: nn.Module, layers: Layers) -> None:
    cache = dynamic_cache(model.config, layers)
    twin = share(cache)
    assert twin is not cache
    assert all(a is not b and a.keys is b.keys for a, b in zip(twin.layers, cache.layers, strict=True))
    twin.crop(-10)
    assert cache.get_seq_length() == len(IDS)


def test_what_writes_in_place_cannot_be_shared(model: nn.Module, layers: Layers) -> None:
    with pytest.raises(InputError, match="layer 0 is a StaticLayer"):
        share(static_cache(model.config, layers, 60))


def test_wrong_layers_are_refused(model: nn.Module, layers: Layers) -> None:
    with pytest.raises(IncompatibleError, match="caches 3 layers, got keys and values of 2"):
        dynamic_cache(model.config, layers[:2])
    hybrid = tiny.supported("qwen3_next").config
    with pytest.raises(IncompatibleError, match="caches 2 layers, got keys and values of 3"):
        dynamic_cache(hybrid, layers)
    window = tiny.supported("mistral-window").config
    with pytest.raises(IncompatibleError, match="layer 0 of the model's cache is a StaticSlidingWindowLayer, expected StaticLayer"):
        static_slots(window, layers, 60)
