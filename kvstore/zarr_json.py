"""zarr.json of an array, as deterministic bytes."""

from __future__ import annotations

from typing import Any

import msgspec

LITTLE: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}


def array_metadata(data_type: str, shape: list[int], chunk: list[int], fill: int | str, names: list[str], codecs: list[dict[str, Any]]) -> bytes:
    """zarr.json of one array in a single chunk (shard) with a flat chunk key."""
    document = {"zarr_format": 3, "node_type": "array", "shape": shape, "data_type": data_type,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": fill, "codecs": codecs, "attributes": {}, "dimension_names": names}  # fmt: skip
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=1)
