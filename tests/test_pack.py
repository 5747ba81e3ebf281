"""Packs: what goes in comes out, under a name that says what is in it; damage and hostile bytes are refused, never served."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.digest import sha256
from kvstore.errors import FormatError, IntegrityError, KvstoreError, NotFoundError
from kvstore.identity import Context
from kvstore.manifest import Encoding
from kvstore.pack import NO_TOKEN, Pack, crc32c, row_dtype
from kvstore.store import Store
from tests.synthetic import (
    BLOCK,
    ENCODING,
    HEAD,
    HEAD_KEY,
    LAYOUT,
    MODEL,
    Document,
    build,
    make_encoding,
    make_store,
    make_units,
    new_writer,
    problems_with,
)

DOCUMENTS = [Document("a", lengths=(20,)), Document("b", lengths=(1, BLOCK, BLOCK + 1))]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced when is the matter of test_storage."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "kv.zarr")


@pytest.fixture
def pack(store: Store) -> Pack:
    name = build(store, DOCUMENTS)
    assert name is not None
    return Pack(store.storage, name)


def path_of(pack: Pack, name: str) -> Path:
    return pack.storage.path(f"{pack.folder}/{name}")


def test_what_goes_in_comes_out(store: Store, pack: Pack) -> None:
    assert problems_with(store, DOCUMENTS) == []
    segments = [pack.segment(i) for i in range(pack.manifest.segments)]
    assert [s.tokens for s in segments] == [len(HEAD), 20, 1, BLOCK, BLOCK + 1]
    assert [s.start for s in segments] == [0, 8, 32, 40, 48]
    assert [(s.context, s.parent, s.position) for s in segments[:2]] == [("anchor", None, 1), ("parent", HEAD_KEY, len(HEAD))]
    assert pack.manifest.slots == 64
    assert (pack.groups, list(pack.group_layers(1))) == (2, [2])


def test_one_segment_of_one_tier_is_one_range_of_units_and_checksums(pack: Pack) -> None:
    end = 0
    for row in range(pack.manifest.segments):
        segment = pack.segment(row)
        offset, size, digest = segment.ranges["t0"]
        records = [u for group in pack.units(segment, "t0", whole_records=True) for u in group]
        assert offset == end
        assert b"".join(records) == bytes(pack.range(segment, "t0"))
        assert sha256(pack.range(segment, "t0")) == digest
        assert all(struct.unpack("<I", r[-4:])[0] == crc32c(r[:-4]) for r in records)
        end += size


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    block=st.integers(1, 17),
    group_layers=st.integers(1, 5),
    contexts=st.lists(st.sampled_from(["root", "anchor", "parent"]), min_size=6, max_size=6),
)
def test_any_segments_in_any_geometry_come_out(store: Store, lengths: list[int], block: int, group_layers: int, contexts: list[str]) -> None:
    encoding = make_encoding(block=block, group_layers=group_layers)
    writer = new_writer(store.storage, encoding)
    wanted = []
    for i, tokens in enumerate(lengths):
        key, ids = sha256(bytes([i])), list(range(i, i + tokens))
        context = {"root": Context.root(), "anchor": Context.anchor([1, 2]), "parent": Context.parent("ab" * 32, 7)}[contexts[i]]
        units = make_units(key, tokens, encoding)
        writer.add(key, context, ids, units)
        wanted.append((key, context, ids, units))
    name = writer.close()
    assert name is not None
    pack = Pack(store.storage, name)
    for row, (key, context, ids, units) in enumerate(wanted):
        segment = pack.segment(row)
        parent = context.value if context.kind == "parent" else None
        assert (segment.key, segment.context, segment.parent, segment.position) == (key, context.kind, parent, context.tokens)
        assert pack.ids(segment).tolist() == ids
        for array in units:
            pack.check(segment, array)
            assert [[bytes(u) for u in g] for g in pack.units(segment, array)] == units[array]


def test_equal_input_gives_an_equal_name_and_another_input_another(tmp_path: Path) -> None:
    names = []
    for i, documents in enumerate((DOCUMENTS, DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[:1])):
        names.append(build(make_store(tmp_path / str(i) / "kv.zarr"), documents))
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_name_is_the_digest_of_the_group_metadata(pack: Pack) -> None:
    assert sha256(path_of(pack, "zarr.json").read_bytes()) == pack.name


def test_plain_zarr_reads_tokens_segments_and_attributes(store: Store, pack: Pack) -> None:
    group: Any = zarr.open_group(str(store.path / pack.folder), mode="r")
    assert group.attrs["kvstore"]["encoding_id"] == ENCODING.id
    assert group.attrs["kvstore"]["model"] == MODEL.key
    tokens, rows = group["tokens"], group["segments"]
    assert (tokens.dtype, tokens.shape, tokens.metadata.dimension_names) == (np.uint32, (64,), ("token",))
    assert np.array_equal(tokens[:], pack.token_ids)
    assert tokens[:].tolist()[:8] == [*HEAD, *[NO_TOKEN] * 4]
    assert np.array_equal(rows[:].reshape(-1).view(row_dtype(pack.arrays)), pack.rows)


def test_plain_zarr_finds_packs_through_the_root(store: Store, pack: Pack) -> None:
    root: Any = zarr.open_group(str(store.path), mode="r")
    assert list(root["packs"].group_keys()) == [pack.name]
    assert sorted(root["packs"][pack.name]["tokens"].metadata.to_dict()["attributes"]) == []


# writing


def test_wrong_shapes_are_refused_before_anything_is_written(store: Store) -> None:
    writer = new_writer(store.storage)
    units = make_units("ab" * 32, 20)
    with pytest.raises(ValueError, match="20 tokens need 2 groups of 3 blocks"):
        writer.add("ab" * 32, Context.root(), list(range(20)), units | {"t1": units["t1"][:1]})
    with pytest.raises(ValueError, match="17 tokens|25 tokens"):
        writer.add("ab" * 32, Context.root(), list(range(25)), units)
    with pytest.raises(ValueError, match="at least one token"):
        writer.add("ab" * 32, Context.root(), [], {"t0": [[], []], "t1": [[], []]})
    assert writer.close() is None
    assert store.storage.leftovers(0) == []


@pytest.mark.parametrize("where", ["between tiers", "in a unit", "after the units"])
def test_interrupted_segment_leaves_no_trace_in_the_pack(store: Store, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a segment is written must not damage the ones before and after it."""
    writer = new_writer(store.storage)
    first, second, third = (Document(n).tasks()[1] for n in "abc")
    writer.add(first.key, first.context, first.ids, make_units(first.key, len(first.ids)))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "between tiers":
            patch.setattr(writer._shards["t1"], "append", interrupt)
        elif where == "after the units":
            patch.setattr(writer, "_add_row", interrupt)
        else:
            write = writer._shards["t1"]._write
            calls = iter(range(100))
            patch.setattr(writer._shards["t1"], "_write", lambda *a: interrupt() if (write(*a), next(calls))[1] == 3 else (0, 0))
        with pytest.raises(KeyboardInterrupt):
            writer.add(second.key, second.context, second.ids, make_units(second.key, len(second.ids)))
    writer.add(third.key, third.context, third.ids, make_units(third.key, len(third.ids)))
    name = writer.close()
    assert name is not None
    pack = Pack(store.storage, name)
    assert [pack.segment(i).key for i in range(2)] == [first.key, third.key]
    for row, task in enumerate((first, third)):
        units = make_units(task.key, len(task.ids))
        for array in units:
            pack.check(pack.segment(row), array)
            assert [[bytes(u) for u in g] for g in pack.units(pack.segment(row), array)] == units[array]


