"""The door to a store: what it holds, what it refuses, and what it never does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.artifact import tier_chain
from kvstore.diff import diff
from kvstore.errors import FormatError, InputError, IntegrityError, NotFoundError, StorageError
from kvstore.gc import collect, remove
from kvstore.manifest import FORMAT, StoreRecord, zarr_group
from kvstore.match import match
from kvstore.records import add_model, add_template, create
from kvstore.snapshot import Change
from kvstore.storage.local import LocalStorage
from kvstore.store import Store, split_source
from kvstore.verify import verify
from tests.synthetic import (
    ENCODING,
    HEAD_KEY,
    MODEL,
    PROBE,
    RECORD,
    TEMPLATE,
    Document,
    build,
    files_of,
    make_encoding,
    make_store,
    problems_with,
)

DOCUMENTS = [Document("docs/a.md"), Document("docs/b.md", lengths=(9, 30))]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = make_store(tmp_path / "kv.zarr")
    build(store, DOCUMENTS)
    return store


def test_is_a_collection_of_sources(store: Store) -> None:
    assert store.sources() == list(store) == ["docs/a.md", "docs/b.md"]
    assert len(store) == 2
    assert "docs/a.md" in store
    assert "docs/b.md#1" in store
    assert "docs/c.md" not in store
    assert 3 not in store


def test_artifact_tells_what_is_stored(store: Store) -> None:
    artifact = store["docs/b.md"]
    assert (artifact.source, artifact.tokens, artifact.tiers) == ("docs/b.md", 39, ["draft", "fine"])
    assert artifact.token_ids == [i for p in (0, 1) for i in DOCUMENTS[1].ids(p)]
    assert artifact.nbytes("draft") + sum(s.segment.nbytes(["t1"]) for s in artifact.stored) == artifact.nbytes("fine") == artifact.nbytes()
    assert artifact.model == MODEL
    assert artifact.encoding == ENCODING
    with pytest.raises(NotFoundError, match="stored are draft, fine"):
        artifact.nbytes("lossless")


def test_passages_are_numbered_from_zero(store: Store) -> None:
    assert store["docs/b.md#1"].token_ids == list(DOCUMENTS[1].ids(1))
    with pytest.raises(NotFoundError, match="has 2 passages, there is no #2"):
        store["docs/b.md#2"]
    build(store, [Document("docs/b.md#1", 5)])
    assert store["docs/b.md#1"].token_ids == list(Document("docs/b.md#1", 5).ids(0)), "a document of that very name comes first"


@pytest.mark.parametrize(
    ("source", "parts"),
    [("a", ("a", None)), ("a#3", ("a", 3)), ("a#b", ("a#b", None)), ("a#", ("a#", None)), ("#1", ("", 1)), ("a#1#2", ("a#1", 2))],
)
def test_source_names_split_at_the_last_number(source: str, parts: tuple[str, int | None]) -> None:
    assert split_source(source) == parts


def test_tier_chain_reads_only_what_is_required() -> None:
    assert [t.name for t in tier_chain(ENCODING, "draft")] == ["draft"]
    assert [t.name for t in tier_chain(ENCODING, "fine")] == ["draft", "fine"]


def test_several_encodings_of_one_source_must_be_told_apart(store: Store) -> None:
    other = make_encoding("other")
    build(store, DOCUMENTS, encoding=other)
    with pytest.raises(InputError, match="stored 2 times") as caught:
        store["docs/a.md"]
    assert caught.value.code == "ambiguous"
    assert store.artifact("docs/a.md", encoding=other.id[:12]).encoding == other
    assert set(store.encodings()) == {ENCODING.id, other.id}
    assert len(store.rows()) == 4
    assert len(store) == 2


def test_unknown_names_say_what_to_do(store: Store) -> None:
    with pytest.raises(NotFoundError, match=r"docs/c\.md.*kvstore ls"):
        store["docs/c.md"]
    with pytest.raises(NotFoundError, match="not stored in encoding"):
        store.stored("ab" * 32, ENCODING.id)


def test_making_a_store_twice_keeps_the_first(store: Store) -> None:
    before = files_of(store)
    create(store.path)
    assert files_of(store) == before


def test_folder_with_something_else_is_not_made_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_half_made_store_is_completed(tmp_path: Path) -> None:
    create(tmp_path / "kv")
    (tmp_path / "kv" / "zarr.json").unlink()
    create(tmp_path / "kv")
    assert Store(tmp_path / "kv").sources() == []


def test_no_store_and_no_kvstore_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no store"):
        Store(tmp_path / "nothing")
    with pytest.raises(FormatError, match="not a kvstore store"):
        Store(tmp_path)
    (tmp_path / "zarr.json").write_bytes(zarr_group())
    with pytest.raises(FormatError, match="not a kvstore group"):
        Store(tmp_path)
    (tmp_path / "zarr.json").write_bytes(zarr_group(StoreRecord(FORMAT + 1, "store", "ab" * 16)))
    with pytest.raises(FormatError, match="upgrade kvstore"):
        Store(tmp_path)


# commits


def test_commit_needs_every_segment_to_be_stored(store: Store) -> None:
    with pytest.raises(StorageError, match=r"1 documents \(first: c\).*same command again") as caught:
        store.commit(Change((Document("c").row(), DOCUMENTS[0].row())), "test")
    assert caught.value.code == "collected"
    assert store.snapshots.newest() == 1


def test_segment_collected_between_plan_and_commit_is_noticed(store: Store) -> None:
    """A builder found a segment stored, skipped it, and gc took it before the builder's commit."""
    remove(store, ["docs/a.md"])
    builder = Store(store.path, cache=store.path.parent / "builder")
    row = DOCUMENTS[0].row()
    assert all(builder.index.has(k, ENCODING.id) for k in row.segment_keys())
    collect(store, keep_snapshots=1, grace_seconds=0)
    with pytest.raises(StorageError, match="no longer"):
        builder.commit(Change((row,)), "test")
    build(builder, DOCUMENTS)
    assert problems_with(builder, DOCUMENTS) == []


