"""gc takes what nobody needs, never what somebody does, and loses nothing when it is stopped or races others."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.collector import Collector, GcRules
from kvstore.errors import InputError, IntegrityError, KvstoreError, NotFoundError, StorageError
from kvstore.gc import collect, remove, rows_of
from kvstore.identity import Context, segment_key
from kvstore.pack import REMEDY, Pack
from kvstore.snapshot import FULL_EVERY, Change, file_name
from kvstore.store import Store
from kvstore.tags import add_tag, list_tags, remove_tag
from kvstore.verify import verify
from tests.synthetic import (
    ENCODING,
    HEAD_KEY,
    LAYOUT,
    MODEL,
    Document,
    build,
    files_of,
    make_encoding,
    make_store,
    make_units,
    new_writer,
    problems_with,
)

A, B, C = Document("a", lengths=(30,)), Document("b", lengths=(9, 30)), Document("c", lengths=(17,))
NOW: dict[str, Any] = {"keep_snapshots": 1, "grace_seconds": 0}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "kv.zarr")


def keys_in(store: Store) -> list[str]:
    """Keys of all stored segments, with repetitions."""
    packs = (Pack(store.storage, n) for n in store.storage.names("packs"))
    return sorted(p.segment(i).key for p in packs for i in range(p.manifest.segments))


def digests_in(store: Store) -> dict[tuple[str, str], str]:
    """(segment, tier array) -> sha256."""
    packs = [Pack(store.storage, n) for n in store.storage.names("packs")]
    segments = [p.segment(i) for p in packs for i in range(p.manifest.segments)]
    return {(s.key, a): sha for s in segments for a, (_, _, sha) in s.ranges.items()}


def make_old(store: Store, *names: str) -> None:
    for name in names or store.storage.names("packs"):
        os.utime(store.storage.path(f"packs/{name}"), (1, 1))


def sound(store: Store) -> bool:
    return verify(store.path).ok


# what stays and what goes


def test_nothing_to_do_changes_nothing(store: Store) -> None:
    build(store, [A, B])
    before = files_of(store)
    report = collect(store, **NOW)
    assert (report.packs_removed, report.packs_rewritten, report.bytes_freed) == ([], {}, 0)
    assert (report.packs_kept, report.artifacts_kept, report.snapshots_kept) == (1, 4, [1])
    assert files_of(store) == before


def test_pack_without_anything_alive_goes(store: Store) -> None:
    build(store, [A])
    (first,) = store.index.packs()
    newer = Document("a", 1, (30,))
    build(store, [newer, B], removed=[])
    remove(store, ["a"])
    build(store, [C])
    report = collect(store, **NOW)
    assert set(report.packs_rewritten) >= {first}  # the head lives there
    assert sorted(keys_in(store)) == sorted({t.key for d in (B, C) for t in d.tasks()})
    assert sound(store)
    remove(store, ["b", "c"])
    report = collect(store, **NOW)
    assert len(report.packs_removed) == 3
    assert keys_in(store) == []
    assert store.sources() == []
    assert report.bytes_freed > 0


def test_rewritten_pack_holds_the_same_bytes_under_the_same_digests(store: Store) -> None:
    build(store, [A, B, C])
    (old,) = store.index.packs()
    before, manifest = digests_in(store), Pack(store.storage, old).manifest
    remove(store, ["a"])
    size = sum(len(d) for n, d in files_of(store).items() if n.startswith("packs/"))
    report = collect(store, **NOW)
    new = report.packs_rewritten[old]
    after = Pack(store.storage, new).manifest
    assert digests_in(store) == {k: v for k, v in before.items() if k[0] not in {t.key for t in A.tasks()[1:]}}
    assert (after.provenance, after.model, after.encoding, after.layout) == (manifest.provenance, manifest.model, manifest.encoding, manifest.layout)
    assert report.bytes_freed == size - sum(len(d) for n, d in files_of(store).items() if n.startswith("packs/"))
    assert (report.artifacts_dropped, report.artifacts_kept) == (1, 4)
    assert problems_with(store, [B, C]) == []
    assert sound(store)
    assert collect(store, **NOW).packs_rewritten == {}


def test_little_waste_is_left_where_it_is(store: Store) -> None:
    build(store, [A, B, C])
    remove(store, ["c"])
    (name,) = store.index.packs()
    pack = Pack(store.storage, name)
    sizes = pack.rows["t0.nbytes"] + pack.rows["t1.nbytes"]
    share = float(sizes[-1]) / float(sizes.sum())
    assert collect(store, **NOW, rewrite_share=share + 0.01).packs_rewritten == {}
    assert collect(store, **NOW, rewrite_share=share - 0.01).packs_rewritten != {}
    assert problems_with(store, [A, B]) == []


def test_newest_snapshots_and_tags_hold_what_they_name(store: Store) -> None:
    versions = [Document("a", v, (30,)) for v in range(6)]
    for version in versions:
        build(store, [version])
    add_tag(store.storage, "release", 2)
    report = collect(store, keep_snapshots=2, grace_seconds=0)
    assert store.snapshots.numbers() == [1, 2, 3, 4, 5, 6] == report.snapshots_kept  # one chain down to the full list
    kept = {t.key for i in (1, 4, 5) for t in versions[i].tasks()}
    assert set(keys_in(store)) == kept
    assert remove_tag(store.storage, "release") == 2
    collect(store, keep_snapshots=1, grace_seconds=0)
    assert set(keys_in(store)) == {t.key for t in versions[5].tasks()}
    assert problems_with(store, [versions[5]]) == []


def test_snapshots_go_unless_a_kept_one_is_written_against_them(store: Store) -> None:
    build(store, [A])
    for n in range(FULL_EVERY + 3):
        store.commit(Change((msgspec.structs.replace(A.row(), metadata={"n": n}),)), "")
    newest = FULL_EVERY + 4
    wanted = {n: store.snapshots.rows(n) for n in (newest, newest - 1)}
    report = collect(store, keep_snapshots=2, grace_seconds=0)
    assert store.snapshots.numbers() == [FULL_EVERY, FULL_EVERY + 1, FULL_EVERY + 2, FULL_EVERY + 3, newest] == report.snapshots_kept
    assert report.snapshots_removed == list(range(1, FULL_EVERY))
    assert {n: store.snapshots.rows(n) for n in wanted} == wanted
    assert store.commit(Change((B.row(),) if False else (), (A.row().id,)), "goes on") == newest + 1
    assert sound(store)


def test_stopped_while_snapshots_go_leaves_a_whole_chain(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store, [A])
    for n in range(2 * FULL_EVERY):
        store.commit(Change((msgspec.structs.replace(A.row(), metadata={"n": n}),)), "")
    unlink, calls = os.unlink, iter(range(100))

    def stopping(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 37:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stopping)
        with pytest.raises(KeyboardInterrupt):
            collect(store, **NOW)
    assert FULL_EVERY < len(store.snapshots.numbers()) < 2 * FULL_EVERY
    for number in store.snapshots.numbers():
        assert len(store.snapshots.rows(number)) == 1
    assert sound(store)
    collect(store, **NOW)
    assert store.snapshots.numbers() == [2 * FULL_EVERY, 2 * FULL_EVERY + 1]


def test_parents_stay_though_no_row_names_them(store: Store) -> None:
    """A chain of three; the row names only its end."""
    writer, chain, ids = new_writer(store.storage), [], [1, 2, 3]
    context = Context.root()
    for _ in range(3):
        key = segment_key(MODEL, LAYOUT, context, ids)
        writer.add(key, context, ids, make_units(key, 3))
        chain.append(key)
        context = Context.parent(key, context.tokens + 3)
    stray = segment_key(MODEL, LAYOUT, Context.parent(chain[0], 3), [9])
    writer.add(stray, Context.parent(chain[0], 3), [9], make_units(stray, 1))
    writer.close()
    passage = msgspec.structs.replace(A.row().passages[0], tokens=3, prefix=chain[2])
    store.commit(Change((msgspec.structs.replace(A.row(), head=None, passages=(passage,)),)), "")
    collect(store, **NOW, rewrite_share=0)
    assert keys_in(store) == sorted(chain)


def test_encodings_are_collected_apart(store: Store) -> None:
    other = make_encoding("other")
    build(store, [A, B])
    build(store, [A], encoding=other)
    assert remove(store, ["a"], encoding=other.id[:10]) == 3
    report = collect(store, **NOW)
    assert len(report.packs_removed) == 1
    assert problems_with(store, [A, B]) == []
    assert store.index.encodings(HEAD_KEY) == [ENCODING.id]


def test_young_packs_are_never_touched(store: Store) -> None:
    """A builder renames its pack first and links its snapshot then."""
    name = build(store, [A, B])
    assert name is not None
    remove(store, ["a", "b"])
    for grace in (3600, 1e9):
        assert collect(store, keep_snapshots=1, grace_seconds=grace).packs_kept == 1
    make_old(store)
    assert collect(store, keep_snapshots=1, grace_seconds=3600).packs_removed == [name]


def test_same_artifact_in_two_packs_is_kept_once(store: Store) -> None:
    names = []
    for documents in ([A, B], [B, A, C]):
        writer = new_writer(store.storage)
        for task in {t.key: t for d in documents for t in d.tasks()}.values():
            writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
        names.append(writer.close())
    store.commit(Change((A.row(), B.row(), C.row())), "")
    assert len(keys_in(store)) == 4 + 5
    first, second = sorted(n for n in names if n is not None)
    report = collect(store, **NOW)
    assert report.packs_removed + list(report.packs_rewritten) == [second]
    assert first in store.storage.names("packs")
    assert keys_in(store) == sorted({t.key for d in (A, B, C) for t in d.tasks()})
    assert problems_with(store, [A, B, C]) == []
    assert sound(store)


def test_rest_of_a_stopped_rewrite_is_dropped_by_the_next_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store, [A, B])
    remove(store, ["a"])
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "_retire", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(store, **NOW)
    assert len(store.storage.names("packs")) == 2
    assert problems_with(store, [B]) == []
    collect(store, **NOW)
    assert keys_in(store) == sorted(t.key for t in B.tasks())
    assert sound(store)


def test_leftovers_of_crashed_writers_go_after_the_grace_period(store: Store) -> None:
    build(store, [A])
    writer = new_writer(store.storage)
    task = C.tasks()[1]
    writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
    assert collect(store, keep_snapshots=1).leftovers_removed == 0
    assert collect(store, **NOW, dry_run=True).leftovers_removed == 1
    assert store.storage.leftovers(0) != []
    report = collect(store, **NOW)
    assert (report.leftovers_removed, store.storage.leftovers(0)) == (1, [])


@pytest.mark.parametrize("call", ["unlink", "rename"])
def test_slow_writer_whose_folder_is_swept_publishes_nothing(store: Store, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspended machine wakes up: the writer goes on while its folder is being deleted. Half a pack must not get a name."""
    writer, outcomes = new_writer(store.storage), list[str]()
    for task in B.tasks():
        writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))

    def publish() -> None:
        try:
            outcomes.append(writer.close() or "")
        except StorageError:
            outcomes.append("refused")

    race(monkeypatch, os, call, publish)
    collect(store, **NOW)
    assert outcomes == (["refused"] if call == "unlink" else store.storage.names("packs"))
    assert sound(store)


