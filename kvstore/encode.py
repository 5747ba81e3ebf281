"""Values to units: captured K and V through the codecs of an encoding."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from kvstore.calibration.record import Calibration
from kvstore.codecs import codec_of, default_params
from kvstore.codecs.base import Codec
from kvstore.errors import InputError
from kvstore.manifest import CodecSpec, Encoding, Layout, Tier
from kvstore.parts import Part, Parts, encode_part
from kvstore.policies import Assignment

BLOCK_TOKENS = 512  # against 128: 2 % fewer bytes and two thirds of the decoding time on the bundled model
CODECS = ("transform", "scalar", "lossless", "raw", "cachegen")
Units = dict[str, list[list[bytes]]]
Bits = npt.NDArray[Any]  # uint16 or uint32 [layers, 2, tokens, channels]


def make_encoding(
    codec: str,
    layout: Layout,
    *,
    lossless: bool = False,
    params: Mapping[str, int | str] | None = None,
    calibration: Calibration | None = None,
) -> Encoding:
    """The encoding that `--codec` and `--lossless` ask for; `params` change the codec's usual ones; codec transform needs its `calibration`.

    Raises InputError for an unknown codec, FormatError (when it encodes) for parameters that it does not take.
    """
    if codec not in CODECS:
        raise InputError(f"unknown codec {codec!r}", remedy=f"choose one of {', '.join(CODECS)}")
    spec, tiers = _spec(codec, layout, params), _tiers(codec)
    if calibration is not None:
        spec, tiers = msgspec.structs.replace(spec, calibration=calibration.digest), _ladder(codec, calibration.record.tiers)
    specs = [spec]
    if lossless and not tiers[-1].exact:
        specs, tiers = [*specs, _spec("lossless", layout)], [*tiers, *_tiers("lossless")]
    block = int(specs[0].params["chunk"]) if codec == "cachegen" else BLOCK_TOKENS  # a unit of CacheGen is a chunk of LMCache
    return Encoding(tuple(specs), tuple(tiers), block, 1 if calibration is None else calibration.record.group_layers)


def _spec(codec: str, layout: Layout, changes: Mapping[str, int | str] | None = None) -> CodecSpec:
    version, params = default_params(codec, head_dim=layout.head_dim)
    if codec == "cachegen":
        params["layers"] = layout.layers
    return CodecSpec(codec, version, {**params, **(changes or {})})


def _tiers(codec: str) -> list[Tier]:
    if codec == "scalar":
        return [Tier("standard", "t0", codec, 0, (), False), Tier("fine", "t1", codec, 1, ("standard",), False)]
    return [Tier(codec, "lossless" if codec == "lossless" else "t0", codec, 0, (), codec != "cachegen")]


def _ladder(codec: str, count: int) -> list[Tier]:
    """Nested tiers, base first; the finest is `fine`, whatever their number."""
    names = ("draft", "standard", "fine")[3 - count :]
    return [Tier(name, f"t{level}", codec, level, names[:level], False) for level, name in enumerate(names)]


def bits_of(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Bits:
    """uint16 or uint32 [layers, 2, tokens, channels] from per layer (K, V), each [kv_heads, tokens, head_dim] in the model's dtype."""
    stacked = torch.stack([torch.stack(kv) for kv in layers]).permute(0, 1, 3, 2, 4).flatten(3).contiguous().cpu()
    patterns = stacked.view(torch.int32 if stacked.dtype == torch.float32 else torch.int16).numpy()
    return patterns.view(np.uint32 if patterns.itemsize == 4 else np.uint16)


class Encoder:
    """Encodes segments of one layout; units of a segment in parallel."""

    def __init__(self, encoding: Encoding, layout: Layout, pool: ThreadPoolExecutor | None = None):
        self.encoding, self.layout = encoding, layout
        self.codecs: Mapping[str, Codec] = {c.name: codec_of(c, encoding, layout) for c in encoding.codecs}
        self.pool = pool or ThreadPoolExecutor(os.cpu_count())

    def encode(self, bits: Bits, assigned: Assignment | None = None) -> Units:
        """Tier array name -> units [group][block] of one segment, its tokens as the encoding's policy has `assigned` them (None: all alike)."""
        step, block = self.encoding.group_layers, self.encoding.block_tokens
        groups, starts = range(0, bits.shape[0], step), range(0, bits.shape[2], block)
        part = Parts(assigned, self.layout)
        cells = [(i, bits[g : g + step, :, t : t + block], part.cell(g, step, t, block)) for i, g in enumerate(groups) for t in starts]
        done = list(self.pool.map(lambda cell: self._unit(*cell), cells))
        return {t.array: [[done[g * len(starts) + b][t.array] for b in range(len(starts))] for g in range(len(groups))] for t in self.encoding.tiers}

    def _unit(self, group: int, cell: Bits, part: Part) -> dict[str, bytes]:
        values = np.ascontiguousarray(cell)
        records = {name: encode_part(codec, values, self.layout.dtype, group, part) for name, codec in self.codecs.items()}
        return {t.array: records[t.codec][t.level] for t in self.encoding.tiers}
