"""Which arrays and files a pack has, by what its manifest says."""

from __future__ import annotations

from kvstore.manifest import Encoding, Layout

SHARD = "c.0.0.0.0"
STATE = "state"  # the array of recurrent states, in packs of models that have them
STATE_SHARD = "c.0.0"


def arrays_of(encoding: Encoding, layout: Layout) -> tuple[str, ...]:
    """The arrays of which every segment has a range: one a tier, then the recurrent state where there is one."""
    return (*(t.array for t in encoding.tiers), *([STATE] if layout.state else []))


def shard_name(array: str) -> str:
    """The file of an array's only shard, relative to the pack."""
    return f"{array}/{STATE_SHARD if array == STATE else SHARD}"


def expected_files(encoding: Encoding, layout: Layout) -> dict[str, bool]:
    """Every file of a pack beside its own zarr.json, and whether the manifest holds its sha256."""
    arrays = arrays_of(encoding, layout)
    shards = {name: hashed for a in arrays for name, hashed in ((f"{a}/zarr.json", True), (shard_name(a), False))}
    return shards | {"tokens/zarr.json": True, "tokens/c.0": True, "segments/zarr.json": True, "segments/c.0.0": True}
