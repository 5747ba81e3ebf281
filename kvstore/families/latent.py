"""Between what a model caches and what is stored: two arrays of equal width, before RoPE, and back.

Latent attention (MLA) caches one narrow vector a token as keys and the part of the keys that RoPE turns as values, of different widths. These are
laid end to end and cut into two equal halves, so that the stored array stays [layer, kv, token, channel]. Elsewhere nothing is folded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.families.rope import Angles, rotate
from kvstore.manifest import Layout, RopeRecord

KeysValues = tuple[Tensor, Tensor]


def fold(layout: Layout, keys: Tensor, values: Tensor) -> KeysValues:
    """Cached keys [..., T, key width] and values [..., T, value width] as the stored halves, [..., T, head_dim] each. Differentiable."""
    if layout.latent is None:
        return keys, values
    whole = torch.cat((keys, values), -1)
    return whole[..., : layout.head_dim], whole[..., layout.head_dim :]


def unfold(layout: Layout, first: Tensor, second: Tensor) -> KeysValues:
    """The inverse of `fold`: [..., T, head_dim] each to keys [..., T, key width] and values [..., T, value width]."""
    if layout.latent is None:
        return first, second
    whole, width = torch.cat((first, second), -1), layout.latent[0]
    return whole[..., :width], whole[..., width:]


def record_of(layout: Layout, layer: int) -> RopeRecord | None:
    """The RoPE record of a stored layer, None where nothing turns."""
    rope = layout.rope_of[layer]
    return None if rope is None else layout.ropes[rope]


def to_cache(layout: Layout, layer: int, stored: KeysValues, positions: Tensor, angles: Angles | None = None) -> KeysValues:
    """Stored halves of one layer [..., T, head_dim] as the model caches them at `positions` (int64 [T]): unfolded and rotated.

    Keys [..., T, key width] and values [..., T, value width]; what RoPE does not turn are views of what was given. Differentiable.
    """
    pair, record = list(unfold(layout, *stored)), record_of(layout, layer)
    if record is not None:
        turned = pair[layout.turned]
        pair[layout.turned] = rotate(turned, positions.to(turned.device), record, angles=angles)
    return pair[0], pair[1]


def cached(layout: Layout, layers: Sequence[KeysValues], start: int) -> list[KeysValues]:
    """`prefill`'s layers [kv_heads, T, head_dim] as a batch of one in the model's cache, from position `start`: [1, kv_heads, T, width] each."""
    positions = torch.arange(start, start + layers[0][0].shape[-2])
    pairs = (to_cache(layout, index, stored, positions) for index, stored in enumerate(layers))
    return [(keys[None], values[None]) for keys, values in pairs]
