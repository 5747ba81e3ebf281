"""Caches of transformers from tensors, by assignment: nothing is concatenated, nothing copied that need not be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from kvstore.errors import IncompatibleError, InputError
from kvstore.families.slots import ATTENDING, require_slots, window_of
from kvstore.families.states import State, keeps_state, own_state, put_states, shares_state

KeysValues = tuple[Tensor, Tensor]
_STATIC = (StaticLayer, StaticSlidingWindowLayer)


def dynamic_cache(config: Any, layers: Sequence[KeysValues], states: Sequence[State] = ()) -> DynamicCache:
    """A DynamicCache over `layers` of (keys, values), each [batch, kv_heads, T, channels], keys rotated: all T tokens, of sliding layers too.

    The tensors are used as they are (sliding layers: a view of their last tokens). The cache grows by making new ones, so they may be shared
    between caches; `states`, what recurrent layers hold after these tokens, are copied. Raises IncompatibleError where `config` asks for layers
    of a kind that kvstore does not know, for another number of them, or for states that are not given.
    """
    cache = DynamicCache(config=config)
    slots = require_slots(cache, len(layers))
    _require_kinds(cache, ATTENDING, slots)
    _put(cache, layers, states)
    for slot, (keys, values) in zip(slots, layers, strict=True):
        layer = cache.layers[slot]
        _initialize(layer, keys, values)
        layer.keys, layer.values = keys, values
        if (window := window_of(layer)) is not None:  # as the layer itself keeps them: one less than it looks back over
            layer.keys, layer.values = keys[..., -window + 1 :, :], values[..., -window + 1 :, :]
            layer.cumulative_length = keys.shape[-2]
    return cache


def static_cache(config: Any, layers: Sequence[KeysValues], max_length: int, states: Sequence[State] = ()) -> StaticCache:
    """A StaticCache for `max_length` tokens, beginning with `layers` of (keys, values), [batch, kv_heads, T, channels].

    Each tensor is copied once, into the preallocated buffer; `static_slots` spares that too.
    Raises InputError where T > max_length, IncompatibleError as `dynamic_cache` does.
    """
    cache, slots = _allocated(config, layers, max_length, _STATIC)
    _put(cache, layers, states)
    for slot, (keys, values) in zip(slots, layers, strict=True):
        layer = cache.layers[slot]
        kept = min(keys.shape[-2], layer.max_cache_len)
        layer.keys[..., :kept, :].copy_(keys[..., keys.shape[-2] - kept :, :])
        layer.values[..., :kept, :].copy_(values[..., values.shape[-2] - kept :, :])
    return cache


def static_slots(config: Any, like: Sequence[KeysValues], max_length: int) -> tuple[StaticCache, list[KeysValues]]:
    """An allocated StaticCache that counts the T tokens of `like` as present, and per layer the views to write into.

    `like` gives shapes, dtypes and devices only, its content is not read. Views: [batch, kv_heads, T, channels].
    Raises IncompatibleError for sliding layers too, whose buffer holds the window alone, and for recurrent ones, which have a state.
    """
    cache, slots = _allocated(config, like, max_length, _STATIC[:1])
    _put(cache, like, ())
    views = []
    for slot, (keys, _) in zip(slots, like, strict=True):
        layer = cache.layers[slot]
        views.append((layer.keys[..., : keys.shape[-2], :], layer.values[..., : keys.shape[-2], :]))
    return cache, views


def _allocated(config: Any, like: Sequence[KeysValues], max_length: int, kinds: tuple[type, ...]) -> tuple[StaticCache, list[int]]:
    """A StaticCache with buffers that counts the tokens of `like` as present, and the indices of its layers with keys and values."""
    length = max((keys.shape[-2] for keys, _ in like), default=0)
    if length > max_length:
        raise InputError(f"{length} tokens do not fit a cache of {max_length}", remedy="raise max_length")
    cache = StaticCache(config=config, max_cache_len=max_length)
    slots = require_slots(cache, len(like))
    _require_kinds(cache, kinds, slots)
    for slot, (keys, values) in zip(slots, like, strict=True):
        _initialize(cache.layers[slot], keys, values)
        _count(cache.layers[slot], keys.shape[-2])
    return cache, slots


def _count(layer: Any, length: int) -> None:
    """Say how many tokens a static layer holds. Its counter is a tensor, in sliding layers an integer, beside which the tensor counts what lies
    in the buffer; the first releases of transformers 5 look for rows that are not zero, and have an integer alone in sliding layers."""
    if hasattr(layer, "cumulative_length_int"):
        layer.cumulative_length_int = length
        length = min(length, layer.max_cache_len)
    if isinstance(getattr(layer, "cumulative_length", None), Tensor):
        layer.cumulative_length.fill_(length)
    elif hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def share(cache: Cache) -> Cache:
    """Another cache over the same keys and values (recurrent states are copied): continuing the one leaves the other as it is.

    Raises InputError where a layer writes in place (StaticCache) or is of a kind that kvstore does not know.
    """
    for index, layer in enumerate(cache.layers):
        kind = getattr(type(layer), "stands_for", type(layer))  # of a layer that waits for its values: device/layer.py
        if kind not in ATTENDING and not is_empty(layer) and not shares_state(layer):
            raise InputError(f"layer {index} is a {type(layer).__name__}, which cannot be shared", remedy="use a DynamicCache")
    twin = copy.copy(cache)
    twin.layers = [own_state(layer) if keeps_state(layer) else copy.copy(layer) for layer in cache.layers]
    return twin


def is_empty(layer: Any) -> bool:
    """Whether a cache layer stores nothing: it borrows another's keys and values."""
    return type(layer).__name__ == "DummyLayer"


def _initialize(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Taking in no token prepares a layer in every release; `lazy_initialization` has changed its arguments."""
    layer.update(keys[..., :0, :], values[..., :0, :])


def _put(cache: Cache, layers: Sequence[KeysValues], states: Sequence[State]) -> None:
    """Recurrent states into a fresh cache; before the first token there are none."""
    if states or any(keys.shape[-2] for keys, _ in layers):
        put_states(cache, states)


def _require_kinds(cache: Cache, kinds: tuple[type, ...], slots: Sequence[int]) -> None:
    """Raises IncompatibleError naming the first layer with keys and values that is none of `kinds`, or another that stores something."""
    for index, layer in enumerate(cache.layers):
        if type(layer) not in kinds and not keeps_state(layer) and (index in slots or not is_empty(layer)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise IncompatibleError(f"layer {index} of the model's cache is a {type(layer).__name__}, expected {expected}")