def test_dry_run_says_the_same_and_changes_nothing(store: Store) -> None:
    build(store, [A, B])
    build(store, [C])
    remove(store, ["a", "c"])
    before = files_of(store)
    said = collect(store, **NOW, dry_run=True)
    assert files_of(store) == before
    did = collect(store, **NOW)
    assert said.dry_run
    assert not did.dry_run
    assert (said.packs_removed, list(said.packs_rewritten)) == (did.packs_removed, list(did.packs_rewritten))
    assert (said.artifacts_dropped, said.artifacts_kept) == (did.artifacts_dropped, did.artifacts_kept)
    assert (said.snapshots_removed, said.snapshots_kept) == (did.snapshots_removed, did.snapshots_kept)
    assert said.bytes_freed > 0


@pytest.mark.parametrize("wrong", [{"keep_snapshots": 0}, {"grace_seconds": -1}, {"rewrite_share": 1.5}, {"rewrite_share": -0.1}])
def test_senseless_rules_are_refused(store: Store, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        collect(store, **wrong)


# damage


def spoil(store: Store, pack: str, key: str, array: str = "t0") -> None:
    """Flip one byte of one segment."""
    opened = Pack(store.storage, pack)
    segment = next(s for s in map(opened.segment, range(opened.manifest.segments)) if s.key == key)
    path = store.storage.path(f"packs/{pack}/{array}/c.0.0.0.0")
    data = bytearray(path.read_bytes())
    data[segment.ranges[array][0] + 5] ^= 1
    path.write_bytes(data)


def test_damaged_segment_is_not_copied_and_its_pack_is_left_alone(store: Store) -> None:
    name = build(store, [A, B, C])
    assert name is not None
    remove(store, ["a"])
    spoil(store, name, B.tasks()[1].key)
    before = files_of(store)
    report = collect(store, **NOW)
    assert report.packs_rewritten == {}
    assert report.damaged
    assert report.damaged[0].startswith(name)
    assert B.tasks()[1].key[:12] in report.damaged[0]
    assert {k: v for k, v in files_of(store).items() if k.startswith("packs")} == {k: v for k, v in before.items() if k.startswith("packs")}
    assert store.storage.leftovers(0) == []


def test_damage_in_what_is_dead_does_not_matter(store: Store) -> None:
    name = build(store, [A, B])
    assert name is not None
    remove(store, ["a"])
    spoil(store, name, A.tasks()[1].key)
    report = collect(store, **NOW)
    assert list(report.packs_rewritten) == [name]
    assert sound(store)


def test_unreadable_pack_is_reported_and_left_alone(store: Store) -> None:
    name = build(store, [A])
    build(store, [B])
    path = store.storage.path(f"packs/{name}/zarr.json")
    path.write_bytes(path.read_bytes() + b" ")
    report = collect(store, **NOW)
    assert report.damaged == [f"{name}: packs/{name}/zarr.json does not match its name; {REMEDY}"]
    assert store.storage.exists(f"packs/{name}")


def test_intact_copy_wins_over_a_damaged_one(store: Store) -> None:
    names = []
    for documents in ([A, B], [B, A]):
        writer = new_writer(store.storage)
        for task in {t.key: t for d in documents for t in d.tasks()}.values():
            writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
        names.append(writer.close() or "")
    store.commit(Change((A.row(), B.row())), "")
    spoil(store, min(names), A.tasks()[1].key)
    collect(store, **NOW)
    assert sound(store)
    assert problems_with(store, [A, B]) == []
    assert len(keys_in(store)) == 4


@pytest.mark.parametrize("file", ["t0/c.0.0.0.0", "t0/zarr.json", "tokens/c.0", "tokens/zarr.json", "segments/c.0.0", "zarr.json", "extra"])
@pytest.mark.parametrize("how", ["flipped", "deleted", "truncated"])
def test_dropping_damage_and_building_again_restores_the_store(store: Store, file: str, how: str) -> None:
    build(store, [A])
    name = build(store, [A, B, C])
    path = store.storage.path(f"packs/{name}/{file}")
    if file == "extra":
        path.write_bytes(b"x")
    elif how == "deleted":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data if how == "flipped" else data[:-1])
    assert not sound(store)
    report = collect(store, drop_damaged=True)
    assert report.damaged
    fresh = Store(store.path, cache=store.path.parent / "fresh")
    build(fresh, [A, B, C])
    assert problems_with(fresh, [A, B, C]) == []
    assert sound(fresh)


