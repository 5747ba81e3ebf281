"""Chains in rows: which of them still hold after documents changed or went, and what they are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from kvstore.manifest import Chained, Row


def with_chains(row: Row, chains: Iterable[Chained]) -> Row:
    """The row with these chains and no others."""
    found = tuple(sorted(set(chains), key=lambda c: (c.passage, c.parent, c.key)))
    return msgspec.structs.replace(row, chains=found or msgspec.UNSET)


def pruned(rows: Iterable[Row]) -> list[Row]:
    """Of all rows of a snapshot those that lose chains, without them: what stood before a passage must be a passage as some row has it now."""
    versions: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        versions[row.id[1:]].append(row)
    return [row for mine in versions.values() if any(r.chained for r in mine) for row in _pruned(mine)]


def _pruned(rows: Sequence[Row]) -> list[Row]:
    """Of one model, template and encoding."""
    after: dict[str, list[Chained]] = defaultdict(list)
    for chained in (c for r in rows for c in r.chained):
        after[chained.parent].append(chained)
    left = [k for r in rows for k in (r.head, *(k for p in r.passages for k in (p.prefix, p.isolated))) if k is not None]
    alive: set[str] = set()
    while left:
        if (key := left.pop()) not in alive:
            alive.add(key)
            left += [c.key for c in after.get(key, ())]
    kept = ((r, [c for c in r.chained if c.parent in alive and c.passage < len(r.passages)]) for r in rows)
    return [with_chains(row, chains) for row, chains in kept if len(chains) < len(row.chained)]


def names_of(rows: Iterable[Row]) -> Mapping[str, str]:
    """Segment key -> what stands there (`a.md#3`, `(head)`), of rows of one version; chains by their last passage."""
    found: dict[str, str] = {}
    for row in rows:
        names = [row.source + (f"#{i}" if len(row.passages) > 1 else "") for i in range(len(row.passages))]
        found |= {row.head: "(head)"} if row.head is not None else {}
        found |= {k: name for name, p in zip(names, row.passages, strict=True) for k in (p.prefix, p.isolated) if k is not None}
        found |= {c.key: names[c.passage] for c in row.chained if c.passage < len(names)}
    return found


def before(chained: Chained, rows: Sequence[Row]) -> list[str]:
    """Names of the passages before a chained one, first to last, without the head."""
    names, parents = names_of(rows), {c.key: c.parent for r in rows for c in r.chained}
    found: list[str] = []
    at = chained.parent
    while at in names and names[at] != "(head)" and len(found) <= len(parents):  # a foreign snapshot may go in circles
        found.append(names[at])
        at = parents.get(at, "")
    return found[::-1]
