"""Why was there no hit? The stored run that shares the longest beginning with given token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import InputError
from kvstore.identity import id_bytes
from kvstore.manifest import Row
from kvstore.pack import Pack, Segment
from kvstore.store import Store, describe


@dataclass(frozen=True)
class Match:
    """`matched` of `total` given ids are stored at the beginning of one segment of `stored` tokens.

    Unless `exact`, they part at index `matched`: `given` stands there in the text, `found` in the store, None where that side ends.
    `sources` are the documents (`a.md#3` for passages) that the newest snapshot has the segment under; `key` is None where nothing fits.
    """

    matched: int
    total: int
    stored: int = 0
    key: str | None = None
    context: str | None = None
    sources: tuple[str, ...] = ()
    given: int | None = None
    found: int | None = None

    @property
    def exact(self) -> bool:
        return self.key is not None and self.matched == self.total == self.stored


@dataclass(frozen=True)
class _Candidate:
    pack: Pack
    segment: Segment
    matched: int

    def rank(self, total: int) -> tuple[bool, int, int]:
        """Higher is better: a whole segment first, then the longest common beginning, then the least that follows it."""
        exact = self.matched == total == self.segment.tokens
        return exact, self.matched, -self.segment.tokens


def match(store: Store, ids: Sequence[int], *, model: str, template: str, encoding: str, source: str | None = None) -> Match:
    """The stored segment that comes closest to `ids`, in one model, template and encoding (full keys).

    The segments of `source` come first where it is stored, unless another one fits exactly. Raises InputError for no ids.
    """
    if not len(ids):
        raise InputError("there are no token ids to match", remedy="give a text that is not empty")
    rows = store.rows(model=model, template=template, encoding=encoding)
    own = set().union(*(r.segment_keys() for r in rows if r.source == source)) if source is not None else set()
    wanted = np.frombuffer(id_bytes(ids), "<u4")
    best, best_own = _best(_packs(store, model, encoding), wanted, own)
    chosen = best if best_own is None or (best is not None and best.rank(len(wanted))[0]) else best_own
    return Match(0, len(wanted)) if chosen is None else _result(chosen, wanted, rows, source)


def _packs(store: Store, model: str, encoding: str) -> list[Pack]:
    packs = map(store.index.pack, store.index.packs())
    return [p for p in packs if p.manifest.model == model and p.manifest.encoding_id == encoding]


def _best(packs: Sequence[Pack], wanted: npt.NDArray[np.uint32], own: set[str]) -> tuple[_Candidate | None, _Candidate | None]:
    """The best of all segments, and the best of those in `own`."""
    best: list[_Candidate | None] = [None, None]
    for pack in packs:
        lengths = common_prefixes(pack, wanted)
        mine = np.fromiter((k.tobytes().hex() in own for k in pack.rows["key"]), np.bool_, len(lengths)) if own else np.zeros(len(lengths), np.bool_)
        for at, among in enumerate((np.ones(len(lengths), np.bool_), mine)):
            for row in _leaders(lengths, pack.rows["tokens"], among, len(wanted), least=0 if at else 1):
                found = _Candidate(pack, pack.segment(row), int(lengths[row]))
                held = best[at]
                if held is None or found.rank(len(wanted)) > held.rank(len(wanted)):
                    best[at] = found
    return best[0], best[1]


def _leaders(lengths: npt.NDArray[np.int64], tokens: npt.NDArray[np.uint32], among: npt.NDArray[np.bool_], total: int, least: int) -> list[int]:
    """The row with the longest beginning in common, of `least` tokens or more; of several the shortest one."""
    rows = np.flatnonzero(among & (lengths >= least))
    if not len(rows):
        return []
    exact = (lengths[rows] == total) & (tokens[rows] == total)
    order = np.lexsort((tokens[rows], -lengths[rows], ~exact))
    return [int(rows[order[0]])]


def common_prefixes(pack: Pack, wanted: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """int64 [segments]: how many tokens each segment shares with the beginning of `wanted`."""
    starts, ends = pack.rows["start"].astype("i8"), np.minimum(pack.rows["tokens"].astype("i8"), len(wanted))
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


def _result(chosen: _Candidate, wanted: npt.NDArray[np.uint32], rows: Sequence[Row], source: str | None) -> Match:
    segment, at = chosen.segment, chosen.matched
    ids = chosen.pack.ids(segment)
    names = sorted(_names(rows, segment.key), key=lambda n: (n.partition("#")[0] != source, n))
    return Match(at, len(wanted), segment.tokens, segment.key, segment.context, tuple(names),
                 given=int(wanted[at]) if at < len(wanted) else None, found=int(ids[at]) if at < len(ids) else None)  # fmt: skip


def _names(rows: Sequence[Row], key: str) -> set[str]:
    """What the segment is called in the newest snapshot."""
    found = {r.source + (f"#{i}" if len(r.passages) > 1 else "") for r in rows for i, p in enumerate(r.passages) if key in (p.prefix, p.isolated)}
    return found | {f"the head of {describe(r)}" for r in rows if r.head == key}
