"""The metric without a backward pass: how far an error in a key or value moves the output of attention.

With weights a of a query over the prefix, output o and scale s, an error e of the value at a token moves o by a e, one of its key by
about a s (q . e) (v - o). So F is s^2 a^2 |v - o|^2 q q' for keys and a^2 I for values, summed over queries and the heads that share a KV head,
each layer relative to the energy of its outputs. Queries are taken before RoPE: on average over distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore.calibration.live import Live
from kvstore.families.rope import unrotate
from kvstore.families.slots import slides

NAME = "kvstore_watched"
Splits = Sequence[tuple[Sequence[int], Iterator[tuple[int, int]]]]


@dataclass
class _Watch:
    """What one pass shows, layer by layer: queries [heads, T, head_dim], keys and values [kv_heads, T_all, head_dim], scale."""

    calls: list[tuple[Tensor, Tensor, Tensor, float]] = field(default_factory=list)


def attention_blocks(live: Live, sequences: Splits, tick: Callable[[int], None]) -> Tensor | None:
    """float64 [layers, 2, channels, channels]; None where the model's attention does not go through transformers' interface, reads keys and values
    that it expands from latents, or only those of a window."""
    layout, total = live.layout, 0
    if layout.latent is not None or slides(live.model.config):
        return None
    blocks = torch.zeros(layout.layers, 2, layout.channels, layout.channels, dtype=torch.float64, device=live.device)
    outputs = torch.zeros(layout.layers, dtype=torch.float64, device=live.device)
    for ids, splits in sequences:
        x = live.values(ids)
        for at, end in splits:
            with torch.no_grad(), watching(live) as watch:
                live.following(x[:at], ids[at:end], ids[:at])
            if len(watch.calls) != layout.layers:
                return None
            for layer, call in enumerate(watch.calls):
                outputs[layer] += _accumulate(blocks[layer], live, layer, at, call)
            total += at
        tick(len(ids))
    if not bool(torch.isfinite(blocks).all()):
        return None
    return blocks / (outputs.clamp_min(torch.finfo(torch.float64).tiny)[:, None, None, None] * max(total, 1))


@contextmanager
def watching(live: Live) -> Iterator[_Watch]:
    """Within, attention runs as PyTorch's own (sdpa), and is seen."""
    watch, config = _Watch(), live.model.config
    before = config._attn_implementation

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any) -> Any:
        scale = more.get("scaling")
        watch.calls.append((query[0], key[0], value[0], float(query.shape[-1] ** -0.5 if scale is None else scale)))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **more)

    AttentionInterface.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        config._attn_implementation = NAME
        yield watch
    finally:
        config._attn_implementation = before
        AttentionInterface.register(NAME, ALL_ATTENTION_FUNCTIONS["sdpa"])  # the registry must not keep what was seen alive


def _accumulate(blocks: Tensor, live: Live, layer: int, prefix: int, call: tuple[Tensor, Tensor, Tensor, float]) -> Tensor:
    """Add one pass to blocks [2, channels, channels]; returns the mean energy of the outputs of attention times the prefix's tokens."""
    query, key, value, scale = call
    heads, count, dim = query.shape
    share, layout = heads // key.shape[0], live.layout
    rope = layout.rope_of[layer]
    positions = torch.arange(prefix, prefix + count, device=query.device)
    plain = query if rope is None else unrotate(query, positions, layout.ropes[rope])
    energy = torch.zeros((), dtype=torch.float64, device=blocks.device)
    for head in range(heads):
        kv = head // share
        weights = _weights(query[head].float(), key[kv].float(), scale, prefix)
        output = weights @ value[kv].float()
        mass = weights[:, :prefix] ** 2
        part = slice(kv * dim, (kv + 1) * dim)
        distance = (torch.cdist(output, value[kv, :prefix].float()) ** 2 * mass).sum(1)
        q = plain[head].float() * (scale * distance.sqrt())[:, None]
        blocks[0, part, part] += (q.T @ q).double().to(blocks.device)
        blocks[1, part, part].diagonal().add_(mass.sum().double().to(blocks.device))
        energy += (output.double() ** 2).sum(1).mean().to(blocks.device)
    return energy * prefix


def _weights(query: Tensor, key: Tensor, scale: float, prefix: int) -> Tensor:
    """Softmax over what each query may see: [queries, all keys]."""
    scores = scale * query @ key.T
    hidden = torch.ones(scores.shape, dtype=torch.bool, device=scores.device).triu(prefix + 1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)
