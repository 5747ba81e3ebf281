"""Layers of a cache whose keys and values are still on their way: whoever asks for them waits for their own group alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from kvstore.device.ready import Pending
from kvstore.families.assemble import KeysValues, dynamic_cache
from kvstore.families.slots import kv_slots


def _wait(layer: Any) -> None:
    """Follow the layer's group; from then on it is a plain layer of the class that it stands for."""
    layer.pending.follow(layer.index)
    del layer.pending, layer.index
    layer.__class__ = layer.stands_for


def _waiting(name: str) -> property:
    """The attribute `name` of a waiting layer."""

    def get(layer: Any) -> Tensor | None:
        _wait(layer)
        return layer.__dict__.get(name)

    def put(layer: Any, value: Tensor | None) -> None:
        layer.__dict__[name] = value

    return property(get, put)


def _copied(layer: Any, memo: dict[int, Any]) -> Any:
    """A copy of the values needs them."""
    _wait(layer)
    return copy.deepcopy(layer, memo)


class WaitingLayer(DynamicLayer):
    """A DynamicLayer of which the first look at `keys` or `values` follows their group. Shallow copies look for themselves."""

    stands_for = DynamicLayer
    keys, values, __deepcopy__ = _waiting("keys"), _waiting("values"), _copied


class WaitingWindow(DynamicSlidingWindowLayer):
    """The same of a layer that keeps a window alone."""

    stands_for = DynamicSlidingWindowLayer
    keys, values, __deepcopy__ = _waiting("keys"), _waiting("values"), _copied


KINDS: dict[type, type] = {kind.stands_for: kind for kind in (WaitingLayer, WaitingWindow)}


def waiting_cache(config: Any, layers: Sequence[KeysValues], states: Sequence[Any] = ()) -> Cache:
    """`families.assemble.dynamic_cache`, at once: where `layers` are on their way, each waits for itself at its first use.

    Other kinds of layers cannot wait: a cache with any of them is there whole when this returns.
    """
    if not isinstance(layers, Pending):
        return dynamic_cache(config, layers, states)
    cache = dynamic_cache(config, layers.tensors, states)
    slots = kv_slots(cache)
    if any(type(cache.layers[slot]) not in KINDS for slot in slots):
        return dynamic_cache(config, tuple(layers), states)
    for index, slot in enumerate(slots):
        layer = cache.layers[slot]
        layer.__class__ = KINDS[type(layer)]
        layer.pending, layer.index = layers, index
    return cache
