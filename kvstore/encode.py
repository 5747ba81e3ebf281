"""Values to units: captured K and V through the codecs of an encoding."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore.codecs import default_params, get_codec
from kvstore.codecs.base import Codec
from kvstore.errors import InputError
from kvstore.manifest import CodecSpec, Encoding, Layout, Tier

BLOCK_TOKENS = 512  # against 128: 2 % fewer bytes and two thirds of the decoding time on the bundled model
CODECS = ("scalar", "lossless", "raw")
Units = dict[str, list[list[bytes]]]
Bits = npt.NDArray[Any]  # uint16 or uint32 [layers, 2, tokens, channels]


def make_encoding(codec: str, layout: Layout, *, lossless: bool = False) -> Encoding:
    """The encoding that `--codec` and `--lossless` ask for. Raises InputError for an unknown codec."""
    if codec not in CODECS:
        raise InputError(f"unknown codec {codec!r}", remedy=f"choose one of {', '.join(CODECS)}")
    specs, tiers = [_spec(codec, layout)], _tiers(codec)
    if lossless and not tiers[-1].exact:
        specs, tiers = [*specs, _spec("lossless", layout)], [*tiers, *_tiers("lossless")]
    return Encoding(tuple(specs), tuple(tiers), BLOCK_TOKENS, group_layers=1)


def _spec(codec: str, layout: Layout) -> CodecSpec:
    version, params = default_params(codec, head_dim=layout.head_dim)
    return CodecSpec(codec, version, params)


def _tiers(codec: str) -> list[Tier]:
    if codec == "scalar":
        return [Tier("standard", "t0", codec, 0, (), False), Tier("fine", "t1", codec, 1, ("standard",), False)]
    return [Tier(codec, "lossless" if codec == "lossless" else "t0", codec, 0, (), True)]


def bits_of(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Bits:
    """uint16 or uint32 [layers, 2, tokens, channels] from per layer (K, V), each [kv_heads, tokens, head_dim] in the model's dtype."""
    stacked = torch.stack([torch.stack(kv) for kv in layers]).permute(0, 1, 3, 2, 4).flatten(3).contiguous().cpu()
    patterns = stacked.view(torch.int32 if stacked.dtype == torch.float32 else torch.int16).numpy()
    return patterns.view(np.uint32 if patterns.itemsize == 4 else np.uint16)


class Encoder:
    """Encodes segments of one layout; units of a segment in parallel."""

    def __init__(self, encoding: Encoding, layout: Layout, pool: ThreadPoolExecutor | None = None):
        self.encoding, self.layout = encoding, layout
        self.codecs: Mapping[str, Codec] = {c.name: get_codec(c.name, c.version, c.params) for c in encoding.codecs}
        self.pool = pool or ThreadPoolExecutor(os.cpu_count())

    def encode(self, bits: Bits) -> Units:
        """Tier array name -> units [group][block] of one segment."""
        step, block = self.encoding.group_layers, self.encoding.block_tokens
        groups, starts = range(0, bits.shape[0], step), range(0, bits.shape[2], block)
        cells = [bits[g : g + step, :, t : t + block] for g in groups for t in starts]
        done = list(self.pool.map(self._unit, cells))
        return {t.array: [[done[g * len(starts) + b][t.array] for b in range(len(starts))] for g in range(len(groups))] for t in self.encoding.tiers}

    def _unit(self, cell: Bits) -> dict[str, bytes]:
        records = {name: codec.encode(np.ascontiguousarray(cell), self.layout.dtype) for name, codec in self.codecs.items()}
        return {t.array: records[t.codec][t.level] for t in self.encoding.tiers}
