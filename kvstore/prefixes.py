"""Which stored segments stand at the beginning of a run of token ids: found by content, without templates or names. Torch-free.

A table of all segments of one model and encoding, sorted by what stood before them and by their first tokens, is made at the first look-up and
made again when packs came or went (about 350 bytes a segment). A look-up is a few binary searches in it. The table only proposes: the key of
every segment that is handed out is worked out again from its ids and from all ids before them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvstore.artifact import Stored
from kvstore.errors import NotFoundError
from kvstore.identity import Context, id_bytes, segment_key
from kvstore.manifest import Layout, Model
from kvstore.pack import Pack
from kvstore.prefix_table import Ids, Table, context_bytes, first_bytes, part_of

if TYPE_CHECKING:
    from kvstore.store import Store

Run = list[tuple[Stored, int]]
_TRIES = 64  # proposals whose key does not hold (another anchor of this length, or a foreign pack) before a look-up gives up


class PrefixIndex:
    """Look-ups by token ids over one model and encoding (its id) of a store, of all templates. One object may serve many threads.

    Raises NotFoundError where the store does not know the model; look-ups raise IntegrityError where a pack that they need is damaged.
    """

    def __init__(self, store: Store, model: Model, encoding: str):
        self.store, self.model, self.encoding = store, model, encoding
        self.layout: Layout = store.model_record(model.key).layout
        self._made: tuple[list[str], Table] | None = None
        self._lock = threading.Lock()

    def longest(self, ids: Sequence[int]) -> Run:
        """The stored segments that cover most of `ids` from position 0, without a gap, in order, and how many tokens of each hold.

        All but the last count whole. The last one may be cut where its tokens and `ids` part (count < stored.segment.tokens), which is exact:
        K and V of a token do not depend on what follows it. Segments with recurrent state, or in an encoding that drops tokens, are never cut.
        """
        return self._again(lambda: self._longest(np.frombuffer(id_bytes(ids), "<u4")))

    def nearest(self, context: Context, ids: Sequence[int]) -> tuple[Stored, int] | None:
        """The stored segment after `context` that shares the longest beginning with `ids`, and how many tokens; None where none may be cut so."""
        if not self.followed(context):  # the usual case: spares the table
            return None
        return self._again(lambda: self._nearest(self._table(), context, np.frombuffer(id_bytes(ids), "<u4"), 0))

    def followed(self, context: Context) -> bool:
        """Whether anything may be stored after `context`; False is certain. Needs no table."""
        return not isinstance(context.value, str) or self.store.index.followed(context.value, self.model.key, self.encoding)

    def _again(self, look: Any) -> Any:
        try:
            return look()
        except NotFoundError:  # gc moved a pack meanwhile
            self.store.refresh()
            return look()

    def _table(self) -> Table:
        names = self.store.index.packs_of(self.model.key, self.encoding)
        with self._lock:
            if self._made is None or self._made[0] != names:
                old = {} if self._made is None else dict(self._made[1].parts)
                # packs are opened apart, so that their token ids do not stay in memory
                parts = {n: old[n] if n in old else part_of(Pack(self.store.storage, n)) for n in names}
                self._made = (names, Table(parts))
            return self._made[1]

    def _longest(self, wanted: Ids) -> Run:
        table, best, score = self._table(), Run(), (0, True, 0)
        left: list[tuple[Run, tuple[Context, ...]]] = [([], (Context.root(),))]
        while left:  # each stored segment has one place, so none is met twice
            run, contexts = left.pop()
            at = sum(n for _, n in run)
            for context in contexts:
                for found in self._whole(table, context, wanted[at:]):
                    grown = [*run, (found, found.segment.tokens)]
                    left.append((grown, _contexts_after(found, context, wanted)))
                    score, best = max((score, best), (_score(grown), grown), key=lambda pair: pair[0])
                if (cut := self._nearest(table, context, wanted[at:], score[0] - at)) is not None:
                    score, best = max((score, best), (_score([*run, cut]), [*run, cut]), key=lambda pair: pair[0])
        return best

    def _whole(self, table: Table, context: Context, rest: Ids) -> Iterator[Stored]:
        """Segments after `context` that `rest` begins with."""
        for place in table.whole(context_bytes(context), rest):
            stored = self._stored(table, place)
            if np.array_equal(stored.ids, rest[: stored.segment.tokens]) and self._holds(stored, context):
                yield stored

    def _nearest(self, table: Table, context: Context, rest: Ids, least: int) -> tuple[Stored, int] | None:
        """Of more than `least` tokens, else None."""
        for place, known in islice(self._proposed(table, context, rest), _TRIES):
            if known <= least:
                return None
            stored = self._stored(table, place)
            if (known == stored.segment.tokens or cuttable(stored)) and self._holds(stored, context):
                return stored, known
        return None

    def _proposed(self, table: Table, context: Context, rest: Ids) -> Iterator[tuple[int, int]]:
        """(place in the table, common tokens), the longest first."""
        head = context_bytes(context) + first_bytes(rest)
        low, high = table.equal(head)
        lengths = np.zeros(high - low, np.int64)
        for number in np.unique(table.pack[low:high]):
            mine = table.pack[low:high] == number
            lengths[mine] = common_prefixes(self.store.index.pack(table.names[number]), rest, table.row[low:high][mine])
        order = np.argsort(-lengths, kind="stable")
        yield from ((low + int(i), int(lengths[i])) for i in order)
        yield from table.around(head, low, high, len(rest))

    def _stored(self, table: Table, place: int) -> Stored:
        pack = self.store.index.pack(table.names[table.pack[place]])
        if not self.store.storage.exists(f"{pack.folder}/zarr.json"):
            raise NotFoundError(f"{pack.folder} was collected", remedy="look again")
        return Stored(pack, pack.segment(int(table.row[place])))

    def _holds(self, stored: Stored, context: Context) -> bool:
        return segment_key(self.model, self.layout, context, stored.ids.tolist()) == stored.segment.key


def cuttable(stored: Stored) -> bool:
    """Whether the beginning of a segment holds by itself: no recurrent state (known at its end only), no tokens that a policy chose to drop
    with the whole segment in view."""
    return not stored.pack.layout.state and not any(stored.drops(t.name) for t in stored.encoding.tiers)


def _score(run: Run) -> tuple[int, bool, int]:
    """Most tokens; then one that is not cut; then the fewest segments."""
    stored, count = run[-1]
    return sum(n for _, n in run), count == stored.segment.tokens, -len(run)


def _contexts_after(found: Stored, context: Context, wanted: Ids) -> tuple[Context, ...]:
    """What may stand as the context of the next segment; the ids of a root segment may also be somebody's anchor."""
    end = context.tokens + found.segment.tokens
    parent = Context.parent(found.segment.key, end)
    return (parent, Context.anchor(wanted[:end].tolist())) if context.kind == "root" else (parent,)


def common_prefixes(pack: Pack, wanted: Ids, rows: npt.NDArray[Any] | None = None) -> npt.NDArray[np.int64]:
    """int64 [segments]: how many tokens each segment (or those at `rows`) shares with the beginning of `wanted`."""
    table = pack.rows if rows is None else pack.rows[rows]
    starts, ends = table["start"].astype("i8"), np.minimum(table["tokens"].astype("i8"), len(wanted))
    lengths, alive, step = np.zeros(len(starts), np.int64), np.arange(len(starts)), 1
    while len(alive):  # steps grow while candidates fall away, so that the work stays near the answer's size
        at = lengths[alive, None] + np.arange(step)
        inside = at < ends[alive, None]
        theirs = pack.token_ids[np.where(inside, starts[alive, None] + at, 0)]
        equal = inside & (theirs == wanted[np.where(inside, at, 0)])
        run = np.where(equal.all(1), step, equal.argmin(1))
        lengths[alive] += run
        alive, step = alive[run == step], min(step * 8, 4096)
    return lengths
