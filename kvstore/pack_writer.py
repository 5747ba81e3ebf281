"""Writing packs: append-only under tmp, synced, named by the digest of the manifest, renamed into place. Design section 4."""

from __future__ import annotations

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kvstore.arrays import rows_metadata, state_metadata, tier_metadata, tokens_metadata
from kvstore.calibration.shelf import CALIBRATIONS
from kvstore.digest import sha256
from kvstore.errors import IntegrityError
from kvstore.identity import Context, id_bytes
from kvstore.manifest import FORMAT, Encoding, FileDigest, Layout, PackManifest, zarr_group
from kvstore.pack import CONTEXT_KINDS, NO_TOKEN, PACKS, REMEDY, Pack, Segment, crc32c, row_dtype
from kvstore.pack_files import STATE, arrays_of, shard_name
from kvstore.storage.files import sync_folder, translated, write_synced
from kvstore.storage.local import LocalStorage

Range = tuple[int, int, str]


class _Shard:
    """One array's shard file while it grows."""

    def __init__(self, path: Path):
        path.parent.mkdir()
        self.file: BinaryIO = open(path, "xb")  # noqa: SIM115  closed by `finish`
        self.offset = 0
        self.entries: list[list[list[tuple[int, int]]]] = []

    def append(self, units: Sequence[Sequence[bytes | memoryview]], checked: bool = False) -> Range:
        """Write units [group][block] of one segment; `checked` units carry their crc32c already. Its (offset, nbytes, sha256)."""
        start, hasher = self.offset, hashlib.sha256()
        self.entries.append([[self._write(unit, checked, hasher) for unit in group] for group in units])
        return start, self.offset - start, hasher.hexdigest()

    def _write(self, unit: bytes | memoryview, checked: bool, hasher: Any) -> tuple[int, int]:
        parts = (unit,) if checked else (unit, struct.pack("<I", crc32c(unit)))
        for part in parts:
            self.file.write(part)
            hasher.update(part)
        size = sum(map(len, parts))
        self.offset += size
        return self.offset - size, size

    def rollback(self, segments: int, offset: int) -> None:
        """Forget a segment that was written in part."""
        del self.entries[segments:]
        self.file.seek(offset)
        self.file.truncate()
        self.offset = offset

    def finish(self) -> FileDigest:
        """Append the index (group-major, as Zarr wants it), sync and close."""
        groups = len(self.entries[0])
        flat = [entry for g in range(groups) for segment in self.entries for entry in segment[g]]
        index = np.asarray(flat, "<u8").tobytes()
        self.file.write(index + struct.pack("<I", crc32c(index)))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return FileDigest(bytes=self.offset + len(index) + 4)


