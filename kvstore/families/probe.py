"""Short deterministic prefills that leave the model as it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvstore.families.capture import forward
from kvstore.families.hooks import watched
from kvstore.families.refuse import new_cache, rope_limit, text_config
from kvstore.families.slots import kv_layers, kv_slots

PROBE_TOKENS = 64
SINGLES = 16  # tokens cached each alone: with a few heads, more than 100 samples of every pair of channels
UNKNOWN_CONTEXT = 2048  # furthest probe position of a model that does not say its own


def probe_ids(model: nn.Module, count: int = PROBE_TOKENS) -> tuple[int, ...]:
    """`count` fixed ids spread over the vocabulary, none of them a special token that the config names."""
    size = int(model.get_input_embeddings().weight.shape[0])
    size = min(size, getattr(text_config(model), "vocab_size", size))
    special, step = _special_ids(model), _coprime(size)
    usual = (i for i in ((size // 7 + n * step) % size for n in range(size)) if i not in special)
    picked = tuple(itertools.islice(usual, count))
    return (picked * count)[:count] if picked else (0,) * count


def _coprime(size: int) -> int:
    """A step that visits every id before it meets one again."""
    return next(step for step in range(max(1, size * 38 // 100), 2 * size) if math.gcd(step, size) == 1)


def _special_ids(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for config in (model.config, text_config(model), getattr(model, "generation_config", None)):
        for name, value in vars(config).items() if config is not None else ():
            if name.endswith(("token_id", "token_ids", "token_index")):
                found.update(v for v in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(v, int))
    return found


def furthest_position(model: nn.Module) -> int:
    """The last position of the model's context, with length-dependent RoPE that of its one regime."""
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    made_for = limit if isinstance(limit, int) and limit > PROBE_TOKENS else UNKNOWN_CONTEXT
    return min(made_for, rope_limit(config) or made_for) - 1


@dataclass(frozen=True)
class Seen:
    """One stored layer of a watched pass: what of it RoPE turns [1, kv_heads, T, channels], and tensors that might be this before RoPE."""

    layer: int
    positions: Tensor
    keys: Tensor
    candidates: list[Tensor]


def watch(model: nn.Module, ids: tuple[int, ...], start: int, turned: int = 0) -> list[Seen]:
    """Prefill `ids` as one sequence from position `start`, noting what every layer's functions were given. `turned`: 0 keys, 1 values."""
    positions, found, cache = torch.arange(start, start + len(ids)), [], new_cache(model)
    slots = kv_slots(cache)

    def note(index: int, keys: Tensor, values: Tensor, seen: list[Tensor]) -> None:
        found.append(Seen(slots.index(index), positions, (keys, values)[turned].clone(), list(seen)))

    with watched(model, cache, note):
        forward(model, torch.tensor(ids)[None], positions[None], cache)
    return found


class Singles:
    """The probe's first tokens, each in a batch row of its own, at any position.

    A token alone attends to itself only, so nothing but RoPE can change its keys with the position, and in bfloat16 too
    every layer is as clean as the first: rounding does not pile up over the layers as it does in a sequence.
    """

    def __init__(self, model: nn.Module, ids: tuple[int, ...]):
        self.model, self.ids = model, torch.tensor(ids[:SINGLES])[:, None]
        self._runs: dict[int, Cache] = {}

    def cache(self, position: int) -> Cache:
        """The cache of a pass at `position`, made on first use: keys and values [n, kv_heads, 1, head_dim]."""
        if position not in self._runs:
            cache = new_cache(self.model)
            forward(self.model, self.ids, torch.full_like(self.ids, position), cache)
            self._runs[position] = cache
        return self._runs[position]

    def pair(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a stored layer, [n, kv_heads, channels] each, on the CPU."""
        found = kv_layers(self.cache(position))[layer]
        return found.keys[:, :, 0].cpu(), found.values[:, :, 0].cpu()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back buffers, and plain attributes of modules that hold some: length-dependent RoPE rewrites its own."""
    saved = [(m, dict(m._buffers), _plain(m), _copies(m)) for m in model.modules() if m._buffers]
    try:
        yield
    finally:
        for module, buffers, plain, copies in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
            vars(module).update(plain)
            for name, value in copies.items():
                if not torch.equal(buffers[name], value):
                    buffers[name].copy_(value)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: v for name, v in vars(module).items() if isinstance(v, (bool, int, float, str))}


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in module._buffers.items() if b is not None and b.ndim <= 2 and b.numel() <= 4096}
