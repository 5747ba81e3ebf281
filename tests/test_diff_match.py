"""What changed between snapshots, and why a text was no hit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.diff import diff
from kvstore.errors import InputError, NotFoundError
from kvstore.gc import remove
from kvstore.identity import Context
from kvstore.match import Match, match
from kvstore.pack import Pack
from kvstore.prefixes import common_prefixes
from kvstore.snapshot import Change
from kvstore.store import Store
from tests.synthetic import ENCODING, HEAD, MODEL, TEMPLATE, Document, build, make_encoding, make_store, make_units, new_writer

KEYS: dict[str, Any] = {"model": MODEL.key, "template": TEMPLATE.id, "encoding": ENCODING.id}


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "kv.zarr")


# diff


def test_added_removed_and_changed_documents(store: Store) -> None:
    old = [Document("same"), Document("edited", 0, (10, 20)), Document("gone", lengths=(7,))]
    new = [Document("same"), Document("edited", 1, (12, 20)), Document("new", lengths=(5,))]
    build(store, old)
    build(store, new, removed=old[2:])
    found = diff(store, 1, 2)
    assert [r.source for r in found.added] == ["new"]
    assert [r.source for r in found.removed] == ["gone"]
    (changed,) = found.changed
    assert (changed.before.source, changed.text, changed.tokens) == ("edited", True, (30, 32))
    assert set(changed.fields) == {"text", "passages", "metadata"}
    assert (found.tokens, bool(found)) == (5 - 7 + 2, True)
    back = diff(store, 2, 1)
    assert (back.added, back.removed, back.tokens) == (found.removed, found.added, -found.tokens)


def test_equal_snapshots_do_not_differ(store: Store) -> None:
    build(store, [Document("a")])
    assert not diff(store, 1, 1)
    assert [r.source for r in diff(store, 0, 1).added] == ["a"]


def test_metadata_alone_is_no_change_of_text(store: Store) -> None:
    build(store, [Document("a")])
    store.commit(Change((msgspec.structs.replace(Document("a").row(), metadata={"x": 1}),)), "")
    (changed,) = diff(store, 1, 2).changed
    assert (changed.fields, changed.text) == (("metadata",), False)


def test_another_encoding_is_another_row(store: Store) -> None:
    build(store, [Document("a")])
    build(store, [Document("a")], encoding=make_encoding("other"))
    assert len(diff(store, 1, 2).added) == 1
    assert diff(store, 1, 2).changed == ()


def test_unknown_snapshot_is_named(store: Store) -> None:
    build(store, [Document("a")])
    for a, b in ((1, 2), (7, 1), (-1, 1)):
        with pytest.raises(NotFoundError, match="there is no snapshot"):
            diff(store, a, b)


# match

A, B, LONG = Document("a", lengths=(30,)), Document("b", lengths=(9, 30)), Document("long", lengths=(700,))


def ask(store: Store, ids: Any, **more: Any) -> Match:
    return match(store, list(ids), **KEYS | more)


def test_whole_segment_is_exact(store: Store) -> None:
    build(store, [A, B, LONG])
    for document in (A, B, LONG):
        for i in range(len(document.lengths)):
            found = ask(store, document.ids(i))
            name = document.source + (f"#{i}" if len(document.lengths) > 1 else "")
            assert found.exact
            assert (found.sources, found.matched, found.total, found.stored) == (
                (name,),
                document.lengths[i],
                document.lengths[i],
                document.lengths[i],
            )
            assert (found.given, found.found, found.context) == (None, None, "parent")


def test_first_difference_is_named_on_both_sides(store: Store) -> None:
    build(store, [A, B, LONG])
    for at in (0, 1, 7, 8, 9, 64, 512, 699):
        ids = list(LONG.ids(0))
        ids[at] = 60_000
        found = ask(store, ids, source="long")
        assert (found.matched, found.given, found.found) == (at, 60_000, LONG.ids(0)[at])
        assert (found.sources, found.exact) == (("long",), False)


def test_text_that_ends_early_and_text_that_goes_on(store: Store) -> None:
    build(store, [A])
    short = ask(store, A.ids(0)[:12])
    assert (short.matched, short.total, short.stored, short.given, short.found) == (12, 12, 30, None, A.ids(0)[12])
    longer = ask(store, [*A.ids(0), 3])
    assert (longer.matched, longer.total, longer.stored, longer.given, longer.found) == (30, 31, 30, 3, None)
    assert not short.exact
    assert not longer.exact


def test_own_source_comes_first_unless_another_fits_exactly(store: Store) -> None:
    build(store, [A, B])
    mixed = [*A.ids(0)[:5], 1]
    assert ask(store, mixed).sources == ("a",)
    assert ask(store, mixed, source="b").sources[0].startswith("b#")
    assert ask(store, mixed, source="nowhere").sources == ("a",)
    assert ask(store, A.ids(0), source="b").sources == ("a",)


def test_nothing_in_common(store: Store) -> None:
    build(store, [A, B])
    assert ask(store, [3, 3, 3]) == Match(0, 3)
    assert ask(store, [3, 3, 3], source="a").matched == 0
    assert ask(store, A.ids(0), encoding="ab" * 32) == Match(0, 30)
    assert ask(store, A.ids(0), model="ab" * 32) == Match(0, 30)
    with pytest.raises(InputError):
        ask(store, [])


def test_segment_that_no_document_names_any_more(store: Store) -> None:
    build(store, [A, B])
    remove(store, ["a"])
    store.refresh()
    found = ask(store, A.ids(0))
    assert found.exact
    assert found.sources == ()


def test_head_is_named_as_what_it_is(store: Store) -> None:
    build(store, [A])
    found = ask(store, HEAD)
    assert found.exact
    assert found.sources[0].startswith("the head of model")
    assert found.context == "anchor"


def test_same_passage_in_two_documents_names_both(store: Store) -> None:
    build(store, [A])
    copy = msgspec.structs.replace(A.row(), source="copy of a")
    store.snapshots.commit(Change((copy,)), "")
    store.refresh()
    assert ask(store, A.ids(0)).sources == ("a", "copy of a")
    assert ask(store, A.ids(0), source="copy of a").sources == ("copy of a", "a")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_common_prefixes_are_those_that_a_loop_finds(store: Store, data: st.DataObject) -> None:
    ids = st.lists(st.integers(1, 3), min_size=1, max_size=40)
    segments = data.draw(st.lists(ids, min_size=1, max_size=8))
    wanted = data.draw(ids | st.sampled_from(segments))
    writer = new_writer(store.storage)
    for i, segment in enumerate(segments):
        key = bytes([i] * 32).hex()
        writer.add(key, Context.root(), segment, make_units(key, len(segment)))
    pack = Pack(store.storage, writer.close() or "")
    slow = [next((i for i, (a, b) in enumerate(zip(s, wanted, strict=False)) if a != b), min(len(s), len(wanted))) for s in segments]
    assert common_prefixes(pack, np.asarray(wanted, "<u4")).tolist() == slow