# records


def test_records_come_back(store: Store) -> None:
    (record,) = store.models()
    assert (record.model, record.layout, record.probe_ids) == (RECORD.model, RECORD.layout, RECORD.probe_ids)
    assert np.array_equal(store.probe(MODEL.key), PROBE)
    assert store.templates() == [TEMPLATE] == [store.template(TEMPLATE.id)]
    assert store.has_model(MODEL.key)
    assert not store.has_model("ab" * 32)
    with pytest.raises(NotFoundError):
        store.model_record("ab" * 32)
    with pytest.raises(NotFoundError):
        store.template("ab" * 32)


def test_first_record_of_a_model_stays(store: Store) -> None:
    other = msgspec.structs.replace(RECORD, provenance={"source": "elsewhere"})
    add_model(store.storage, other, PROBE + 1)
    add_template(store.storage, TEMPLATE)
    assert store.model_record(MODEL.key).provenance == RECORD.provenance
    assert np.array_equal(store.probe(MODEL.key), PROBE)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", [f"models/{MODEL.key}/zarr.json", f"models/{MODEL.key}/probe/c.0.0.0.0", f".kvstore/templates/{TEMPLATE.id}.json"])
def test_damaged_record_is_refused(store: Store, name: str, at: float) -> None:
    path = store.storage.path(name)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)
    read: Callable[[], Any] = store.templates if "templates" in name else lambda: store.probe(MODEL.key)
    with pytest.raises((IntegrityError, FormatError)) as caught:
        read()
    assert (TEMPLATE.id if "templates" in name else MODEL.key) in str(caught.value)


# reading never writes


def test_reading_writes_nothing_into_the_store(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A read-only mount opens, lists, verifies, compares and matches."""
    remove(store, ["docs/a.md"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("written to")

    for call in ("create", "publish", "stage", "retire", "lock", "sweep"):
        monkeypatch.setattr(LocalStorage, call, refuse)
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    reader = Store(store.path, cache=tmp_path / "fresh cache")
    assert reader.sources() == ["docs/b.md"]
    assert problems_with(reader, DOCUMENTS[1:]) == []
    assert verify(reader).ok
    assert [r.source for r in diff(reader, 1, 2).removed] == ["docs/a.md"]
    assert match(reader, DOCUMENTS[1].ids(0), model=MODEL.key, template=TEMPLATE.id, encoding=ENCODING.id).exact
    assert reader.stored(HEAD_KEY, ENCODING.id)
    assert collect(reader, keep_snapshots=1, grace_seconds=0, dry_run=True).packs_rewritten
    assert {p: p.stat().st_mtime_ns for p in store.path.rglob("*")} == before


def test_store_side_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kvstore.gc, kvstore.verify, kvstore.match, kvstore.diff; print({'torch', 'transformers', 'zarr', 'numba'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
