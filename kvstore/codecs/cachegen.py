"""CacheGen (Liu et al., SIGCOMM 2024), in the arithmetic that LMCache 0.5.6 ships: the codec to compare with.

Every token of a plane (one layer of K or of V) is scaled by its largest magnitude and quantised symmetrically, with fewer bins in later
layers. Levels are arithmetic-coded by a table per (layer, channel) of the chunk's own statistics, which the chunk carries as LMCache's does.
With `deltas`, which the paper has and LMCache has not, tokens come in groups of ten: the first is coded with 256 bins, the others as
differences to it. Parameters: `table` (bins per layer), `chunk` (tokens that share tables), `deltas`, `layers` of the model and
`group_layers` of a unit, which say what layer an encoder's group starts with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from kvstore.codecs import cachegen_record
from kvstore.codecs.base import BITS, MAX_LAYERS, MAX_TOKENS, Array, Codec, Record, check_bits, expect
from kvstore.codecs.cachegen_record import Floats, Head
from kvstore.codecs.scalar import largest_of, to_float32
from kvstore.errors import FormatError, InputError

CHUNK = 256  # tokens: LMCache's default
# Numerators over 32 of the layers that have the first number of bins, the others have the second: keys, values.
LEVELS = {"sigcomm1": ((20, 16, 12), (2, 16, 12)), "sigcomm2": ((10, 32, 16), (2, 32, 16)), "sigcomm3": ((32, 32, 32), (32, 32, 32))}
TABLES = ("lmcache", *LEVELS)
_UNIFORM = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")
_LIMITS = {"chunk": (1, MAX_TOKENS), "deltas": (0, 1), "group_layers": (1, MAX_LAYERS), "layers": (1, MAX_LAYERS)}
Bins = tuple[int, ...]


class CacheGenCodec(Codec):
    """See the module."""

    name: ClassVar[str] = "cachegen"
    exact: ClassVar[bool] = False

    @classmethod
    def default_params(cls, head_dim: int) -> dict[str, int | str]:
        return {"chunk": CHUNK, "deltas": 0, "group_layers": 1, "layers": 32, "table": "lmcache"}

    @classmethod
    def check_params(cls, params: dict[str, int | str]) -> dict[str, int | str]:
        if set(params) != {*_LIMITS, "table"}:
            raise FormatError(f"codec cachegen takes {sorted([*_LIMITS, 'table'])}, got {sorted(params)}", remedy="upgrade kvstore")
        for name, (low, high) in _LIMITS.items():
            value = params[name]
            if not isinstance(value, int) or not low <= value <= high:
                raise FormatError(f"codec cachegen: {name} must be an integer from {low} to {high}, got {value!r}")
        bins_for(1, str(params["table"]))
        return params

    def encode(self, bits: Array, dtype: str, group: int = 0) -> list[bytes]:
        from kvstore.codecs import cachegen_planes

        header, layers = check_bits(bits, dtype), int(self.params["layers"])
        first = group * int(self.params["group_layers"])
        if first + header.layers > layers:
            raise InputError(f"group {group} has layers {first} to {first + header.layers - 1}, codec cachegen is set for a model of {layers}",
                             remedy="set its parameters layers and group_layers to those of the model and the encoding")  # fmt: skip
        values = np.stack([to_float32(layer, dtype) for layer in bits])
        for layer, kv in enumerate(values):
            for kind in (0, 1):
                largest_of(kv[kind], layer, kind)
        bins = np.array(bins_for(layers, str(self.params["table"])))
        levels = bins[:, first : first + header.layers].T // 2 - 1
        head = Head(first, int(bins.max()), int(self.params["chunk"]), dtype, bool(self.params["deltas"]))
        return [cachegen_planes.encode(header, head, levels, values)]

    def decode(self, records: Sequence[Record], out: Array) -> None:
        from kvstore.codecs import cachegen_planes

        expect(records, out, self.n_tiers)
        if out.dtype != np.float32:
            raise InputError(f"codec cachegen decodes to float32, not to {out.dtype}")
        cachegen_planes.decode(records[0], out)

    @classmethod
    def kind_nbytes(cls, record: Record, params: Mapping[str, int | str], dtype: str) -> tuple[int, int]:
        return cachegen_record.kind_nbytes(record)


def bins_for(layers: int, table: str) -> tuple[Bins, Bins]:
    """Bins of K and of V in each layer of a model of `layers`.

    `lmcache`: K 32 bins in layers 0 to 9 then 16, V 32 in layers 0 and 1 then 16, all 32 in models below ten layers. `sigcomm1` to `sigcomm3`: the
    levels of the paper's artefact for Mistral-7B, scaled by the fraction of layers. `24:12`: as many for all keys, for all values.
    Raises FormatError for another table, or bins that are not 4 to 256.
    """
    if table == "lmcache":
        early = (layers, layers) if layers < 10 else (10, 2)
        return _steps(layers, early[0], 32, 16), _steps(layers, early[1], 32, 16)
    if table in LEVELS:
        keys, values = (_steps(layers, max(1, (2 * part * layers + 32) // 64), first, rest) for part, first, rest in LEVELS[table])
        return keys, values
    if found := _UNIFORM.fullmatch(table):
        both = (int(found[1]), int(found[2]))
        if all(4 <= bins <= 256 for bins in both):
            return (both[0],) * layers, (both[1],) * layers
    raise FormatError(f"codec cachegen: unknown table {table!r}", remedy=f"use {', '.join(TABLES)} or bins of 4 to 256 such as 24:12")


def _steps(layers: int, early: int, first: int, rest: int) -> Bins:
    return tuple(first if layer < early else rest for layer in range(layers))


class Sizes(NamedTuple):
    """Bytes that LMCache's container takes for what a record holds, by part. (Deltas it does not have: they are counted by the same rules.)

    `container` is the pickle around a chunk of all layers: the record with layer 0 answers for it, so that sums over layers are right.
    """

    streams: int
    tables: int
    lengths: int
    scales: int
    container: int

    @property
    def shipped(self) -> int:
        return sum(self)

    @property
    def tables_free(self) -> int:
        """As if tables, lengths of streams and container cost nothing: the most generous count, as the tables fit each chunk."""
        return self.streams + self.scales


def sizes(record: Record) -> Sizes:
    """The parts of a record, counted as LMCache stores them. Raises IntegrityError."""
    return Sizes(*(sum(part) for part in zip(*cachegen_record.sizes(record), strict=True)))


def shipped_nbytes(record: Record) -> int:
    """Bytes that LMCache's container takes for what a record holds. Raises IntegrityError."""
    return sizes(record).shipped


