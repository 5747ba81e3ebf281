"""Caches of transformers from tensors, by assignment: nothing is concatenated, nothing copied that need not be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from kvstore.errors import IncompatibleError, InputError

KeysValues = tuple[Tensor, Tensor]


def dynamic_cache(config: Any, layers: Sequence[KeysValues]) -> DynamicCache:
    """A DynamicCache over `layers` of (keys, values), each [batch, kv_heads, T, head_dim], keys rotated.

    The tensors are used as they are. The cache grows by making new ones, so they may be shared between caches.
    Raises IncompatibleError where `config` asks for layers other than full attention, or for another number of them.
    """
    cache = DynamicCache(config=config)
    _check_layers(cache, DynamicLayer, len(layers))
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        _initialize(layer, keys, values)
        layer.keys, layer.values = keys, values
    return cache


def static_cache(config: Any, layers: Sequence[KeysValues], max_length: int) -> StaticCache:
    """A StaticCache for `max_length` tokens, beginning with `layers` of (keys, values), [batch, kv_heads, T, head_dim].

    Each tensor is copied once, into the preallocated buffer; `static_slots` spares that too.
    Raises InputError where T > max_length, IncompatibleError as `dynamic_cache` does.
    """
    cache, slots = static_slots(config, layers, max_length)
    for (keys, values), (key_slot, value_slot) in zip(layers, slots, strict=True):
        key_slot.copy_(keys)
        value_slot.copy_(values)
    return cache


def static_slots(config: Any, like: Sequence[KeysValues], max_length: int) -> tuple[StaticCache, list[KeysValues]]:
    """An allocated StaticCache that counts the T tokens of `like` as present, and per layer the views to write into.

    `like` gives shapes, dtypes and devices only, its content is not read. Views: [batch, kv_heads, T, head_dim].
    """
    length = max((keys.shape[-2] for keys, _ in like), default=0)
    if length > max_length:
        raise InputError(f"{length} tokens do not fit a cache of {max_length}", remedy="raise max_length")
    cache = StaticCache(config=config, max_cache_len=max_length)
    _check_layers(cache, StaticLayer, len(like))
    slots = []
    for layer, (keys, values) in zip(cache.layers, like, strict=True):
        _initialize(layer, keys, values)
        if hasattr(layer, "cumulative_length"):  # the first releases of transformers 5 look for rows that are not zero
            layer.cumulative_length.fill_(keys.shape[-2])
        slots.append((layer.keys[..., : keys.shape[-2], :], layer.values[..., : keys.shape[-2], :]))
    return cache, slots


def share(cache: Cache) -> Cache:
    """Another cache over the same tensors: continuing the one leaves the other as it is.

    Raises InputError where a layer writes in place (StaticCache) or is of a kind that kvstore does not know.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise InputError(f"layer {index} is a {type(layer).__name__}, which cannot be shared", remedy="use a DynamicCache")
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _initialize(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Taking in no token prepares a layer in every release; `lazy_initialization` has changed its arguments."""
    layer.update(keys[..., :0, :], values[..., :0, :])


def _check_layers(cache: Cache, kind: type, count: int) -> None:
    names = [type(layer).__name__ for layer in cache.layers]
    odd = next((i for i, layer in enumerate(cache.layers) if type(layer) is not kind), None)
    if odd is not None:
        raise IncompatibleError(f"layer {odd} of the model's cache is a {names[odd]}, expected {kind.__name__}")
    if len(names) != count:
        raise IncompatibleError(f"the model caches {len(names)} layers, got keys and values of {count}")
