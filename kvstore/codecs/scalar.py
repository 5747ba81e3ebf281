"""Group-wise integers in two nested tiers, with built-in tables: any model, no calibration.

Per layer and kind one step d: `key_step` or `value_step` thousandths of the median token's deviation (one token out of scale,
such as an attention sink, then spoils nothing). The fine level of x is x / d rounded; a base level holds three fine ones,
so the base is at most 1.5 d off, both tiers 0.5 d. Keys are grouped by channel along the tokens of the block and lose
their channel's mean in whole base steps; values are grouped by `value_group` neighbours within a token. A group's
scale class picks its table; levels beyond an alphabet are escapes.

Measured on a small Llama (nats a token on prose, everything counted): 0.0028 at 1.64 bits a value, both tiers 0.00029 at 3.14.
One step for all groups beats steps by group (with ideal tables 0.00026 at 3.10, against 0.00030 at 3.13 with the square root
of the group's deviation); the channel means of keys are worth 0.5 to 1 bit a key; centroids make the divergence worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import Array, Codec, Record, check_bits, expect, read_header
from kvstore.codecs.grouping import Floats, Plane
from kvstore.errors import FormatError, InputError

LIMITS = {"key_step": (1, 100_000), "value_step": (1, 100_000), "value_group": (8, 4096)}
KEY, VALUE = 0, 1
FEW_TOKENS = 8  # shorter blocks have no channel statistics: their keys are grouped like values, at a third of the step
OUTLIER = 16.0  # a token with this many times the median energy has no say in the means
LARGEST, TINY, FINEST = 1e38, 1e-30, 2.0**-24


class ScalarCodec(Codec):
    """See the module. Tier 0 stands alone; tier 1 divides its cells in three."""

    name: ClassVar[str] = "scalar"
    exact: ClassVar[bool] = False
    n_tiers: ClassVar[int] = 2
    takes_kept: ClassVar[bool] = True

    @classmethod
    def default_params(cls, head_dim: int) -> dict[str, int | str]:
        fits = head_dim % 64 == 0 or 64 % head_dim == 0 or not 32 <= head_dim <= 128
        return {"key_step": 450, "value_group": 64 if fits else head_dim, "value_step": 560}

    @classmethod
    def check_params(cls, params: dict[str, int | str]) -> dict[str, int | str]:
        if set(params) != set(LIMITS):
            raise FormatError(f"codec scalar takes {sorted(LIMITS)}, got {sorted(params)}", remedy="upgrade kvstore")
        for name, (low, high) in LIMITS.items():
            value = params[name]
            if not isinstance(value, int) or not low <= value <= high:
                raise FormatError(f"codec scalar: {name} must be an integer from {low} to {high}, got {value!r}")
        return params

    def encode(self, bits: Array, dtype: str, group: int = 0, kept: npt.NDArray[np.bool_] | None = None) -> list[bytes]:
        """As `Codec.encode`; what is not `kept` (bool [layers, heads, tokens]) has no say in steps and means."""
        from kvstore.codecs import scalar_planes

        header = check_bits(bits, dtype)
        planes = []
        for layer, both in enumerate(bits):
            share = None if kept is None else kept[layer].mean(axis=0, dtype=np.float32)
            for kind in (KEY, VALUE):
                values, plane = to_float32(both[kind], dtype), self.plane(kind, header.tokens, header.channels)
                top = largest_of(values, layer, kind)
                step, typical = step_of(values, top, self._thousandths(kind, plane), centred=plane.channel_major, share=share)
                planes.append(scalar_planes.encode(values, plane, step, typical))
        return scalar_planes.assemble(header, planes)

    def decode(self, records: Sequence[Record], out: Array) -> None:
        from kvstore.codecs import scalar_planes

        header = expect(records, out, self.n_tiers)
        if out.dtype != np.float32:
            raise InputError(f"codec scalar decodes to float32, not to {out.dtype}")
        kinds = [self.plane(kind, header.tokens, header.channels) for kind in (KEY, VALUE)]
        scalar_planes.decode(records, kinds, out)

    @classmethod
    def kind_nbytes(cls, record: Record, params: Mapping[str, int | str], dtype: str) -> tuple[int, int]:
        from kvstore.codecs import scalar_sizes

        codec, header = cls(params), read_header(record)
        return scalar_sizes.kind_nbytes(record, header, [codec.plane(kind, header.tokens, header.channels) for kind in (KEY, VALUE)])

    def plane(self, kind: int, tokens: int, channels: int) -> Plane:
        """The grouping of keys or values in a block of this size: encoder and decoder derive it alike."""
        if kind == KEY and tokens >= FEW_TOKENS:
            return Plane(tokens, channels, tokens, channel_major=True)
        return Plane(tokens, channels, int(self.params["value_group"]), channel_major=False)

    def _thousandths(self, kind: int, plane: Plane) -> float:
        if kind == VALUE:
            return float(self.params["value_step"])
        return float(self.params["key_step"]) / (1 if plane.channel_major else 3)


def to_float32(bits: Array, dtype: str) -> Floats:
    """Bit patterns as numbers, contiguous."""
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def largest_of(values: Floats, layer: int, kind: int) -> float:
    """The largest magnitude. Raises InputError naming the first value that a lossy codec cannot hold."""
    top = max(float(values.max()), -float(values.min()))
    if not top <= LARGEST:
        token, channel = np.argwhere(~(np.abs(values) <= LARGEST))[0]
        raise InputError(f"{'KV'[kind]} of layer {layer} in the unit, token {token}, channel {channel} is {values[token, channel]}",
                         remedy="mend the model or its dtype, or store it with the codec raw or lossless")  # fmt: skip
    return top


def step_of(
    values: Floats, top: float, thousandths: float, *, centred: bool, share: Floats | None = None
) -> tuple[np.float32, npt.NDArray[np.bool_]]:
    """The fine step for `values` [tokens, channels] of magnitudes up to `top`, and which tokens are typical.

    Deviations are from the channel's mean where `centred`. `share` [tokens] of a token's channels count, the others hold a
    filler. The step is never so small that a level needs more than 24 bits.
    """
    there = np.ones(len(values), np.bool_) if share is None else share > 0
    typical = there
    if top < TINY or not there.any():
        return np.float32(1), np.ones(len(values), np.bool_)
    scaled, per_kept = values * np.float32(1 / top), np.float32(1) if share is None else share[there]
    energy = _energy(scaled, typical, centred)[there] / per_kept
    median = _middle(energy)
    if float(energy.max()) > OUTLIER * median > 0:
        typical = there.copy()
        typical[there] = energy <= OUTLIER * median
        energy = _energy(scaled, typical, centred)[there] / per_kept
    spread = math.sqrt(_middle(energy) or float(energy.mean()))
    return np.float32(top * max(thousandths / 1000 * spread, FINEST)), typical


def _energy(values: Floats, typical: npt.NDArray[np.bool_], centred: bool) -> Floats:
    """float32 [tokens]: mean square per token, as unbiased as the mean allows."""
    count = int(typical.sum())
    chosen = values if typical.all() else values[typical]
    rest = values - chosen.mean(axis=0) if centred else values
    squares: Floats = np.einsum("tc,tc->t", rest, rest)
    return squares * np.float32((count / max(1, count - 1) if centred else 1) / values.shape[1])


def _middle(numbers: Floats) -> float:
    """The upper median; a tenth of the time of numpy's."""
    return float(np.partition(numbers, len(numbers) // 2)[len(numbers) // 2])
