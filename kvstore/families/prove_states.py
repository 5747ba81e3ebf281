"""Proof that a model goes on from copies of its keys, values and recurrent states as from its own cache, and from that as in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvstore.families.assemble import dynamic_cache
from kvstore.families.capture import forward
from kvstore.families.probe import probe_ids
from kvstore.families.refuse import new_cache
from kvstore.families.rope import residual, tolerance
from kvstore.families.slots import kv_layers, kv_slots
from kvstore.families.states import describe, keeps_state, take_states
from kvstore.manifest import StateTensor

Found = tuple[tuple[StateTensor, ...], list[str]]


def state_of(model: nn.Module) -> Found:
    """The recurrent tensors that `model` keeps, and what stands against storing them. ((), []) where it has no recurrent layer.

    Passes over the probe's first token, its first half, its second half after the model's own cache and after a copy, and the whole probe.
    """
    ids = probe_ids(model)
    half, live = len(ids) // 2, new_cache(model)
    if not any(keeps_state(layer) for layer in live.layers):
        return (), []
    _run(model, ids[:half], live)
    found, alone = describe(take_states(live)), describe(take_states(_run(model, ids[:1], new_cache(model))))
    if not found or found != alone:
        return (), [f"the recurrent state is {_about(alone)} after one token and {_about(found)} after {half}; expected tensors of one shape"]
    copied = dynamic_cache(model.config, [(x.keys, x.values) for x in kv_layers(live)], take_states(live))
    for cache in (live, copied):
        _run(model, ids[half:-1], cache)
        _run(model, ids[-1:], cache)  # one token alone takes another path through recurrent layers
    return found, [*_copy_problem(live, copied, len(ids)), *_piece_problem(live, _run(model, ids, new_cache(model)), half)]


def _copy_problem(live: Cache, copied: Cache, tokens: int) -> Iterator[str]:
    worst, limit = max(residual(b, a) for a, b in zip(_tensors(live), _tensors(copied), strict=True)), tolerance(_dtype(live), tokens)
    if not worst <= limit:
        yield f"after a copy of its cache the model goes on differently (by {worst:.2g}); expected at most {limit:.2g}"


def _piece_problem(pieces: Cache, whole: Cache, first: int) -> Iterator[str]:
    """Some hybrids of transformers go on from their own cache otherwise than in one pass: such a prefix would answer another question.

    Recurrent layers compute pieces in another order, so half of the digits must agree, in the layer that agrees best of those behind a state.
    """
    begun = next(i for i, layer in enumerate(pieces.layers) if keeps_state(layer))
    behind = [i for i in kv_slots(pieces) if i > begun]
    apart = [residual(pieces.layers[i].keys[..., first:, :], whole.layers[i].keys[..., first:, :]) for i in behind]
    limit = torch.finfo(_dtype(pieces)).eps ** 0.5
    if apart and not min(apart) <= limit:
        yield f"after its own cache the model goes on otherwise than in one pass (by {min(apart):.2g}); expected at most {limit:.2g}"


def _dtype(cache: Cache) -> torch.dtype:
    found: torch.dtype = kv_layers(cache)[0].keys.dtype
    return found


def _run(model: nn.Module, ids: tuple[int, ...], cache: Cache) -> Cache:
    start = int(cache.get_seq_length())
    forward(model, torch.tensor(ids)[None], torch.arange(start, start + len(ids))[None], cache)
    return cache


def _tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in kv_layers(cache):
        yield from (layer.keys, layer.values)
    yield from (s.value for s in take_states(cache))


def _about(state: tuple[StateTensor, ...]) -> str:
    return ", ".join(f"layer {t.layer} {t.name} {list(t.shape)}" for t in state[:3]) or "nothing"
