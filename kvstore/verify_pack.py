"""Checks of one pack against its own manifest and digests. Each returns what is wrong, in words, and never stops at the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kvstore.arrays import pack_metadata
from kvstore.digest import sha256
from kvstore.errors import KvstoreError
from kvstore.identity import Context, segment_key
from kvstore.manifest import ModelRecord
from kvstore.pack import NO_TOKEN, Pack, Segment, crc32c
from kvstore.pack_files import STATE, shard_name

Finding = tuple[str, str]  # the file, what is wrong with it


def file_problems(pack: Pack) -> list[Finding]:
    """Files that are missing, damaged or foreign, shard indexes, the table of segments and the padding of the token axis."""
    found = [(name, p) for name in pack.manifest.files if (p := _file_problem(pack, name)) is not None]
    listed = {*pack.manifest.files, "zarr.json"}
    root = pack.storage.path(pack.folder)
    files = (p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir())
    found += [(name, "does not belong to the pack") for name in files if name not in listed]
    return found + list(_table_problems(pack)) + list(_token_problems(pack)) + list(_index_problems(pack))


def _file_problem(pack: Pack, name: str) -> str | None:
    entry = pack.manifest.files[name]
    try:
        size = pack.storage.size(f"{pack.folder}/{name}")
        if size != entry.bytes:
            return f"has {size} bytes instead of {entry.bytes}"
        if entry.sha256 is None:
            return None
        data = pack.storage.read(f"{pack.folder}/{name}")
    except KvstoreError as error:
        return error.message
    if sha256(data) != entry.sha256:
        return "does not match its sha256"
    implied = pack_metadata(pack.manifest)
    return "does not follow from the manifest" if name in implied and implied[name] != data else None


def _table_problems(pack: Pack) -> Iterator[Finding]:
    try:
        rows = pack.rows
    except KvstoreError as error:
        yield "segments/c.0.0", error.message
        return
    if len({r.tobytes() for r in rows["key"]}) != len(rows):
        yield "segments/c.0.0", "holds a segment twice"
    block = pack.encoding.block_tokens
    if int((-(-rows["tokens"].astype("i8") // block) * block).sum()) != pack.manifest.slots:
        yield "segments/c.0.0", "does not cover the token axis"


def _token_problems(pack: Pack) -> Iterator[Finding]:
    try:
        padding = np.ones(pack.manifest.slots, np.bool_)
        for start, tokens in zip(pack.rows["start"].tolist(), pack.rows["tokens"].tolist(), strict=True):
            padding[start : start + tokens] = False
        if ((pack.token_ids == NO_TOKEN) != padding).any():
            yield "tokens/c.0", "its padding is not where the segments end"
    except KvstoreError as error:
        yield "tokens/c.0", error.message


def _index_problems(pack: Pack) -> Iterator[Finding]:
    for array in pack.arrays:
        try:
            pack.index(array)
        except KvstoreError as error:
            yield shard_name(array), error.message


def segment_problems(pack: Pack, segment: Segment) -> list[str]:
    """What of a segment is not as it was written: its ids; in every tier every unit's crc32c, the sha256, nothing between the units; its state."""
    found = []
    try:
        if (pack.ids(segment) == NO_TOKEN).any():
            found.append(f"segment {segment.key[:12]}: padding among its token ids")
    except KvstoreError as error:
        found.append(error.message)
    for array in pack.arrays:
        try:
            if problem := (_state_problem(pack, segment) if array == STATE else _tier_problem(pack, segment, array)):
                found.append(f"segment {segment.key[:12]}, {array}: {problem}")
        except KvstoreError as error:
            found.append(error.message)
    return found


def _state_problem(pack: Pack, segment: Segment) -> str | None:
    """Its crc32c, its sha256, and that the index knows it at the segment's row."""
    offset, size, digest = segment.ranges[STATE]
    whole = pack.range(segment, STATE)
    if crc32c(whole[:-4]) != int.from_bytes(whole[-4:], "little"):
        return "fails its crc32c"
    row = int(np.flatnonzero(pack.rows["start"] == segment.start)[0])
    if pack.index(STATE)[row, 0].tolist() != [offset, size]:
        return "its index names another place"
    return None if sha256(whole) == digest else "does not match its sha256"


def _tier_problem(pack: Pack, segment: Segment, array: str) -> str | None:
    units = pack.units(segment, array, whole_records=True)
    bad = [(g, b) for g, group in enumerate(units) for b, unit in enumerate(group) if crc32c(unit[:-4]) != int.from_bytes(unit[-4:], "little")]
    if bad:
        return f"{len(bad)} units fail their crc32c, first that of group {bad[0][0]}, block {bad[0][1]}"
    offset, size, digest = segment.ranges[array]
    first, block = segment.start // pack.encoding.block_tokens, pack.encoding.block_tokens
    entries = pack.index(array)[:, first : first + -(-segment.tokens // block)].reshape(-1, 2).astype("i8")
    begins, ends = entries[:, 0], entries.sum(1)
    if begins[0] != offset or ends[-1] != offset + size or (begins[1:] != ends[:-1]).any():
        return "its units do not lie side by side"
    return None if sha256(pack.range(segment, array)) == digest else "does not match its sha256"


def key_problem(pack: Pack, segment: Segment, model: ModelRecord, anchors: Iterable[Sequence[int]]) -> str | None:
    """Whether a segment's key follows from its model, context and ids. `anchors`: ids that may have stood before it."""
    if segment.context == "anchor":
        contexts = [Context.anchor(ids) for ids in anchors if len(ids) == segment.position]
        if not contexts:
            return None  # made with a template that is not here: nothing to compare with
    else:
        contexts = [Context(segment.context, segment.parent or (), segment.position)]
    try:
        ids = pack.ids(segment).tolist()
    except KvstoreError:
        return None  # reported with its file
    if any(segment_key(model.model, model.layout, context, ids) == segment.key for context in contexts):
        return None
    return f"segment {segment.key[:12]}: its key does not follow from its token ids and context"
