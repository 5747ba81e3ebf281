"""Why was there no hit? The stored run that shares the longest beginning with given token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.chain_rows import before
from kvstore.errors import InputError
from kvstore.identity import id_bytes
from kvstore.manifest import Row
from kvstore.pack import Pack
from kvstore.prefixes import common_prefixes
from kvstore.store import Store, describe


@dataclass(frozen=True)
class Match:
    """`matched` of `total` given ids are stored at the beginning of one segment of `stored` tokens.

    Unless `exact`, they part at index `matched`: `given` stands there in the text, `found` in the store, None where that side ends.
    `sources` are the documents (`a.md#3` for passages) that the newest snapshot has the segment under; `key` is None where nothing fits.
    `chains`: what else the same passage is stored after, by the names of all that stands between it and the head.
    """

    matched: int
    total: int
    stored: int = 0
    key: str | None = None
    context: str | None = None
    sources: tuple[str, ...] = ()
    chains: tuple[tuple[str, ...], ...] = ()
    given: int | None = None
    found: int | None = None

    @property
    def exact(self) -> bool:
        return self.key is not None and self.matched == self.total == self.stored


@dataclass(frozen=True)
class _Candidate:
    """`rank`: higher is better. A whole segment first, then the longest common beginning, then the least that follows it, then what stands first."""

    pack: Pack
    row: int
    rank: tuple[bool, int, int, int]


def match(store: Store, ids: Sequence[int], *, model: str, template: str, encoding: str, source: str | None = None) -> Match:
    """The stored segment that comes closest to `ids`, in one model, template and encoding (full keys).

    The segments of `source` come first where it is stored, unless another one fits exactly. Raises InputError for no ids.
    """
    if not len(ids):
        raise InputError("there are no token ids to match", remedy="give a text that is not empty")
    wanted = np.frombuffer(id_bytes(ids), "<u4")
    rows = store.rows(model=model, template=template, encoding=encoding)
    own = {bytes.fromhex(k) for r in rows if r.source == source for p in r.passages for k in (p.prefix, p.isolated) if k}
    packs = [p for p in map(store.index.pack, store.index.packs()) if (p.manifest.model, p.manifest.encoding_id) == (model, encoding)]
    found = [c for p in packs for c in _best(p, wanted, own)]
    mine = [c for c in found if c.rank[0] or c.pack.rows["key"][c.row].tobytes() in own]
    best = max(mine or found, key=lambda c: c.rank, default=None)
    return Match(0, len(wanted)) if best is None else _result(best, wanted, rows, source)


def _best(pack: Pack, wanted: npt.NDArray[np.uint32], own: set[bytes]) -> list[_Candidate]:
    """The best row of those that share a token at all, and the best of those in `own`."""
    lengths, tokens = common_prefixes(pack, wanted), pack.rows["tokens"].astype("i8")
    exact = (lengths == len(wanted)) & (tokens == len(wanted))
    order = np.lexsort((pack.rows["position"], tokens, -lengths, ~exact))
    mine = (row for row in order if pack.rows["key"][row].tobytes() in own) if own else iter(())
    rows = [*order[: int(lengths[order[0]] > 0)], *itertools.islice(mine, 1)]
    return [_Candidate(pack, int(r), (bool(exact[r]), int(lengths[r]), -int(tokens[r]), -int(pack.rows["position"][r]))) for r in rows]


def _result(best: _Candidate, wanted: npt.NDArray[np.uint32], rows: Sequence[Row], source: str | None) -> Match:
    segment, at = best.pack.segment(best.row), best.rank[1]
    ids = best.pack.ids(segment)
    names = sorted(_names(rows, segment.key), key=lambda n: (n.rpartition("#")[0] != source and n != source, n))
    given, found = (int(side[at]) if at < len(side) else None for side in (wanted, ids))
    return Match(at, len(wanted), segment.tokens, segment.key, segment.context, tuple(names), _chains(rows, segment.key), given, found)


def _names(rows: Sequence[Row], key: str) -> set[str]:
    """What the segment is called in the newest snapshot."""
    found = {r.source + (f"#{i}" if len(r.passages) > 1 else "") for r in rows for i, p in enumerate(r.passages) if key in (p.prefix, p.isolated)}
    found |= {r.source + (f"#{c.passage}" if len(r.passages) > 1 else "") for r in rows for c in r.chained if c.key == key}
    return found | {f"the head of {describe(r)}" for r in rows if r.head == key}


def _chains(rows: Sequence[Row], key: str) -> tuple[tuple[str, ...], ...]:
    """What stands before each further copy of the passages with this key."""
    whose = ((c, p) for r in rows for i, p in enumerate(r.passages) for c in r.chained if c.passage == i)
    mine = [c for c, p in whose if key in (c.key, p.prefix, p.isolated)]
    return tuple(sorted({tuple(before(c, rows)) for c in mine}))