def test_dropping_damage_keeps_what_is_intact_in_young_packs(store: Store) -> None:
    """Also what a builder has not committed yet."""
    name = build(store, [A, B, C])
    assert name is not None
    remove(store, ["c"])
    spoil(store, name, A.tasks()[1].key)
    report = collect(store, keep_snapshots=1, grace_seconds=3600, drop_damaged=True)
    assert (report.artifacts_dropped, report.artifacts_kept) == (1, 4)
    assert set(keys_in(store)) == {t.key for d in (B, C) for t in d.tasks()}
    assert "missing artifact" in str(verify(store.path).problems)


def test_unreadable_snapshot_stops_everything(store: Store) -> None:
    build(store, [A])
    build(store, [B])
    remove(store, ["a"])
    path = store.storage.path(file_name(2))
    path.write_bytes(path.read_bytes().replace(b"test", b"tost"))
    before = files_of(store)
    with pytest.raises(IntegrityError, match="000000000002"):
        collect(store, **NOW)
    assert files_of(store) == before


def test_store_that_lost_its_snapshots_keeps_its_packs(store: Store) -> None:
    """As after a copy that left out hidden folders."""
    build(store, [A, B])
    store.storage.retire(".kvstore/snapshots")
    before = files_of(store)
    report = collect(store, **NOW)
    assert (report.packs_kept, report.packs_removed, report.snapshots_kept) == (1, [], [])
    assert files_of(store) == before