class PackWriter:
    """Collects encoded segments and publishes them as one pack.

    `add` takes what `encode` made: tier array name -> units [group][block]; of models with recurrent layers, the state too.
    `close` returns the pack's name, or None if it is empty.
    """

    def __init__(self, storage: LocalStorage, model: str, layout: Layout, encoding: Encoding, provenance: Mapping[str, str]):
        self.storage, self.model, self.layout, self.encoding, self.provenance = storage, model, layout, encoding, dict(provenance)
        self.rows: list[Any] = []
        self.ids: list[bytes] = []
        self.slots = 0
        self.started = time.monotonic()
        self._folder: Path | None = None
        self._shards: dict[str, _Shard] = {}

    @property
    def nbytes(self) -> int:
        return sum(s.offset for s in self._shards.values())

    def _open(self) -> None:
        if self._folder is None:
            self._keep_calibrations()
            folder = self.storage.stage()
            self._shards = {a: _Shard(folder / shard_name(a)) for a in arrays_of(self.encoding, self.layout)}
            self._folder = folder

    def _keep_calibrations(self) -> None:
        """They must outlive the time in which nothing published names them yet."""
        for spec in self.encoding.codecs:
            if spec.calibration is not None:
                self.storage.touch(f"{CALIBRATIONS}/{spec.calibration}")

    def add(
        self,
        key: str,
        context: Context,
        ids: Sequence[int],
        units: Mapping[str, Sequence[Sequence[bytes | memoryview]]],
        checked: bool = False,
        *,
        state: bytes | memoryview | None = None,
    ) -> dict[str, Range]:
        """Append one segment; `checked` units carry their crc32c already, and so does its `state` then. Its (offset, nbytes, sha256) per array.

        Raises StorageError where the disk is full. An error or an interrupt leaves the writer as it was before the call.
        """
        self._require_shape(ids, units)
        self._require_state(state, checked)
        with translated("writing a pack"):
            self._open()
            segments, slots, before = len(self.rows), self.slots, {a: s.offset for a, s in self._shards.items()}
            try:
                given = units if state is None else {**units, STATE: [[state]]}
                ranges = {array: shard.append(given[array], checked) for array, shard in self._shards.items()}
                self._add_row(key, context, ids, ranges)
            except BaseException:
                self._restore(segments, slots, before)
                raise
        return ranges

    def _restore(self, segments: int, slots: int, offsets: Mapping[str, int]) -> None:
        """Back to an earlier state; where even that fails, to nothing."""
        del self.rows[segments:], self.ids[segments:]
        self.slots = slots
        try:
            for array, shard in self._shards.items():
                shard.rollback(segments, offsets[array])
        except OSError:
            self.abandon()

    def _require_shape(self, ids: Sequence[int], units: Mapping[str, Sequence[Sequence[bytes | memoryview]]]) -> None:
        """Refuse what would make the whole pack unreadable."""
        groups = -(-self.layout.layers // self.encoding.group_layers)
        blocks = -(-len(ids) // self.encoding.block_tokens)
        if not len(ids):
            raise ValueError("a segment needs at least one token")
        for tier in self.encoding.tiers:
            if len(units[tier.array]) != groups or any(len(group) != blocks for group in units[tier.array]):
                raise ValueError(f"{tier.array}: {len(ids)} tokens need {groups} groups of {blocks} blocks")

    def _require_state(self, state: bytes | memoryview | None, checked: bool) -> None:
        wanted = self.layout.state_nbytes + 4 * checked if self.layout.state else None
        if (None if state is None else len(state)) != wanted:
            raise ValueError(f"the layout's recurrent state takes {wanted} bytes, got {None if state is None else len(state)}")

    def _add_row(self, key: str, context: Context, ids: Sequence[int], ranges: Mapping[str, Range]) -> None:
        parent = bytes.fromhex(context.value) if isinstance(context.value, str) else bytes(32)
        columns = [x for offset, size, sha in ranges.values() for x in (offset, size, np.frombuffer(bytes.fromhex(sha), np.uint8))]
        self.rows.append(
            (
                np.frombuffer(bytes.fromhex(key), np.uint8),
                np.frombuffer(parent, np.uint8),
                CONTEXT_KINDS.index(context.kind),
                context.tokens,
                self.slots,
                len(ids),
                *columns,
            )
        )
        padding = -len(ids) % self.encoding.block_tokens
        self.ids.append(id_bytes(ids) + id_bytes([NO_TOKEN] * padding))
        self.slots += len(ids) + padding

    def abandon(self) -> None:
        """Forget what was added; nothing of it was ever visible."""
        for shard in self._shards.values():
            with suppress(OSError):  # a full disk refuses what was still buffered
                shard.file.close()
        if self._folder is not None:
            with suppress(OSError):  # what cannot be deleted now is left to gc
                self.storage.sweep(self._folder)
        self._reset()

    def _reset(self) -> None:
        self._folder, self._shards, self.rows, self.ids, self.slots = None, {}, [], [], 0

    def close(self) -> str | None:
        """Publish durably. The pack exists under its digest when this returns; after an error nothing of it does."""
        if self._folder is None or not self.rows:
            self.abandon()
            return None
        try:
            with translated("publishing a pack"):
                name = self._publish(self._folder)
        except BaseException:
            self.abandon()
            raise
        self._reset()
        return name

    def _publish(self, folder: Path) -> str:
        files = {shard_name(array): shard.finish() for array, shard in self._shards.items()}
        for tier in self.encoding.tiers:
            files |= self._write(f"{tier.array}/zarr.json", tier_metadata(tier, self.layout, self.encoding, self.slots))
        if self.layout.state:
            files |= self._write(f"{STATE}/zarr.json", state_metadata(len(self.rows), self.layout))
        files |= self._write_tokens() | self._write_rows()
        manifest = PackManifest(
            format=FORMAT,
            kind="pack",
            model=self.model,
            layout=self.layout,
            encoding=self.encoding,
            encoding_id=self.encoding.id,
            segments=len(self.rows),
            slots=self.slots,
            files=dict(sorted(files.items())),
            provenance=self.provenance,
        )
        document = zarr_group(manifest)
        for child in folder.iterdir():
            sync_folder(child)
        write_synced(folder / "zarr.json", document)
        sync_folder(folder)
        self._keep_calibrations()
        self.storage.publish(folder, f"{PACKS}/{sha256(document)}", mend=True)
        return sha256(document)

    def _write(self, name: str, data: bytes) -> dict[str, FileDigest]:
        path = self._folder_path() / name
        path.parent.mkdir(exist_ok=True)
        write_synced(path, data)
        return {name: FileDigest(bytes=len(data), sha256=sha256(data))}

    def _folder_path(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the pack is closed")
        return self._folder

    def _write_tokens(self) -> dict[str, FileDigest]:
        packed = zlib.compressobj(9, wbits=31)  # Zarr's gzip codec; no time stamp, so equal packs have equal names
        data = packed.compress(b"".join(self.ids)) + packed.flush()
        return self._write("tokens/c.0", data) | self._write("tokens/zarr.json", tokens_metadata(self.slots))

    def _write_rows(self) -> dict[str, FileDigest]:
        data = np.array(self.rows, row_dtype(arrays_of(self.encoding, self.layout))).tobytes()
        return self._write("segments/c.0.0", data) | self._write("segments/zarr.json", rows_metadata(len(self.rows), self.encoding, self.layout))


def copy_segment(pack: Pack, segment: Segment, writer: PackWriter) -> None:
    """Append a segment to another pack, unit by unit as stored. Raises IntegrityError where its digests do not come out the same."""
    context = Context(segment.context, segment.parent or (), segment.position)
    units = {t.array: pack.units(segment, t.array, whole_records=True) for t in pack.encoding.tiers}
    state = pack.range(segment, STATE) if pack.layout.state else None
    copied = writer.add(segment.key, context, pack.ids(segment).tolist(), units, checked=True, state=state)
    for array, (_, size, sha) in copied.items():
        if (size, sha) != segment.ranges[array][1:]:
            raise IntegrityError(f"{pack.folder}/{array}: segment {segment.key[:12]} is damaged", remedy=REMEDY)
