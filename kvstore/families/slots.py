"""Which layers of a model's cache hold keys and values, and how much of them each keeps.

Stored layers are these, in order: a layer that borrows another's keys and values, or keeps a recurrent state alone, has none to store.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvstore.errors import IncompatibleError

ATTENDING = (DynamicLayer, DynamicSlidingWindowLayer)  # exactly these classes: a subclass keeps more than we would store


def kv_slots(cache: Cache) -> list[int]:
    """Indices in `cache.layers` of the layers that have keys and values, in order: the stored layers."""
    return [index for index, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)]


def kv_layers(cache: Cache) -> list[Any]:
    """The cache layers that have keys and values, in order."""
    return [cache.layers[index] for index in kv_slots(cache)]


def require_slots(cache: Cache, stored: int) -> list[int]:
    """`kv_slots`, which must be `stored` many. Raises IncompatibleError."""
    slots = kv_slots(cache)
    if len(slots) != stored:
        raise IncompatibleError(f"the model caches {len(slots)} layers, got keys and values of {stored}")
    return slots


def window_of(layer: Any) -> int | None:
    """Tokens that a sliding or chunked layer looks back over, its own among them; None where it keeps them all."""
    return int(layer.sliding_window) if getattr(layer, "is_sliding", False) else None


def slides(config: Any) -> bool:
    """Whether a model of this config has layers that keep a window alone."""
    return any(window_of(layer) is not None for layer in kv_layers(DynamicCache(config=config)))
