"""verify names whatever is damaged, wherever it is, and goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kvstore.errors import NotFoundError
from kvstore.gc import collect, remove
from kvstore.pack import Pack
from kvstore.snapshot import FULL_EVERY, Change, file_name
from kvstore.store import Store
from kvstore.tags import add_tag
from kvstore.verify import VerifyReport, verify
from tests.synthetic import ENCODING, MODEL, RECORD, TEMPLATE, Document, build, files_of, make_store, make_units, new_writer

DOCUMENTS = [Document("a"), Document("b", lengths=(9, 30))]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store(tmp_path / "kv.zarr")
    build(store, DOCUMENTS[:1])
    build(store, DOCUMENTS)
    return store


def errors(report: VerifyReport) -> list[str]:
    return [f"{p.where}: {p.what}" for p in report.problems if p.severity == "error"]


def test_sound_store_has_no_problem(store: Store) -> None:
    seen: list[tuple[int, str]] = []
    report = verify(store, progress=lambda r, where: seen.append((r.segments, where)))
    assert report.problems == []
    assert report.ok
    assert (report.packs, report.segments, report.snapshots) == (2, 4, 2)
    assert report.bytes == store.index.totals()[2]
    assert [s for s, _ in seen] == [2, 4]
    assert {w for _, w in seen} == {f"packs/{n}" for n in store.index.packs()}
    assert verify(store.path, workers=1) == report


def test_empty_store_is_sound(tmp_path: Path) -> None:
    assert verify(make_store(tmp_path / "kv.zarr")).problems == []
    with pytest.raises(NotFoundError):
        verify(tmp_path / "nothing")


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda p: p.write_bytes(flipped(p.read_bytes())),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\n"),
    "deleted": Path.unlink,
}
# A log that only grows cannot know that its last entry is gone; the root's id is a random number like any other.
UNKNOWABLE = {("deleted", file_name(2)), ("flipped", "zarr.json"), ("deleted", "zarr.json")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_named(store: Store, damage: str) -> None:
    for name, before in files_of(store).items():
        if (damage, name) in UNKNOWABLE:
            continue
        path = store.path / name
        DAMAGE[damage](path)
        if damage == "longer" and name.startswith(".kvstore"):
            continue  # white space after JSON says nothing else
        found = errors(verify(store.path))
        folder = "/".join(name.split("/")[:2]) if name.startswith(("packs", "models")) else name
        lost = (f"template {TEMPLATE.id[:12]} is missing", "against snapshot 1, which is not there")
        assert [e for e in found if e.startswith((name, folder)) or e.endswith(lost)], f"{name} {damage}: {found}"
        path.write_bytes(before)
    assert verify(store.path).ok


def test_root_that_says_something_else_is_named(store: Store) -> None:
    path = store.path / "zarr.json"
    before = path.read_bytes()
    for old, new in ((b'"format": 1', b'"format": 2'), (b"store", b"stork"), (b"{", b"{ "), (store.id.encode(), b"../" * 5)):
        path.write_bytes(before.replace(old, new, 1))
        assert errors(verify(store.path))[0].startswith("zarr.json: ")


def test_all_problems_are_found_in_one_walk(store: Store) -> None:
    damaged = []
    for name in store.index.packs():
        path = store.path / "packs" / name / "t0" / "c.0.0.0.0"
        path.write_bytes(flipped(path.read_bytes()))
        damaged.append(name)
    (store.path / "packs" / damaged[0] / "tokens" / "c.0").unlink()
    (store.path / file_name(1)).unlink()
    found = errors(verify(store))
    assert [n for n in damaged if any(e.startswith(f"packs/{n}") and "t0" in e for e in found)] == damaged
    assert any("tokens" in e for e in found)
    assert any(e.startswith(file_name(2)) and "snapshot 1" in e for e in found)


def test_every_damaged_unit_is_named_by_its_segment(store: Store) -> None:
    for name in store.index.packs():
        pack = Pack(store.storage, name)
        for row in range(pack.manifest.segments):
            segment = pack.segment(row)
            offset, size, _ = segment.ranges["t1"]
            path = store.storage.path(f"{pack.folder}/t1/c.0.0.0.0")
            before = path.read_bytes()
            for at in (offset, offset + size - 1):
                path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
                (found,) = errors(verify(store.path))
                assert f"segment {segment.key[:12]}, t1" in found
                assert "crc32c" in found
            path.write_bytes(before)


def test_store_that_does_not_open_can_be_verified_by_path(store: Store) -> None:
    path = store.path / file_name(2)
    path.write_bytes(flipped(path.read_bytes()))
    found = errors(verify(store.path))
    assert [e for e in found if e.startswith(file_name(2))]


def test_foreign_files_in_a_pack_are_named(store: Store) -> None:
    name = store.index.packs()[0]
    (store.path / "packs" / name / "t0" / "notes.txt").write_text("x")
    (found,) = errors(verify(store))
    assert found == f"packs/{name}/t0/notes.txt: does not belong to the pack"


def test_missing_artifacts_are_errors_in_the_newest_and_tagged_snapshots_only(store: Store) -> None:
    remove(store, ["b"])
    report = collect(store, keep_snapshots=1, grace_seconds=0)
    assert report.artifacts_dropped == 2
    found = verify(store)
    assert found.ok
    assert [(p.where, p.severity) for p in found.problems] == [(file_name(2), "notice")]
    store.storage.create(".kvstore/tags/old.json", b'{"format":1,"snapshot":2}')  # as copied from elsewhere: gc did not know
    assert [e for e in errors(verify(store)) if e.startswith(f"{file_name(2)}: b: missing artifact")]


def test_row_without_its_artifact_is_named(store: Store) -> None:
    store.snapshots.commit(Change((Document("ghost").row(),)), "past the guard")
    (found,) = errors(verify(store))
    assert found.startswith(f"{file_name(3)}: ghost: missing artifact: segment")


def test_row_that_says_another_length_is_named(store: Store) -> None:
    row = DOCUMENTS[0].row()
    other = msgspec.structs.replace(row, passages=(msgspec.structs.replace(row.passages[0], tokens=21),))
    store.snapshots.commit(Change((other,)), "")
    (found,) = errors(verify(store))
    assert "a passage of 21 tokens is stored with 20" in found


def test_segment_under_a_key_that_is_not_its_own_is_named(store: Store) -> None:
    """Every digest fits; only the ids are not those that the key was made of."""
    writer, task = new_writer(store.storage), Document("c").tasks()[1]
    writer.add(task.key, task.context, task.ids[::-1], make_units(task.key, len(task.ids)))
    writer.close()
    (found,) = errors(verify(store))
    assert f"segment {task.key[:12]}: its key does not follow" in found


def test_missing_model_and_template_are_named(store: Store) -> None:
    store.storage.retire(f"models/{MODEL.key}")
    store.storage.retire(f".kvstore/templates/{TEMPLATE.id}.json")
    found = errors(verify(store))
    assert len([e for e in found if "no intact record" in e]) == 2
    assert len([e for e in found if f"template {TEMPLATE.id[:12]} is missing" in e]) == 2


def test_model_record_under_another_key_is_named(store: Store) -> None:
    key = "ab" * 32
    store.storage.path(f"models/{MODEL.key}").rename(store.storage.path(f"models/{key}"))
    assert any(e.startswith(f"models/{key}") for e in errors(verify(store)))
    assert RECORD.model.key == MODEL.key


def test_dangling_and_broken_tags_are_named(store: Store) -> None:
    add_tag(store.storage, "good")
    store.storage.create(".kvstore/tags/lost.json", b'{"format":1,"snapshot":77}')
    assert errors(verify(store)) == [".kvstore/tags: lost names snapshot 77, which is not there"]
    store.storage.create(".kvstore/tags/odd.json", b"{}")
    assert any("odd.json" in e for e in errors(verify(store)))


def test_gaps_in_the_log_are_fine_where_gc_makes_them(tmp_path: Path) -> None:
    store = make_store(tmp_path / "kv.zarr")
    build(store, DOCUMENTS)
    add_tag(store.storage, "first")
    for version in range(FULL_EVERY):
        row = msgspec.structs.replace(DOCUMENTS[0].row(), metadata={"n": version})
        store.commit(Change((row,)), "")
    collect(store, keep_snapshots=1)
    assert store.snapshots.numbers() == [1, FULL_EVERY, FULL_EVERY + 1]
    assert verify(store).problems == []
    store.storage.retire(file_name(FULL_EVERY))
    assert errors(verify(store.path))[0].startswith(f"{file_name(FULL_EVERY + 1)}: is written against snapshot {FULL_EVERY}")


def test_stored_in_one_encoding_is_not_stored_in_another(store: Store) -> None:
    row = msgspec.structs.replace(DOCUMENTS[0].row(), encoding="ab" * 32)
    store.snapshots.commit(Change((row,)), "")
    assert any("missing artifact" in e for e in errors(verify(store)))
    assert ENCODING.id != row.encoding