def test_unreadable_tag_stops_everything(store: Store) -> None:
    build(store, [A])
    store.storage.create(".kvstore/tags/x.json", b"{")
    with pytest.raises(KvstoreError):
        collect(store, **NOW)
    assert problems_with(store, [A]) == []


# others at work


def race(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], object]) -> None:
    """Let `act` happen right before the first call of `owner.name`."""
    call = getattr(owner, name)

    def overtaken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, call)
        act()
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, overtaken)


@pytest.mark.parametrize("moment", ["_copy", "_retire", "_move_in"])
def test_row_committed_while_gc_runs_keeps_its_pack(store: Store, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder finds the dead segment still stored, and commits a row that needs it."""
    build(store, [A, B])
    remove(store, ["a"])
    builder = Store(store.path, cache=store.path.parent / "builder")
    race(monkeypatch, Collector, moment, lambda: builder.commit(Change((A.row(),)), "back again"))
    collect(store, **NOW)
    assert problems_with(store, [A, B]) == []
    assert sound(store)
    collect(store, **NOW)
    assert problems_with(store, [A, B]) == []
    assert len(keys_in(store)) == len(set(keys_in(store)))


@pytest.mark.parametrize("moment", ["snapshots", "packs", "_settle", "_judge", "_retire"])
def test_new_pack_published_and_committed_while_gc_runs(store: Store, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store, [A, B])
    remove(store, ["a"])
    builder = Store(store.path, cache=store.path.parent / "builder")
    race(monkeypatch, Collector, moment, lambda: build(builder, [C]))
    collect(store, **NOW)
    assert problems_with(store, [B, C]) == []
    assert sound(store)


@pytest.mark.parametrize("moment", ["packs", "_settle", "_judge", "_copy", "_retire"])
def test_gc_overtaken_by_another_gc(store: Store, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for documents in ([A, B], [B, A, C], [C, B]):
        writer = new_writer(store.storage)
        for task in {t.key: t for d in documents for t in d.tasks()}.values():
            writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
        writer.close()
    store.commit(Change((A.row(), B.row())), "")
    other = Store(store.path, cache=store.path.parent / "other")
    race(monkeypatch, Collector, moment, lambda: collect(other, **NOW))
    collect(store, **NOW)
    store.refresh()
    assert problems_with(store, [A, B]) == []
    assert sound(store)


def test_tag_added_while_gc_runs_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store, [A])
    build(store, [Document("a", 1, (30,))])
    race(monkeypatch, Collector, "_retire", lambda: add_tag(store.storage, "late", 1))
    collect(store, **NOW)
    assert A.tasks()[1].key in keys_in(store)
    assert list_tags(store.storage) == {"late": 1}


def test_builders_and_collectors_side_by_side_lose_nothing(store: Store) -> None:
    """Threads that edit, remove and commit against threads that collect without any grace."""
    stop, committed = time.monotonic() + 4, dict[str, Document]()
    failures: list[str] = []

    def builder(who: int) -> None:
        mine, rng, version = Store(store.path, cache=store.path.parent / f"cache{who}"), random.Random(who), 0
        while time.monotonic() < stop:
            document = Document(f"{who}/{rng.randrange(3)}", version := version + 1 if rng.random() < 0.5 else version, (20,))
            try:
                build(mine, [document])
                committed[document.source] = document
            except StorageError as error:
                if error.code != "collected" and "tmp" not in str(error) and "publishing" not in str(error):
                    failures.append(repr(error))

    def collector(who: int) -> None:
        mine = Store(store.path, cache=store.path.parent / f"gc{who}")
        while time.monotonic() < stop:
            run = Collector(mine.storage, GcRules(1 + who, 0, 0.0))
            run.snapshots()
            run.packs()  # the leftovers of builders at work are theirs

    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(builder, i) for i in range(3)] + [pool.submit(collector, i) for i in range(2)]
        for job in jobs:
            job.result()
    assert not failures
    assert len(committed) > 3
    fresh = Store(store.path, cache=store.path.parent / "fresh")
    assert problems_with(fresh, committed.values()) == []
    assert sound(fresh)
    assert threading.active_count() < 50


# rm and tags


def test_removed_documents_are_gone_from_the_newest_snapshot_only(store: Store) -> None:
    build(store, [A, B, C])
    assert [r.source for r in rows_of(store, ["a", "c", "a"])] == ["a", "c"]
    assert remove(store, ["a", "c"]) == 2
    store.refresh()
    assert store.sources() == ["b"]
    assert sorted(r.source for r in store.snapshots.rows(1).values()) == ["a", "b", "c"]
    assert keys_in(store) == sorted({t.key for d in (A, B, C) for t in d.tasks()}), "bytes stay until gc"


def test_unknown_document_removes_nothing(store: Store) -> None:
    build(store, [A])
    for sources, filters in ((["a", "nothing"], {}), (["a"], {"encoding": "ff"}), (["a#0"], {})):
        with pytest.raises(NotFoundError, match="nothing was removed"):
            remove(store, sources, **filters)
    assert store.snapshots.newest() == 1


def test_tags_name_snapshots(store: Store) -> None:
    with pytest.raises(NotFoundError, match="no snapshot 0"):
        add_tag(store.storage, "early")
    build(store, [A])
    build(store, [B])
    assert (add_tag(store.storage, "v1", 1), add_tag(store.storage, "v2.0-rc_1")) == (1, 2)
    assert list_tags(store.storage) == {"v1": 1, "v2.0-rc_1": 2}
    with pytest.raises(InputError, match="already"):
        add_tag(store.storage, "v1", 2)
    with pytest.raises(NotFoundError):
        add_tag(store.storage, "v3", 3)
    for name in ("", ".", "..", "a/b", "../x", "a\n", "é", "-x", "x" * 101):
        with pytest.raises(InputError, match="cannot name a tag"):
            add_tag(store.storage, name)
    assert remove_tag(store.storage, "v1") == 1
    with pytest.raises(NotFoundError):
        remove_tag(store.storage, "v1")
    assert list_tags(store.storage) == {"v2.0-rc_1": 2}


def test_mask_of_dead_rows_is_exact(store: Store) -> None:
    """Random corpora and removals: what is left is what is reached, no more and no less."""
    rng = np.random.default_rng(5)
    for _ in range(6):
        documents = [Document(f"d{i}", int(rng.integers(3)), tuple(rng.integers(1, 40, rng.integers(1, 4)).tolist())) for i in range(5)]
        build(store, documents)
        gone = [d.source for d in documents if rng.random() < 0.4]
        if gone:
            remove(store, gone)
        collect(store, **NOW, rewrite_share=0)
        rest = [d for d in documents if d.source not in gone]
        assert set(keys_in(store)) == {t.key for d in rest for t in d.tasks()}
        assert len(keys_in(store)) == len(set(keys_in(store)))
        assert problems_with(store, rest) == []
    assert sound(store)