def test_closing_twice_and_closing_nothing(store: Store) -> None:
    writer = new_writer(store.storage)
    assert writer.close() is None
    task = Document("a").tasks()[1]
    writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
    assert writer.close() is not None
    assert writer.close() is None


def test_rebuilding_mends_a_damaged_pack_in_place(store: Store, pack: Pack) -> None:
    """The remedy for damage is to build again, and the rebuilt pack has the same name."""
    shard = path_of(pack, "t1/c.0.0.0.0")
    shard.write_bytes(shard.read_bytes()[:-9])
    writer = new_writer(store.storage)
    for task in {t.key: t for d in DOCUMENTS for t in d.tasks()}.values():
        writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
    assert writer.close() == pack.name
    fresh = Store(store.path)
    assert problems_with(fresh, DOCUMENTS) == []


# damage

FILES = ["zarr.json"] + [f"{a}/{n}" for a, n in (("t0", "zarr.json"), ("t0", "c.0.0.0.0"), ("t1", "zarr.json"), ("t1", "c.0.0.0.0"),
         ("tokens", "zarr.json"), ("tokens", "c.0"), ("segments", "zarr.json"), ("segments", "c.0.0"))]  # fmt: skip


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda p: flip(p, 0),
    "a byte inside": lambda p: flip(p, 0.4),
    "last byte": lambda p: flip(p, 1),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-5]),
    "emptied": lambda p: p.write_bytes(b""),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0" * 20),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_never_served(store: Store, pack: Pack, file: str, damage: str, tmp_path: Path) -> None:
    DAMAGE[damage](path_of(pack, file))
    fresh = Store(store.path, cache=tmp_path / "another cache")
    errors: list[KvstoreError] = []
    for document in DOCUMENTS:
        try:
            assert [p for p in problems_with(fresh, [document]) if "not stored" not in p] == []
        except KvstoreError as error:
            errors.append(error)
    assert all(isinstance(e, (IntegrityError, NotFoundError)) and (file.split("/")[0] in str(e) or pack.name[:12] in str(e)) for e in errors)
    assert not errors or not file.endswith("/zarr.json"), "metadata of arrays is not needed to read"


