"""Packs: immutable Zarr groups with the artifacts of many segments of one model in one encoding. Design section 4.

A tier is one Zarr array [layer, kv, token, channel] in one shard file. Units lie segment by segment, then group by group of layers, then
block by block of tokens, each followed by its crc32c; the shard index stands at the end. One segment's tier is one contiguous range.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from kvstore.digest import sha256
from kvstore.errors import IntegrityError
from kvstore.manifest import Encoding, Layout, PackManifest, parse_group
from kvstore.storage.local import LocalStorage
from kvstore.validate import require_manifest, require_rows

PACKS = "packs"
NO_TOKEN = 0xFFFFFFFF
SHARD = "c.0.0.0.0"
CONTEXT_KINDS = ("root", "anchor", "parent")
REMEDY = "`kvstore verify` lists what is damaged; `kvstore gc --drop-damaged` takes it out, and the next build compiles it again"


def row_dtype(encoding: Encoding) -> np.dtype[np.void]:
    """One row of a pack's `segments` array, little-endian and unpadded; the columns of each tier follow the fixed ones."""
    fixed: list[Any] = [("key", "u1", 32), ("parent", "u1", 32), ("context", "<u4"), ("position", "<u4"), ("start", "<u8"), ("tokens", "<u4")]
    tiers = [(f"{t.array}.{name}", *kind) for t in encoding.tiers for name, *kind in (("offset", "<u8"), ("nbytes", "<u8"), ("sha256", "u1", 32))]
    return np.dtype(fixed + tiers)


@dataclass(frozen=True)
class Segment:
    """One row: a segment's key, what stood before it, where its tokens lie, and per tier the byte range and digest."""

    key: str
    parent: str | None
    context: str
    position: int
    start: int
    tokens: int
    ranges: Mapping[str, tuple[int, int, str]]

    def nbytes(self, arrays: Sequence[str]) -> int:
        return sum(self.ranges[a][1] for a in arrays)