class Simulated(NamedTuple):
    """What comes back, float32 [2, layers, tokens, channels], and the bytes it took."""

    values: Floats
    sizes: Sizes


def simulate(kv: Floats, table: str = "lmcache", chunk: int = CHUNK, *, deltas: bool = False, dtype: str = "float32") -> Simulated:
    """Encode and decode any K and V, such as rotated keys, outside of a store.

    `kv` float32 [2, layers, tokens, channels] holds values of `dtype` exactly (others are rounded). Raises InputError, FormatError.
    """
    if dtype not in BITS or kv.ndim != 4 or kv.shape[0] != 2:
        raise InputError(f"expected float32 [2, layers, tokens, channels] and one of {', '.join(BITS)}, got {kv.shape} and {dtype}")
    params: dict[str, int | str] = {"chunk": chunk, "deltas": int(deltas), "group_layers": 1, "layers": kv.shape[1], "table": table}
    codec, out, found = CacheGenCodec(params), np.empty(kv.shape, np.float32), []
    block = max(1, MAX_TOKENS // chunk) * chunk
    for layer in range(kv.shape[1]):
        for start in range(0, kv.shape[2], block):
            cell = kv[:, layer : layer + 1, start : start + block].swapaxes(0, 1)
            (record,) = codec.encode(_bits(cell, dtype), dtype, layer)
            codec.decode([record], out[:, layer : layer + 1, start : start + block].swapaxes(0, 1))
            found.append(sizes(record))
    return Simulated(out, Sizes(*(sum(part) for part in zip(*found, strict=True))))


def _bits(values: Floats, dtype: str) -> Array:
    """Bit patterns of float32 values, rounded to `dtype`."""
    from kvstore.codecs.cachegen_planes import rounded

    exact = np.ascontiguousarray(rounded(values, dtype))
    if dtype == "bfloat16":
        return (exact.view(np.uint32) >> 16).astype(np.uint16)
    return exact.astype(dtype).view(BITS[dtype])
