"""The index is a cache: whatever happens to its file, look-ups say what the store holds."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.errors import IntegrityError, NotFoundError
from kvstore.gc import collect, remove
from kvstore.index import Index, cache_folder
from kvstore.pack import Pack
from kvstore.store import Store
from tests.synthetic import ENCODING, HEAD_KEY, Document, build, make_encoding, make_store, problems_with

DOCUMENTS = [Document("a"), Document("b", lengths=(9, 30))]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store(tmp_path / "kv.zarr")
    build(store, DOCUMENTS)
    return store


def index_file(store: Store) -> Path:
    (found,) = (store.path.parent / "cache").glob("*.sqlite")
    return found


def again(store: Store) -> Store:
    return Store(store.path, cache=store.path.parent / "cache")


def test_says_what_is_stored(store: Store) -> None:
    index = store.index
    keys = [t.key for d in DOCUMENTS for t in d.tasks()]
    assert all(index.has(k, ENCODING.id) for k in keys)
    assert not index.has("ab" * 32, ENCODING.id)
    assert not index.has(HEAD_KEY, "ab" * 32)
    assert index.encodings(HEAD_KEY) == [ENCODING.id]
    assert [r.source for r in index.rows()] == ["a", "b"]
    assert index.rows("b") == [DOCUMENTS[1].row()]
    assert index.number() == 1
    count, tokens, nbytes = index.totals()
    assert (count, tokens) == (4, 4 + 20 + 9 + 30)
    (name,) = index.packs()
    rows = Pack(store.storage, name).rows
    assert nbytes == int(rows["t0.nbytes"].sum() + rows["t1.nbytes"].sum())


def test_one_artifact_in_two_encodings(store: Store) -> None:
    other = make_encoding("other")
    build(store, DOCUMENTS, encoding=other)
    assert store.index.encodings(HEAD_KEY) == sorted([ENCODING.id, other.id])
    assert problems_with(store, DOCUMENTS) == problems_with(store, DOCUMENTS, other) == []


def test_open_index_sees_what_others_commit_only_after_refresh(store: Store) -> None:
    reader = again(store)
    build(store, [Document("c")])
    reader.refresh()
    assert reader.sources() == ["a", "b", "c"]
    remove(store, ["a"])
    assert "a" in reader.sources() or reader.number == 3  # one file serves both
    reader.refresh()
    assert reader.sources() == ["b", "c"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)


RUIN: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(os.urandom(20_000)),
    "text": lambda p: p.write_text("not a database at all, but a text that is long enough to be read as a header" * 9),
    "truncated": cut,
    "pages scrambled": scramble,
    "stray journal": lambda p: p.with_name(p.name + "-journal").write_bytes(os.urandom(4096)),
}


@pytest.mark.parametrize("ruin", RUIN)
def test_ruined_file_is_rebuilt(store: Store, ruin: str) -> None:
    RUIN[ruin](index_file(store))
    fresh = again(store)
    assert fresh.sources() == ["a", "b"]
    assert problems_with(fresh, DOCUMENTS) == []
    fresh.index.close()
    assert problems_with(again(store), DOCUMENTS) == []


@pytest.mark.parametrize("ruin", ["truncated", "pages scrambled", "garbage"])
def test_file_that_is_ruined_while_open_is_rebuilt(store: Store, ruin: str) -> None:
    store.index._db.execute("pragma cache_size = 0")
    RUIN[ruin](index_file(store))
    assert store.sources() == ["a", "b"]
    assert problems_with(store, DOCUMENTS) == []
    build(store, [Document("c")])
    assert store.sources() == ["a", "b", "c"]


def test_unwritable_cache_folder_means_memory(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    fresh = Store(store.path, cache=tmp_path / "file" / "cache")
    assert problems_with(fresh, DOCUMENTS) == []
    build(fresh, [Document("c")])
    assert fresh.sources() == ["a", "b", "c"]


def test_read_only_index_file_means_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a prepared cache: it can be opened, and fails at the first write."""
    build(again(store), [])
    connect = sqlite3.connect

    def read_only(path: str, **options: object) -> sqlite3.Connection:
        return connect(path if path == ":memory:" else f"file:{path}?mode=ro", uri=True, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", read_only)
    fresh = again(store)
    assert fresh.sources() == ["a", "b"]
    build(fresh, [Document("c")])
    assert problems_with(fresh, [*DOCUMENTS, Document("c")]) == []


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVSTORE_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
    monkeypatch.delenv("KVSTORE_CACHE")
    assert "kvstore" in str(cache_folder())


def test_two_copies_of_one_store_do_not_mix(store: Store) -> None:
    """They have the same id, and differ from the first change on."""
    copy = store.path.parent / "copy.zarr"
    shutil.copytree(store.path, copy)
    other = Store(copy, cache=store.path.parent / "cache")
    build(other, [Document("c")])
    remove(store, ["a"])
    store.refresh()
    assert (store.sources(), other.sources()) == (["b"], ["a", "b", "c"])
    assert problems_with(other, [*DOCUMENTS, Document("c")]) == []


def test_hostile_store_id_does_not_lead_out_of_the_cache_folder(tmp_path: Path, store: Store) -> None:
    Index(store.storage, "../../outside", tmp_path / "deep" / "cache").close()
    assert [p.parent for p in tmp_path.rglob("*.sqlite") if "deep" in p.parts] == [tmp_path / "deep" / "cache"]


# damaged packs


def spoil(store: Store, name: str, file: str = "zarr.json") -> Path:
    path = store.storage.path(f"packs/{name}/{file}")
    path.write_bytes(path.read_bytes()[:-3] + b"   ")
    return path


@pytest.mark.parametrize("file", ["zarr.json", "segments/c.0.0"])
def test_damaged_pack_is_left_out_and_the_others_are_served(store: Store, file: str, caplog: pytest.LogCaptureFixture) -> None:
    name = build(store, [Document("c")])
    assert name is not None
    path = store.storage.path(f"packs/{name}/{file}")
    before = path.read_bytes()
    spoil(store, name, file)
    index_file(store).unlink()
    fresh = again(store)
    assert list(fresh.index.damaged) == [name]
    assert f"pack {name[:12]} is damaged" in caplog.text
    assert problems_with(fresh, DOCUMENTS) == []
    with pytest.raises(NotFoundError):
        fresh.stored(Document("c").tasks()[1].key, ENCODING.id)
    assert fresh.sources() == ["a", "b", "c"]
    caplog.clear()
    fresh.refresh()
    assert caplog.text == "", "said once"
    path.write_bytes(before)
    os.utime(path.parent if file == "zarr.json" else path.parent.parent)
    fresh.refresh()
    assert fresh.index.damaged == {}
    assert problems_with(fresh, [Document("c")]) == []


def test_pack_without_its_group_metadata_is_damaged_not_absent(store: Store) -> None:
    (name,) = store.index.packs()
    store.storage.path(f"packs/{name}/zarr.json").unlink()
    index_file(store).unlink()
    assert list(again(store).index.damaged) == [name]


def test_building_again_brings_back_what_was_in_a_damaged_pack(store: Store) -> None:
    (name,) = store.index.packs()
    spoil(store, name)
    index_file(store).unlink()
    fresh = again(store)
    assert build(fresh, DOCUMENTS) == name
    assert problems_with(fresh, DOCUMENTS) == []
    assert fresh.index.damaged == {}


def test_intact_copy_is_served_where_another_is_damaged(store: Store) -> None:
    (first,) = store.index.packs()
    away = store.path.parent / "away"
    store.storage.path(f"packs/{first}").rename(away)
    store.refresh()
    build(store, [Document("c"), *DOCUMENTS])
    away.rename(store.storage.path(f"packs/{first}"))
    store.refresh()
    spoil(store, first)
    store.index._packs.clear()
    assert problems_with(store, DOCUMENTS) == []
    for name in set(store.index.packs()) - {first}:
        spoil(store, name)
    store.index._packs.clear()
    with pytest.raises(IntegrityError):
        store.stored(HEAD_KEY, ENCODING.id)


# others at work


def test_find_follows_what_gc_moved(store: Store, tmp_path: Path) -> None:
    reader = Store(store.path, cache=tmp_path / "reader's cache")
    assert reader.stored(HEAD_KEY, ENCODING.id)
    remove(store, ["b"])
    report = collect(store, keep_snapshots=1, grace_seconds=0)
    assert len(report.packs_rewritten) == 1
    assert problems_with(reader, DOCUMENTS[:1]) == []


def test_older_view_never_overwrites_a_newer_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes share the file; the one that listed first may write last."""
    slow, fast = again(store), again(store)
    transaction = Index._transaction

    def overtaken(self: Index) -> object:
        if self is slow.index:
            monkeypatch.setattr(Index, "_transaction", transaction)
            build(fast, [Document("d")])
        return transaction(self)

    build(Store(store.path, cache=store.path.parent / "elsewhere"), [Document("c")])
    monkeypatch.setattr(Index, "_transaction", overtaken)
    slow.refresh()
    for view in (slow, fast):
        assert view.sources() == ["a", "b", "c", "d"]
        assert view.index.has(Document("d").tasks()[1].key, ENCODING.id)