class Pack:
    """A published pack, opened for reading. Raises IntegrityError where its metadata does not match its name."""

    def __init__(self, storage: LocalStorage, name: str):
        self.storage, self.name, self.folder = storage, name, f"{PACKS}/{name}"
        data = storage.read(f"{self.folder}/zarr.json")
        if sha256(data) != name:
            raise IntegrityError(f"{self.folder}/zarr.json does not match its name", remedy=REMEDY)
        self.manifest = parse_group(data, PackManifest, f"{self.folder}/zarr.json")
        require_manifest(self.manifest, f"{self.folder}/zarr.json")
        self.nbytes = len(data) + sum(f.bytes for f in self.manifest.files.values())
        self._intact: set[tuple[str, str]] = set()
        self._maps: dict[str, memoryview] = {}
        self._indexes: dict[str, npt.NDArray[np.uint64]] = {}

    @property
    def encoding(self) -> Encoding:
        return self.manifest.encoding

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    @property
    def groups(self) -> int:
        """Groups of layers, the last one possibly short."""
        return -(-self.layout.layers // self.encoding.group_layers)

    def group_layers(self, group: int) -> range:
        size = self.encoding.group_layers
        return range(group * size, min((group + 1) * size, self.layout.layers))

    def _checked(self, name: str) -> bytes:
        """A small file of the pack, compared with the manifest's digest."""
        data = self.storage.read(f"{self.folder}/{name}")
        if sha256(data) != self.manifest.files[name].sha256:
            raise IntegrityError(f"{self.folder}/{name} does not match the manifest", remedy=REMEDY)
        return data

    @cached_property
    def rows(self) -> npt.NDArray[np.void]:
        """The `segments` array as structured rows."""
        data, dtype = self._checked("segments/c.0.0"), row_dtype(self.encoding)
        if len(data) != self.manifest.segments * dtype.itemsize:
            raise IntegrityError(f"{self.folder}/segments has {len(data)} bytes", remedy=REMEDY)
        rows = np.frombuffer(data, dtype)
        require_rows(rows, self.manifest, f"{self.folder}/segments")
        return rows

    @cached_property
    def token_ids(self) -> npt.NDArray[np.uint32]:
        """uint32 [slots]: the ids of all segments, padded to whole blocks."""
        size, stream = self.manifest.slots * 4, zlib.decompressobj(wbits=31)
        try:
            data = stream.decompress(self._checked("tokens/c.0"), size + 1)  # at most: a small file may unpack to any size
        except zlib.error as error:
            raise IntegrityError(f"{self.folder}/tokens: {error}", remedy=REMEDY) from error
        if len(data) != size or not stream.eof:
            raise IntegrityError(f"{self.folder}/tokens does not hold {self.manifest.slots} ids", remedy=REMEDY)
        return np.frombuffer(data, "<u4")

    def segment(self, row: int) -> Segment:
        r = self.rows[row]
        kind = CONTEXT_KINDS[int(r["context"])]
        ranges = {
            t.array: (int(r[f"{t.array}.offset"]), int(r[f"{t.array}.nbytes"]), r[f"{t.array}.sha256"].tobytes().hex()) for t in self.encoding.tiers
        }
        parent = r["parent"].tobytes().hex() if kind == "parent" else None
        return Segment(r["key"].tobytes().hex(), parent, kind, int(r["position"]), int(r["start"]), int(r["tokens"]), ranges)

    def ids(self, segment: Segment) -> npt.NDArray[np.uint32]:
        """uint32 [tokens]."""
        return self.token_ids[segment.start : segment.start + segment.tokens]

    def shard(self, array: str) -> memoryview:
        """The mapped shard file of one tier."""
        if array not in self._maps:
            view = self.storage.map(f"{self.folder}/{array}/{SHARD}")
            if len(view) != self.manifest.files[f"{array}/{SHARD}"].bytes:
                raise IntegrityError(f"{self.folder}/{array}: {len(view)} bytes, the manifest says otherwise", remedy=REMEDY)
            self._maps[array] = view
        return self._maps[array]

    def index(self, array: str) -> npt.NDArray[np.uint64]:
        """uint64 [groups, blocks, 2]: offset and length (crc32c included) of each unit."""
        if array not in self._indexes:
            blocks = self.manifest.slots // self.encoding.block_tokens
            size = self.groups * blocks * 16
            tail = self.shard(array)[-(size + 4) :]
            if len(tail) != size + 4 or crc32c(tail[:size]) != struct.unpack("<I", tail[size:])[0]:
                raise IntegrityError(f"{self.folder}/{array}: the shard index is damaged", remedy=REMEDY)
            self._indexes[array] = np.frombuffer(tail[:size], "<u8").reshape(self.groups, blocks, 2)
        return self._indexes[array]

    def range(self, segment: Segment, array: str) -> memoryview:
        """All units of one segment in one tier, as stored."""
        offset, size, _ = segment.ranges[array]
        view = self.shard(array)[offset : offset + size]
        if len(view) != size:
            raise IntegrityError(f"{self.folder}/{array}: segment {segment.key[:12]} lies outside the file", remedy=REMEDY)
        return view

    def check(self, segment: Segment, array: str) -> None:
        """Compare one segment's tier with its sha256. Raises IntegrityError."""
        if sha256(self.range(segment, array)) != segment.ranges[array][2]:
            raise IntegrityError(f"{self.folder}/{array}: segment {segment.key[:12]} is damaged", remedy=REMEDY)

    def check_once(self, segment: Segment, array: str) -> None:
        """`check`, unless this process has done it: published files never change. Raises IntegrityError."""
        if (segment.key, array) not in self._intact:
            self.check(segment, array)
            self._intact.add((segment.key, array))

    def units(self, segment: Segment, array: str, *, whole_records: bool = False) -> list[list[memoryview]]:
        """[group][block]: the units of one segment in one tier, without their crc32c (which is not checked here) unless `whole_records`."""
        offset, size, _ = segment.ranges[array]
        whole, block = self.shard(array), self.encoding.block_tokens
        first = segment.start // block
        entries = self.index(array)[:, first : first + -(-segment.tokens // block)]
        inside = (
            (entries[..., 0] >= offset) & (entries[..., 1] >= 4) & (entries[..., 1] <= size) & (entries[..., 0] <= offset + size - entries[..., 1])
        )
        if not inside.all():
            raise IntegrityError(f"{self.folder}/{array}: segment {segment.key[:12]} has units outside its range", remedy=REMEDY)
        trailer = 0 if whole_records else 4
        return [[whole[o : o + n - trailer] for o, n in group] for group in entries.tolist()]

    def unit(self, array: str, group: int, block: int) -> memoryview:
        """One unit by its place in the array, compared with its crc32c. Raises IntegrityError."""
        offset, size = (int(x) for x in self.index(array)[group, block])
        whole = self.shard(array)
        if size < 4 or offset + size > len(whole):
            raise IntegrityError(f"{self.folder}/{array}: a unit lies outside the file", remedy=REMEDY)
        unit = whole[offset : offset + size - 4]
        if crc32c(unit) != struct.unpack("<I", whole[offset + size - 4 : offset + size])[0]:
            raise IntegrityError(f"{self.folder}/{array}: unit {group},{block} is damaged", remedy=REMEDY)
        return unit


def crc32c(data: bytes | memoryview) -> int:
    """The checksum that Zarr's crc32c codec appends, as an integer."""
    view = np.frombuffer(data, np.uint8)
    view.flags.writeable = False  # the library takes read-only buffers only
    return int(google_crc32c.value(view))