def forge(store: Store, pack: Pack, manifest: Callable[[dict[str, Any]], object] | None = None, **files: bytes) -> Pack:
    """A pack that says something else, with every digest made to fit again: what a hostile sender can do."""
    folder = store.storage.path(pack.folder)
    document = json.loads((folder / "zarr.json").read_text())
    record = document["attributes"]["kvstore"]
    for name, data in files.items():
        path = name.replace("__", "/").replace("_", ".")
        (folder / path).write_bytes(data)
        entry = record["files"][path]
        entry["bytes"], entry["sha256"] = len(data), entry["sha256"] and sha256(data)
    if manifest is not None:
        manifest(record)
    data = msgspec.json.encode(document)
    (folder / "zarr.json").write_bytes(data)
    folder.rename(folder.parent / sha256(data))
    return Pack(store.storage, sha256(data))


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set `record[path[0]]...[path[-2]]` to `path[-1]`."""

    def change(record: dict[str, Any]) -> None:
        for name in path[:-2]:
            record = record[name]
        record[path[-2]] = path[-1]

    return change


def rid(record: dict[str, Any]) -> dict[str, Any]:
    """Make the encoding id fit a changed encoding."""
    with contextlib.suppress(msgspec.ValidationError):
        record["encoding_id"] = msgspec.convert(record["encoding"], Encoding).id
    return record


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": put("format", 2),
    "no version": lambda r: r.pop("format"),
    "another kind": put("kind", "model"),
    "unknown field": put("extra", 1),
    "missing field": lambda r: r.pop("slots"),
    "slots negative": put("slots", -8),
    "slots zero": put("slots", 0),
    "slots huge": put("slots", 1 << 62),
    "slots beyond 64 bits": put("slots", 10**30),
    "slots in no whole blocks": put("slots", 63),
    "slots more than the shard can index": put("slots", 1 << 30),
    "slots no number": put("slots", "64"),
    "slots a float": put("slots", 64.5),
    "segments negative": put("segments", -1),
    "segments huge": put("segments", 1 << 40),
    "layers huge": put("layout", "layers", 1 << 40),
    "layers zero": put("layout", "layers", 0),
    "layers more than named": put("layout", "layers", 4),
    "heads huge": put("layout", "kv_heads", 1 << 40),
    "head_dim negative": put("layout", "head_dim", -8),
    "dtype unknown": put("layout", "dtype", "int8"),
    "rope out of range": put("layout", "rope_of", [0, 1, 0]),
    "rope negative": put("layout", "rope_of", [0, -1, 0]),
    "rope wider than the head": put("layout", "ropes", 0, "dim", 16),
    "rope starts before the head": put("layout", "ropes", 0, "start", -2),
    "rope dim odd": put("layout", "ropes", 0, "dim", 7),
    "rope frequencies too few": put("layout", "ropes", 0, "inv_freq", "00" * 8),
    "rope frequencies no hex": put("layout", "ropes", 0, "inv_freq", "zz" * 16),
    "rope frequencies infinite": put("layout", "ropes", 0, "inv_freq", "0000807f" * 4),
    "block zero": lambda r: rid(put("encoding", "block_tokens", 0)(r) or r),
    "block negative": lambda r: rid(put("encoding", "block_tokens", -8)(r) or r),
    "block huge": lambda r: rid(put("encoding", "block_tokens", 1 << 40)(r) or r),
    "group zero": lambda r: rid(put("encoding", "group_layers", 0)(r) or r),
    "no tiers": lambda r: rid(put("encoding", "tiers", [])(r) or r),
    "array climbs out": lambda r: rid(put("encoding", "tiers", 0, "array", "../../..")(r) or r),
    "array is a reserved folder": lambda r: rid(put("encoding", "tiers", 0, "array", "tokens")(r) or r),
    "array twice": lambda r: rid(put("encoding", "tiers", 0, "array", "t1")(r) or r),
    "tier needs what is above it": lambda r: rid(put("encoding", "tiers", 0, "requires", ["fine"])(r) or r),
    "tier names no codec": lambda r: rid(put("encoding", "tiers", 0, "codec", "other")(r) or r),
    "encoding id of another": put("encoding_id", "ab" * 32),
    "file missing from the list": lambda r: r["files"].pop("tokens/c.0"),
    "file outside": put("files", "../../zarr.json", {"bytes": 1, "sha256": "ab" * 32}),
    "file size negative": put("files", "t0/c.0.0.0.0", {"bytes": -1, "sha256": None}),
    "file without digest": put("files", "segments/c.0.0", {"bytes": 1, "sha256": None}),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_manifest_is_refused_before_anything_is_allocated(store: Store, pack: Pack, how: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            forge(store, pack, HOSTILE[how])
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    assert "zarr.json" in str(caught.value)


def test_unchanged_forgery_is_accepted(store: Store, pack: Pack) -> None:
    """Else the refusals above would prove nothing."""
    assert forge(store, pack, lambda r: rid(r)).segment(0).tokens == len(HEAD)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"[" * 100_000, b'{"attributes": {"kvstore": []}}', b"\xff\xfe", b'{"a": 1e999}'])
def test_group_metadata_that_is_none(store: Store, pack: Pack, text: bytes) -> None:
    folder = store.storage.path(pack.folder)
    (folder / "zarr.json").write_bytes(text)
    folder.rename(folder.parent / sha256(text))
    with pytest.raises((FormatError, IntegrityError)):
        Pack(store.storage, sha256(text))


HOSTILE_ROWS: dict[str, tuple[str, int]] = {
    "start beyond the axis": ("start", 1 << 40),
    "start beyond 63 bits": ("start", (1 << 64) - 8),
    "start in a block": ("start", 3),
    "start on another segment": ("start", 8),
    "more tokens than there are": ("tokens", 1 << 31),
    "tokens that reach the next": ("tokens", 30),
    "no token": ("tokens", 0),
    "unknown context": ("context", 3),
    "offset beyond the file": ("t0.offset", 1 << 50),
    "offset beyond 63 bits": ("t0.offset", (1 << 64) - 1),
    "bytes beyond the file": ("t1.nbytes", 1 << 50),
    "bytes of the next": ("t1.nbytes", 2000),
}


@pytest.mark.parametrize("how", HOSTILE_ROWS)
def test_hostile_rows_are_refused(store: Store, pack: Pack, how: str) -> None:
    rows = pack.rows.copy()
    field, value = HOSTILE_ROWS[how]
    rows[field][0] = value
    forged = forge(store, pack, segments__c_0_0=rows.tobytes())
    with pytest.raises(IntegrityError, match="segments"):
        _ = forged.rows


def test_hostile_shard_index_is_refused(store: Store, pack: Pack) -> None:
    data = bytearray(path_of(pack, "t0/c.0.0.0.0").read_bytes())
    entries = pack.index("t0").copy()
    start = len(data) - entries.nbytes - 4
    for offset, length in ((1 << 50, 20), (0, 1 << 50), ((1 << 64) - 4, 8), (0, 3), (0, 0)):
        entries[0, 0] = offset, length
        index = entries.tobytes()
        path_of(pack, "t0/c.0.0.0.0").write_bytes(data[:start] + index + struct.pack("<I", crc32c(index)))
        opened = Pack(store.storage, pack.name)
        with pytest.raises(IntegrityError, match="outside its range"):
            opened.units(opened.segment(0), "t0")


def test_token_ids_that_unpack_to_anything_are_refused(store: Store, pack: Pack) -> None:
    bomb = gzip.compress(bytes(1 << 27), 9)
    forged = forge(store, pack, tokens__c_0=bomb)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="tokens"):
            _ = forged.token_ids
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 64, gzip.compress(b"\0" * 64, mtime=0), gzip.compress(b"\0" * 256, mtime=0)[:-6]],
    ids=["empty", "zeros", "short", "cut"],
)
def test_token_ids_that_are_no_stream_are_refused(store: Store, pack: Pack, data: bytes) -> None:
    forged = forge(store, pack, tokens__c_0=data or b"\0")
    with pytest.raises(IntegrityError, match="tokens"):
        _ = forged.token_ids


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_noticed_or_changes_nothing(store: Store, pack: Pack, data: st.DataObject) -> None:
    path = path_of(pack, data.draw(st.sampled_from(FILES)))
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[data.draw(st.integers(0, len(before) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    tasks = {t.key: t for d in DOCUMENTS for t in d.tasks()}
    try:
        opened = Pack(store.storage, pack.name)
        for row, task in enumerate(tasks.values()):
            segment = opened.segment(row)
            assert (segment.key, tuple(opened.ids(segment).tolist())) == (task.key, task.ids)
            for array, wanted in make_units(task.key, len(task.ids)).items():
                opened.check(segment, array)
                assert [[bytes(u) for u in g] for g in opened.units(segment, array)] == wanted
        assert path.name == "zarr.json", "only the metadata of arrays is not read"
    except KvstoreError:
        pass
    finally:
        path.write_bytes(before)


def test_layout_is_that_of_the_manifest(pack: Pack) -> None:
    assert pack.layout == LAYOUT
    assert pack.encoding == ENCODING
