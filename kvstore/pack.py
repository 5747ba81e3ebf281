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
from kvstore.pack_files import STATE, arrays_of, shard_name
from kvstore.storage.local import LocalStorage
from kvstore.validate import require_manifest, require_rows

PACKS = "packs"
NO_TOKEN = 0xFFFFFFFF
CONTEXT_KINDS = ("root", "anchor", "parent")
REMEDY = "`kvstore verify` lists what is damaged; `kvstore gc --drop-damaged` takes it out, and the next build compiles it again"


def row_dtype(arrays: Sequence[str]) -> np.dtype[np.void]:
    """One row of a pack's `segments` array, little-endian and unpadded; the columns of each array (see `arrays_of`) follow the fixed ones."""
    fixed: list[Any] = [("key", "u1", 32), ("parent", "u1", 32), ("context", "<u4"), ("position", "<u4"), ("start", "<u8"), ("tokens", "<u4")]
    ranges = [(f"{a}.{name}", *kind) for a in arrays for name, *kind in (("offset", "<u8"), ("nbytes", "<u8"), ("sha256", "u1", 32))]
    return np.dtype(fixed + ranges)


@dataclass(frozen=True)
class Segment:
    """One row: a segment's key, what stood before it, where its tokens lie, and per array (tier or state) the byte range and digest."""

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
    def arrays(self) -> tuple[str, ...]:
        """The arrays of which every segment has a range."""
        return arrays_of(self.encoding, self.layout)

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
        data, dtype = self._checked("segments/c.0.0"), row_dtype(self.arrays)
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
        ranges = {a: (int(r[f"{a}.offset"]), int(r[f"{a}.nbytes"]), r[f"{a}.sha256"].tobytes().hex()) for a in self.arrays}
        parent = r["parent"].tobytes().hex() if kind == "parent" else None
        return Segment(r["key"].tobytes().hex(), parent, kind, int(r["position"]), int(r["start"]), int(r["tokens"]), ranges)

    def ids(self, segment: Segment) -> npt.NDArray[np.uint32]:
        """uint32 [tokens]."""
        return self.token_ids[segment.start : segment.start + segment.tokens]

    def shard(self, array: str) -> memoryview:
        """The mapped shard file of one array."""
        if array not in self._maps:
            name = shard_name(array)
            view = self.storage.map(f"{self.folder}/{name}")
            if len(view) != self.manifest.files[name].bytes:
                raise IntegrityError(f"{self.folder}/{array}: {len(view)} bytes, the manifest says otherwise", remedy=REMEDY)
            self._maps[array] = view
        return self._maps[array]

    def index(self, array: str) -> npt.NDArray[np.uint64]:
        """uint64 [groups, blocks, 2]: offset and length (crc32c included) of each unit. Of the state: [segments, 1, 2], in the order of the rows."""
        if array not in self._indexes:
            m = self.manifest
            groups, blocks = (m.segments, 1) if array == STATE else (self.groups, m.slots // self.encoding.block_tokens)
            size = groups * blocks * 16
            tail = self.shard(array)[-(size + 4) :]
            if len(tail) != size + 4 or crc32c(tail[:size]) != struct.unpack("<I", tail[size:])[0]:
                raise IntegrityError(f"{self.folder}/{array}: the shard index is damaged", remedy=REMEDY)
            self._indexes[array] = np.frombuffer(tail[:size], "<u8").reshape(groups, blocks, 2)
        return self._indexes[array]

    def range(self, segment: Segment, array: str) -> memoryview:
        """All units of one segment in one array, as stored."""
        offset, size, _ = segment.ranges[array]
        view = self.shard(array)[offset : offset + size]
        if len(view) != size:
            raise IntegrityError(f"{self.folder}/{array}: segment {segment.key[:12]} lies outside the file", remedy=REMEDY)
        return view

    def check(self, segment: Segment, array: str) -> None:
        """Compare one segment's range of an array with its sha256. Raises IntegrityError."""
        if sha256(self.range(segment, array)) != segment.ranges[array][2]:
            raise IntegrityError(f"{self.folder}/{array}: segment {segment.key[:12]} is damaged", remedy=REMEDY)

    def check_once(self, segment: Segment, array: str) -> None:
        """`check`, unless this process has done it: published files never change. Raises IntegrityError."""
        if (segment.key, array) not in self._intact:
            self.check(segment, array)
            self._intact.add((segment.key, array))

    def state(self, segment: Segment) -> memoryview:
        """The bytes of the recurrent state at a segment's end, compared with its sha256 once a process. Raises IntegrityError."""
        self.check_once(segment, STATE)
        return self.range(segment, STATE)[:-4]

    def entries(self, segment: Segment, array: str) -> npt.NDArray[np.uint64]:
        """uint64 [groups, blocks, 2]: where in the shard each unit of one segment in one tier lies, and its length (crc32c included).

        Raises IntegrityError where one lies outside the segment's range.
        """
        offset, size, _ = segment.ranges[array]
        first = segment.start // self.encoding.block_tokens
        found = self.index(array)[:, first : first + -(-segment.tokens // self.encoding.block_tokens)]
        inside = (found[..., 0] >= offset) & (found[..., 1] >= 4) & (found[..., 1] <= size) & (found[..., 0] <= offset + size - found[..., 1])
        if not inside.all():
            raise IntegrityError(f"{self.folder}/{array}: segment {segment.key[:12]} has units outside its range", remedy=REMEDY)
        return found

    def units(self, segment: Segment, array: str, *, whole_records: bool = False) -> list[list[memoryview]]:
        """[group][block]: the units of one segment in one tier, without their crc32c (which is not checked here) unless `whole_records`."""
        whole, trailer = self.shard(array), 0 if whole_records else 4
        return [[whole[o : o + n - trailer] for o, n in group] for group in self.entries(segment, array).tolist()]

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
