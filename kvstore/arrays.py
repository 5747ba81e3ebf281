"""zarr.json of the arrays in a pack: deterministic bytes that follow from the manifest, so that `verify` can compare them."""

from __future__ import annotations

from typing import Any

from kvstore.manifest import Encoding, Layout, PackManifest, Tier
from kvstore.pack import NO_TOKEN, row_dtype
from kvstore.pack_files import STATE, arrays_of
from kvstore.zarr_json import LITTLE, array_metadata

NAN_BITS = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}
UINT = {"bfloat16": "uint16", "float16": "uint16", "float32": "uint32"}


def stored_type(tier: Tier, dtype: str) -> tuple[str, int | str]:
    """Zarr data type and fill value of a tier's values: float32, or the bit patterns of `dtype` where the tier is exact; the fill is a NaN."""
    return (UINT[dtype], NAN_BITS[dtype]) if tier.exact else ("float32", "NaN")


def tier_metadata(tier: Tier, layout: Layout, encoding: Encoding, slots: int) -> bytes:
    """One tier: [layer, kv, token, channel], a shard whose inner chunks are the units."""
    spec, dtype = encoding.codec(tier.codec), layout.dtype
    inner = [encoding.group_layers, 2, encoding.block_tokens, layout.channels]
    shape = [layout.layers, 2, slots, layout.channels]
    whole = [-(-layout.layers // inner[0]) * inner[0], *shape[1:]]
    unit = {"codec": spec.name, "version": spec.version, "params": spec.params, "calibration": spec.calibration, "level": tier.level,
            "dtype": dtype}  # fmt: skip
    sharding = {"chunk_shape": inner, "codecs": [{"name": "kvstore.unit", "configuration": unit}, {"name": "crc32c"}],
                "index_codecs": [LITTLE, {"name": "crc32c"}], "index_location": "end"}  # fmt: skip
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    data_type, fill = stored_type(tier, dtype)
    return array_metadata(data_type, shape, whole, fill, ["layer", "kv", "token", "channel"], codecs)


def tokens_metadata(slots: int) -> bytes:
    """The token ids of all segments, padded to whole blocks."""
    codecs: list[dict[str, Any]] = [LITTLE, {"name": "gzip", "configuration": {"level": 9}}]
    return array_metadata("uint32", [slots], [slots], NO_TOKEN, ["token"], codecs)


def rows_metadata(segments: int, encoding: Encoding, layout: Layout) -> bytes:
    """The table of segments, one row of bytes each."""
    shape = [segments, row_dtype(arrays_of(encoding, layout)).itemsize]
    return array_metadata("uint8", shape, shape, 0, ["segment", "byte"], [{"name": "bytes"}])


def state_metadata(segments: int, layout: Layout) -> bytes:
    """Recurrent states: [segment, byte], a shard with one plain chunk a segment, each followed by its crc32c."""
    shape = [segments, layout.state_nbytes]
    sharding = {"chunk_shape": [1, shape[1]], "codecs": [{"name": "bytes"}, {"name": "crc32c"}], "index_codecs": [LITTLE, {"name": "crc32c"}],
                "index_location": "end"}  # fmt: skip
    return array_metadata("uint8", shape, shape, 0, ["segment", "byte"], [{"name": "sharding_indexed", "configuration": sharding}])


def probe_metadata(shape: list[int]) -> bytes:
    """What a model's probe looks like: [layer, kv, token, projection]."""
    return array_metadata("float32", shape, shape, "NaN", ["layer", "kv", "token", "projection"], [LITTLE])


def pack_metadata(manifest: PackManifest) -> dict[str, bytes]:
    """Every zarr.json below a pack's own, by relative path."""
    m = manifest
    found = {f"{t.array}/zarr.json": tier_metadata(t, m.layout, m.encoding, m.slots) for t in m.encoding.tiers}
    if m.layout.state:
        found[f"{STATE}/zarr.json"] = state_metadata(m.segments, m.layout)
    return found | {"tokens/zarr.json": tokens_metadata(m.slots), "segments/zarr.json": rows_metadata(m.segments, m.encoding, m.layout)}
