"""The longest stored run at the beginning of token ids: what a search through everything finds, and what must never be handed out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.identity import Context, segment_key
from kvstore.manifest import CodecSpec, Encoding, StateTensor, Tier
from kvstore.prefix_table import WIDTH
from kvstore.prefixes import PrefixIndex, cuttable
from kvstore.store import Store
from tests.synthetic import ANCHOR, ENCODING, HEAD, LAYOUT, MODEL, Document, make_encoding, make_store, make_units, new_writer

Chain = tuple[tuple[int, ...], ...]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "kv.zarr")


def context_of(chain: Chain, anchor: tuple[int, ...] | None = None) -> Context:
    """What stands before the last segment of a chain, as a builder names it; `anchor`: a first segment of these ids is one."""
    context, at = Context.root(), 0
    for ids in chain[:-1]:
        key, at = segment_key(MODEL, LAYOUT, context, ids), at + len(ids)
        context = Context.anchor(ids) if context.kind == "root" and ids == anchor else Context.parent(key, at)
    return context


def put(store: Store, chains: Sequence[Chain], anchor: tuple[int, ...] | None = None, encoding: Encoding = ENCODING) -> None:
    """One pack with the last segment of every chain."""
    writer = new_writer(store.storage, encoding)
    for chain in dict.fromkeys(chains):
        context = context_of(chain, anchor)
        key = segment_key(MODEL, LAYOUT, context, chain[-1])
        writer.add(key, context, chain[-1], make_units(key, len(chain[-1]), encoding))
    writer.close()
    store.refresh()


def found(store: Store, ids: Sequence[int], encoding: Encoding = ENCODING) -> list[tuple[tuple[int, ...], int]]:
    """(all ids of the segment, tokens that hold)."""
    run = PrefixIndex(store, MODEL, encoding.id).longest(ids)
    return [(tuple(s.ids.tolist()), count) for s, count in run]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def covered(stored: set[Chain], ids: Sequence[int], chain: Chain = ()) -> int:
    """The most tokens of `ids` that stored segments cover, by trying all of them."""
    at = sum(map(len, chain))
    best = at
    for other in stored:
        if other[:-1] == chain:
            shared = common(other[-1], ids[at:])
            best = max(best, at + shared, covered(stored, ids, other) if shared == len(other[-1]) else 0)
    return best


ids_ = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
LONG = tuple(range(100, 100 + WIDTH + 9))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_longest_is_what_a_search_through_everything_finds(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    store = make_store(tmp_path_factory.mktemp("s") / "kv.zarr")
    wrapper = data.draw(st.sampled_from([(), LONG]))  # a wrapper that all share is longer than what the table holds
    chains: list[Chain] = []
    for ids in data.draw(st.lists(ids_, min_size=1, max_size=14)):
        before = data.draw(st.sampled_from([(), *chains]))
        chains.append((*before, wrapper + ids))
    anchor = data.draw(st.sampled_from([None, *(c[0] for c in chains if len(c) == 1)]))
    half = len(chains) // 2
    put(store, chains[:half], anchor)
    put(store, chains[half:], anchor)
    index = PrefixIndex(store, MODEL, ENCODING.id)
    for _ in range(4):
        pieces = data.draw(st.lists(ids_ | st.sampled_from([wrapper + i for i in ((0,), (1, 2), (2, 2, 2))]), max_size=4))
        start = data.draw(st.sampled_from([(), *chains]))
        wanted = [i for part in (*start, *pieces) for i in part]
        run = index.longest(wanted)
        assert sum(n for _, n in run) == covered(set(chains), wanted)
        check_run(run, wanted, anchor)


def check_run(run: Sequence[tuple[object, int]], wanted: Sequence[int], anchor: tuple[int, ...] | None) -> None:
    """Whole but for the last one, in order, and each under the key of exactly what stands before it."""
    chain: Chain = ()
    for stored, count in run:
        ids, at = tuple(stored.ids.tolist()), sum(map(len, chain))  # type: ignore[attr-defined]
        chain = (*chain, ids)
        assert stored.segment.position == at  # type: ignore[attr-defined]
        assert list(ids[:count]) == list(wanted[at : at + count])
        keys = {segment_key(MODEL, LAYOUT, context_of(chain, a), ids) for a in (anchor, None)}
        assert stored.segment.key in keys  # type: ignore[attr-defined]
    assert all(n == s.segment.tokens for s, n in run[:-1])  # type: ignore[attr-defined]


SYSTEM, A, B, C = (7, 7, 7), tuple(range(20, 60)), tuple(range(60, 90)), tuple(range(90, 160))


def test_a_chain_is_found_in_its_order_only(store: Store) -> None:
    put(store, [(SYSTEM,), (SYSTEM, A), (SYSTEM, B), (SYSTEM, A, B)])
    assert found(store, [*SYSTEM, *A, *B, 5]) == [(SYSTEM, 3), (A, 40), (B, 30)]
    assert found(store, [*SYSTEM, *B, *A]) == [(SYSTEM, 3), (B, 30)]
    assert found(store, A) == []
    assert found(store, []) == []


def test_the_last_one_is_cut_where_the_tokens_part(store: Store) -> None:
    put(store, [(SYSTEM,), (SYSTEM, A), (SYSTEM, A, B), (SYSTEM, A, C)])
    assert found(store, [*SYSTEM, *A, *C[:50], 1, 1]) == [(SYSTEM, 3), (A, 40), (C, 50)]
    assert found(store, [*SYSTEM, *A[:39]]) == [(SYSTEM, 3), (A, 39)]
    assert found(store, SYSTEM[:2]) == [(SYSTEM, 2)]


def test_of_equal_runs_the_uncut_one_is_taken(store: Store) -> None:
    put(store, [(SYSTEM,), (SYSTEM, A), (SYSTEM, A[:20])])
    assert found(store, [*SYSTEM, *A[:20], 1]) == [(SYSTEM, 3), (A[:20], 20)]
    assert found(store, [*SYSTEM, *A[:21], 1]) == [(SYSTEM, 3), (A, 21)]


def test_a_shorter_segment_may_lead_further(store: Store) -> None:
    put(store, [(SYSTEM,), (SYSTEM, A), (SYSTEM, A[:20]), (SYSTEM, A[:20], (*A[20:], *B))])
    assert found(store, [*SYSTEM, *A, *B]) == [(SYSTEM, 3), (A[:20], 20), ((*A[20:], *B), 50)]


def test_documents_after_an_anchor_follow_a_root_of_the_same_ids_alone(store: Store) -> None:
    put(store, [((1,),), ((1,), A), ((1,), A, B)], anchor=(1,))
    assert found(store, [1, *A, *B]) == [((1,), 1), (A, 40), (B, 30)]
    assert found(store, [2, *A, *B]) == []


def test_another_anchor_of_equal_length_is_passed_over(store: Store) -> None:
    put(store, [((2,),), ((2,), A)], anchor=(2,))
    put(store, [((1,),), ((1,), A[:30])], anchor=(1,))
    assert found(store, [1, *A]) == [((1,), 1), (A[:30], 30)]
    assert found(store, [2, *A]) == [((2,), 1), (A, 40)]


def test_a_row_whose_key_does_not_follow_from_its_ids_is_not_handed_out(store: Store) -> None:
    put(store, [(SYSTEM,)])
    writer = new_writer(store.storage)
    after = Context.parent(segment_key(MODEL, LAYOUT, Context.root(), SYSTEM), len(SYSTEM))
    writer.add("ab" * 32, after, A, make_units("ab" * 32, len(A)))
    writer.close()
    store.refresh()
    assert found(store, [*SYSTEM, *A]) == [(SYSTEM, 3)]


def test_positions_enter_the_key(store: Store) -> None:
    """A child that names the parent, but other positions, was computed elsewhere."""
    put(store, [(SYSTEM,)])
    wrong = Context.parent(segment_key(MODEL, LAYOUT, Context.root(), SYSTEM), 17)
    key = segment_key(MODEL, LAYOUT, wrong, A)
    writer = new_writer(store.storage)
    writer.add(key, wrong, A, make_units(key, len(A)))
    writer.close()
    store.refresh()
    assert found(store, [*SYSTEM, *A]) == [(SYSTEM, 3)]


def test_other_encodings_and_models_are_not_mixed_in(store: Store) -> None:
    other = make_encoding("other")
    put(store, [(SYSTEM,), (SYSTEM, A)])
    put(store, [(SYSTEM,)], encoding=other)
    assert found(store, [*SYSTEM, *A], other) == [(SYSTEM, 3)]


def test_segments_whose_policy_drops_tokens_are_never_cut(store: Store) -> None:
    spec = CodecSpec("scalar", 1, {"policy": "sink+recent:rest=drop"})
    dropping = Encoding((spec,), (Tier("standard", "t0", "scalar", 0, (), False), Tier("fine", "t1", "scalar", 1, ("standard",), False)), 8, 2)
    put(store, [(SYSTEM,), (SYSTEM, A)], encoding=dropping)
    assert found(store, [*SYSTEM, *A], dropping) == [(SYSTEM, 3), (A, 40)]
    assert found(store, [*SYSTEM, *A[:30]], dropping) == [(SYSTEM, 3)]
    assert found(store, SYSTEM[:2], dropping) == []


def test_segments_with_a_recurrent_state_are_never_cut() -> None:
    """The state stands for a segment's end, and for no token before it."""
    layouts = LAYOUT, msgspec.structs.replace(LAYOUT, state=(StateTensor(0, "conv0", (2, 3), "bfloat16"),))
    found = [cuttable(Mock(pack=Mock(layout=layout), encoding=ENCODING, drops=lambda tier: False)) for layout in layouts]
    assert found == [True, False]


