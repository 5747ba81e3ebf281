"""Values to units: captured K and V through the codecs of an encoding."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from kvstore.device.encode import DeviceEncoder

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
    return _patterns(stack_of(layers))


def _patterns(values: torch.Tensor) -> Bits:
    stacked = values.cpu()
    patterns = stacked.view(torch.int32 if stacked.dtype == torch.float32 else torch.int16).numpy()
    return patterns.view(np.uint32 if patterns.itemsize == 4 else np.uint16)


def stack_of(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """[layers, 2, tokens, channels], contiguous, on the device of the first layer: models may lie on several."""
    device = layers[0][0].device
    return torch.stack([torch.stack([x.to(device) for x in kv]) for kv in layers]).permute(0, 1, 3, 2, 4).flatten(3).contiguous()


class Encoder:
    """Encodes segments of one layout; units of a segment in parallel."""

    def __init__(self, encoding: Encoding, layout: Layout, pool: ThreadPoolExecutor | None = None):
        self.encoding, self.layout = encoding, layout
        self.codecs: Mapping[str, Codec] = {c.name: codec_of(c, encoding, layout) for c in encoding.codecs}
        self.pool = pool or ThreadPoolExecutor(os.cpu_count())
        self._device: DeviceEncoder | None = None

    def encode_values(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], assigned: Assignment | None = None) -> Units:
        """`encode` of what `bits_of` takes. What lies on a GPU is transformed and quantized there, where the codec can be split so."""
        if layers[0][0].device.type == "cpu":
            return self.encode(bits_of(layers), assigned)
        return self.encode_on_device(stack_of(layers), assigned)

    def encode_on_device(self, values: torch.Tensor, assigned: Assignment | None = None) -> Units:
        """`encode` of `values` [layers, 2, tokens, channels], transform and quantization in torch on their device."""
        from kvstore.device.encode import DeviceEncoder

        if self._device is None or self._device.device != values.device:
            self._device = DeviceEncoder(self.encoding, self.codecs, self.layout.dtype, self.pool, values.device)
        steps = Parts(assigned, self.layout).steps
        made = {name: self._device.encode(name, values, steps if "policy" in codec.params else None) for name, codec in self.codecs.items()}
        units = {t.array: [[unit[t.level] for unit in group] for group in found] for t in self.encoding.tiers if (found := made[t.codec]) is not None}
        return units if all(made.values()) else {**self.encode(_patterns(values), assigned, [n for n, found in made.items() if not found]), **units}

    def encode(self, bits: Bits, assigned: Assignment | None = None, names: Sequence[str] | None = None) -> Units:
        """Tier array name -> units [group][block] of one segment, its tokens as the encoding's policy has `assigned` them (None: all alike).

        `names`: codecs whose tiers are wanted, by default all.
        """
        codecs = {name: codec for name, codec in self.codecs.items() if names is None or name in names}
        tiers = [t for t in self.encoding.tiers if t.codec in codecs]
        step, block = self.encoding.group_layers, self.encoding.block_tokens
        groups, starts = range(0, bits.shape[0], step), range(0, bits.shape[2], block)
        part = Parts(assigned, self.layout)
        cells = [(i, bits[g : g + step, :, t : t + block], part.cell(g, step, t, block)) for i, g in enumerate(groups) for t in starts]
        done = list(self.pool.map(lambda cell: self._unit(codecs, *cell), cells))
        return {t.array: [[done[g * len(starts) + b][t.codec][t.level] for b in range(len(starts))] for g in range(len(groups))] for t in tiers}

    def _unit(self, codecs: Mapping[str, Codec], group: int, cell: Bits, part: Part) -> dict[str, list[bytes]]:
        values = np.ascontiguousarray(cell)
        return {name: encode_part(codec, values, self.layout.dtype, group, part) for name, codec in codecs.items()}
