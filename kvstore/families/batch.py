"""Prefill of several sequences in one pass: padded on the right, which causal attention never looks back at.

Every real token sees what it would see alone, so K and V equal those of a batch of one up to the rounding of differently shaped matrix products.
Nothing is masked (an explicit mask would cost the fastest attention kernels): what padding computes is thrown away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvstore.errors import InputError
from kvstore.families.assemble import share
from kvstore.families.capture import Collector, complete, forward, views
from kvstore.families.hooks import watched
from kvstore.families.rope import rotate, tolerance
from kvstore.manifest import Layout

KV = tuple[Tensor, Tensor]


def batchable(layout: Layout) -> bool:
    """Whether padding after a sequence cannot reach what is stored of it: a recurrent state would take it in. Folded layouts go one by one."""
    plain = layout.latent is None and layout.rotated == "keys" and layout.rope_regime == "static"
    return plain and not getattr(layout, "state", ())


def prefill_rows(
    model: nn.Module, layout: Layout, rows: Sequence[Sequence[int]], before: Sequence[int] = (), past: Cache | None = None, pad: int = 0
) -> list[list[KV]]:
    """Run `rows` (token ids) side by side, each after the ids `before`, which are computed anew, or after `past` (a DynamicCache of one sequence).

    Returns for each row, per layer, K before RoPE and V of its own tokens, [kv_heads, tokens, head_dim], views of the batch's memory.
    Raises InputError for an empty row, IncompatibleError as `capture.prefill` does.
    """
    if not rows or not all(len(row) for row in rows):
        raise InputError("no token ids to prefill")
    width, skip = max(map(len, rows)), len(before)
    ids = torch.full((len(rows), skip + width), pad)
    for i, row in enumerate(rows):
        ids[i, : skip + len(row)] = torch.tensor([*before, *row])
    layers = _layers(model, layout, ids, past)
    return [[(k[i, :, skip : skip + len(row)], v[i, :, skip : skip + len(row)]) for k, v in layers] for i, row in enumerate(rows)]


def _layers(model: nn.Module, layout: Layout, ids: Tensor, past: Cache | None) -> list[KV]:
    """Per layer K before RoPE and V [B, kv_heads, T, head_dim] of `ids` [B, T]."""
    for collector in (Folded, Cautious):
        cache = DynamicCache(config=model.config) if past is None else repeated(past, len(ids))
        start = int(cache.get_seq_length())
        found = collector(layout, torch.arange(start, start + ids.shape[1]), rows=len(ids))
        with watched(model, cache, found.take, functions=layout.capture == "hooked"):
            forward(model, ids, found.positions.expand(len(ids), -1), cache)
        if not found.doubtful():
            break
    return [(k.unflatten(0, (len(ids), -1)), v.unflatten(0, (len(ids), -1))) for k, v in found.layers()]


def repeated(past: Cache, rows: int) -> Cache:
    """A cache of `rows` sequences that all begin with `past`, over its tensors."""
    cache = share(past)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:  # a layer that borrows another's has none
            layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
    return cache


@dataclass
class Folded(Collector):
    """A batch's rows laid out as further heads of one sequence, so that one sequence's code serves.

    Which of the tensors seen are the keys is looked up once a rope: comparing values waits for the device, and a wait in every layer would leave
    it idle. The other layers' comparisons are read together at the end; where one fails, `doubtful` says so, and the pass is made again.
    """

    rows: int = 1
    chosen: dict[tuple[int, int], int] = field(default_factory=dict)  # by rope and number of candidates
    doubts: list[Tensor] = field(default_factory=list)

    def take(self, layer: int, keys: Tensor, values: Tensor, seen: list[Tensor]) -> None:
        whole = [x for x in (self._fold(x, keys) for x in seen) if x is not None]
        super().take(layer, keys.flatten(0, 1)[None], values.flatten(0, 1)[None], whole)

    def _fold(self, x: Tensor, keys: Tensor) -> Tensor | None:
        """[1, B * heads, T, width] of what may be the keys; None for what is no tensor of this batch's heads."""
        batch, heads, tokens, _ = keys.shape
        if x.ndim != 4 or x.shape[0] != batch:
            return None
        if x.shape[1:3] == (heads, tokens):
            return x.flatten(0, 1)[None]
        return x.transpose(1, 2).flatten(0, 1)[None] if x.shape[1:3] == (tokens, heads) else None

    def _find(self, layer: int, rope: int, keys: Tensor, seen: list[Tensor]) -> Tensor:
        record = self.layout.ropes[rope]
        candidates = list(views(seen, keys, record))
        at = self.chosen.get((rope, len(candidates)))
        if at is None or layer < 2:  # the first layer's keys may be equal by accident, where a model starts from one embedding
            found = super()._find(layer, rope, keys, seen)
            same = (i for i, view in enumerate(candidates) if torch.equal(complete(view, keys, record), found))
            self.chosen[rope, len(candidates)] = next(same, 0)  # none is, where the model computes NaN
            return found
        found = complete(candidates[at], keys, record)
        here, want = self.positions[-1:], keys[:, -1:].float()
        got = rotate(found[:, -1:], here, record, angles=self.last[rope]).float()
        self.doubts.append(~((got - want).norm() <= tolerance(keys.dtype, int(here)) * want.norm()))
        return found

    def doubtful(self) -> bool:
        """Whether a layer's keys were not where those of the layers before were."""
        return bool(self.doubts) and bool(torch.stack([d.to(self.doubts[0].device) for d in self.doubts]).any())


class Cautious(Folded):
    """Looks up the keys in every layer."""

    def _find(self, layer: int, rope: int, keys: Tensor, seen: list[Tensor]) -> Tensor:
        return Collector._find(self, layer, rope, keys, seen)