def test_packs_that_come_and_go_are_seen_after_a_refresh(store: Store) -> None:
    index = PrefixIndex(store, MODEL, ENCODING.id)
    assert index.longest([*SYSTEM, *A]) == []
    put(store, [(SYSTEM,)])
    put(store, [(SYSTEM, A)])
    assert [n for _, n in index.longest([*SYSTEM, *A])] == [3, 40]
    gone = store.stored(segment_key(MODEL, LAYOUT, context_of((SYSTEM, A)), A), ENCODING.id).pack
    store.storage.retire(gone.folder)
    assert [n for _, n in index.longest([*SYSTEM, *A])] == [3], "a collected pack is noticed without a refresh"


def test_what_follows_a_context(store: Store) -> None:
    put(store, [(SYSTEM,), (SYSTEM, A)])
    index = PrefixIndex(store, MODEL, ENCODING.id)
    after = context_of((SYSTEM, A))
    assert index.followed(Context.root()) and index.followed(after)
    assert not index.followed(context_of((SYSTEM, A, B)))
    stored, count = index.nearest(after, [*A[:25], 1, 2]) or pytest.fail("nothing near")
    assert (tuple(stored.ids.tolist()), count) == (A, 25)
    assert index.nearest(after, [1, 2, 3]) is None


def test_documents_of_a_usual_build(store: Store) -> None:
    """The head of this store stands after an anchor whose own KV nobody kept: nothing begins at position 0."""
    writer = new_writer(store.storage)
    for task in Document("a").tasks():
        writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
    writer.close()
    store.refresh()
    assert found(store, [*ANCHOR, *HEAD, *Document("a").ids(0)]) == []


def many(count: int) -> Iterator[Chain]:
    rng = np.random.default_rng(0)
    for row in rng.integers(3, 50_000, (count, 12)):
        yield (SYSTEM, (*range(3, 3 + WIDTH), *row.tolist()))


def test_a_look_up_does_not_read_everything(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 documents under one long wrapper, keys are worked out for a handful."""
    documents = list(many(600))
    put(store, [(SYSTEM,), *documents])
    index, worked = PrefixIndex(store, MODEL, ENCODING.id), []
    import kvstore.prefixes

    monkeypatch.setattr(kvstore.prefixes, "segment_key", lambda *a: worked.append(a) or segment_key(*a))
    assert [n for _, n in index.longest([*SYSTEM, *documents[77][1], 1])] == [3, WIDTH + 12]
    assert len(worked) < 6
