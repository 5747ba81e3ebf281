"""Prefill: run a model over token ids and keep every layer's keys before RoPE and values as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import share
from kvstore.families.hooks import watched
from kvstore.families.latent import fold
from kvstore.families.rope import Angles, cos_sin, residual, rotate, tolerance, unrotate
from kvstore.families.slots import require_slots
from kvstore.manifest import Layout, RopeRecord


def prefill(model: nn.Module, layout: Layout, ids: Sequence[int], past: Cache | None = None) -> tuple[list[tuple[Tensor, Tensor]], Cache]:
    """Run `ids` (one sequence) after `past`; positions continue after it.

    Returns per layer (keys before RoPE, values) of the new tokens, [kv_heads, T, head_dim] in the model's dtype on the
    layer's device (usually views of token-major memory, as the projections wrote it; latent attention: the stored halves), and the
    cache of past and new tokens, ready to go on with: the model's own kind, so that sliding layers of it keep their window alone, while
    all new tokens of them are returned. `past` (a DynamicCache) is left as it was. No gradients, no dropout, no LM head.
    Raises InputError for no ids, IncompatibleError where a layer's keys are not found although `layout` says hooked.
    """
    if len(ids) == 0:
        raise InputError("no token ids to prefill")
    cache = DynamicCache(config=model.config) if past is None else share(past)
    start = int(cache.get_seq_length())
    collector = Collector(layout, torch.arange(start, start + len(ids)), require_slots(cache, layout.layers))
    with watched(model, cache, collector.take, functions=layout.capture == "hooked"):
        forward(model, torch.tensor(list(ids))[None], collector.positions[None], cache)
    return collector.layers(), cache


def forward(model: nn.Module, ids: Tensor, positions: Tensor, cache: Cache) -> None:
    """Run the decoder over ids [B, T] at positions [B, T] into `cache`; the LM head is left out."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    device = decoder.get_input_embeddings().weight.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), evaluating(model):
        decoder(input_ids=ids.to(device), position_ids=positions.to(device), past_key_values=cache, use_cache=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each submodule's own mode back afterwards."""
    training = [m for m in model.modules() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class Collector:
    """Gathers the layers of one prefill: `take` is called with each layer's new keys and values.

    `slots`: the model's layers that are stored, in order; empty where they are the first ones.
    """

    layout: Layout
    positions: Tensor
    slots: Sequence[int] = ()
    taken: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    last: dict[int, Angles] = field(default_factory=dict)  # angles at the last position, per rope

    def take(self, index: int, keys: Tensor, values: Tensor, seen: list[Tensor]) -> None:
        slots = self.slots or range(self.layout.layers)
        if index not in slots:
            raise IncompatibleError(f"layer {index} has a cache, the layout has {self.layout.layers} layers")
        layer, pair = slots.index(index), [keys[0], values[0]]
        if (rope := self.layout.rope_of[layer]) is not None:
            turned = pair[self.layout.turned]
            if self.layout.capture == "unrotated":
                before = unrotate(turned, self.positions, self.layout.ropes[rope])
            else:
                before = self._find(layer, rope, turned, seen)
            pair[self.layout.turned] = before
        first, second = fold(self.layout, *pair)
        self.taken[layer] = (lean(first), lean(second))

    def _find(self, layer: int, rope: int, keys: Tensor, seen: list[Tensor]) -> Tensor:
        """The tensor seen that becomes `keys` when rotated, decided at the last token."""
        record, here = self.layout.ropes[rope], self.positions[-1:]
        angles = self.last.get(rope)
        if angles is None or angles.cos.device != keys.device:
            angles = self.last[rope] = cos_sin(here, record, keys.dtype, keys.device)
        want, limit = keys[:, -1:], tolerance(keys.dtype, int(here))
        closest: tuple[float, Tensor | None] = (limit, None)
        for view in views(seen, keys, record):
            got = rotate(complete(view[:, -1:], want, record), here, record, angles=angles)
            if torch.equal(got, want):
                return complete(view, keys, record)
            closest = min(closest, (residual(got, want), view), key=lambda pair: pair[0])
        if closest[1] is None:
            raise IncompatibleError(
                f"layer {layer}: none of {len(seen)} tensors becomes the cached keys when rotated",
                remedy="measure the model again: its layout says that keys before RoPE can be seen",
            )
        return complete(closest[1], keys, record)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        missing = [i for i in range(self.layout.layers) if i not in self.taken]
        if missing:
            raise IncompatibleError(f"layers {missing} gave the cache nothing", remedy="measure the model again")
        return [self.taken[i] for i in range(self.layout.layers)]


def views(seen: list[Tensor], keys: Tensor, record: RopeRecord) -> Iterator[Tensor]:
    """Tensors of `seen`, newest first, as [kv_heads, T, head_dim or dim]: whole heads, or their rotated slice alone."""
    heads, tokens, width = keys.shape
    for tensor in reversed(seen):
        x = tensor[0] if tensor.ndim == 4 and tensor.shape[0] == 1 else tensor
        if x.ndim != 3 or x.dtype != keys.dtype or x.shape[-1] not in (width, record.dim):
            continue
        forms = [x] if x.shape[:2] == (heads, tokens) else []
        forms += [x.transpose(0, 1)] if x.shape[:2] == (tokens, heads) else []
        for form in forms:
            yield form
            if record.layout == "half" and form.shape[-1] == record.dim:
                yield _by_halves(form)


def _by_halves(x: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of channels moved to (i, i + dim / 2): some models hold them the one way and cache them the other."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def complete(view: Tensor, keys: Tensor, record: RopeRecord) -> Tensor:
    """`view` with the channels that it lacks taken from `keys`, where RoPE leaves them as they are."""
    if view.shape[-1] == keys.shape[-1]:
        return view
    whole = keys.clone()
    whole[..., record.start : record.start + record.dim] = view
    return whole


def lean(x: Tensor) -> Tensor:
    """`x`, copied (strides kept) where it would keep a larger tensor alive, as a slice of fused projections does."""
    return x.clone() if x.untyped_storage().nbytes() > x.numel() * x.element_size() else x
