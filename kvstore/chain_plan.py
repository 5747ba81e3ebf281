"""From a query log to the chains that a build compiles: which passages, after which, under which keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from kvstore.chain_log import Node, Place, Request, Share, Trie, choose, count, read_log, share
from kvstore.chain_rows import pruned, with_chains
from kvstore.errors import InputError
from kvstore.identity import Context
from kvstore.manifest import Chained, Row
from kvstore.plan import Planner, Task
from kvstore.snapshot import RowId
from kvstore.store import normal, split_source

Log = str | Path | Iterable[Mapping[str, Any]]


@dataclass
class ChainReport:
    """What a log asked for and what the chosen chains serve of it.

    `segments` and `tokens` are those chosen (`compiled` of the segments were not stored yet), within `budget` tokens. `served`: shares of the
    log's `requests` and of their documents' tokens that are read from the store with the chains; `before`: without them. `unknown` requests name a
    document that is not there (first of all `missing`), or more than the context holds: they are served up to it.
    """

    requests: int = 0
    unknown: int = 0
    missing: str | None = None
    budget: int = 0
    segments: int = 0
    tokens: int = 0
    compiled: int = 0
    served: Share = field(default_factory=lambda: Share(0.0, 0.0))
    before: Share = field(default_factory=lambda: Share(0.0, 0.0))


@dataclass(frozen=True)
class Link:
    """One segment of a chain: which passage, and how it is compiled."""

    place: Place
    task: Task


def read_chains(log: Log, budget: int | None) -> tuple[list[Request], int | None]:
    """A log and its budget, as `ChainPlan` takes them. Raises InputError for a log that cannot be read, and for a budget below nothing."""
    if budget is not None and (isinstance(budget, bool) or budget < 0):
        raise InputError(f"a budget of {budget} tokens for chains", remedy="give 0 or more")
    return list(read_log(log)), budget


class ChainPlan:
    """The chains to store for a log, of the documents that `rows` (of one model, template and encoding) have.

    `budget` None: as many tokens as the documents have, so that the store at most doubles. Raises InputError for a log that cannot be read.
    """

    def __init__(self, planner: Planner, rows: Mapping[RowId, Row], log: Iterable[Request], budget: int | None):
        self.planner, self.rows = planner, rows
        self._by_source = {r.source: r for r in rows.values()}
        room = planner.rules.context_tokens - planner.rules.reserve - len(planner.head_task.ids)
        self._trie: Trie = count(log, lru_cache(1 << 16)(self._passages), room)
        allowed = sum(p.tokens for r in rows.values() for p in r.passages) if budget is None else budget
        self._chosen = choose(self._trie, self._free, allowed)
        self.report = self._reported(allowed)

    def _passages(self, name: str) -> list[tuple[Place, int]] | None:
        """As look-ups resolve names: a document's own name goes before a passage's."""
        try:
            name = normal(name)
        except InputError:  # no Unicode text: no document is called so
            return None
        row, number = self._by_source.get(name), None
        if row is None:
            source, number = split_source(name)
            row = self._by_source.get(source)
        if row is None or (number is not None and number >= len(row.passages)):
            return None
        wanted = range(len(row.passages)) if number is None else (number,)
        return [((row.source, i), row.passages[i].tokens) for i in wanted]

    def _first(self, place: Place) -> str | None:
        """The key of a passage after the head, where it is stored so without any chain."""
        p, contexts = self._by_source[place[0]].passages[place[1]], self.planner.contexts
        return p.prefix or (p.isolated if contexts["prefix"] == contexts["isolated"] else None)

    def _free(self, place: Place) -> bool:
        return self._first(place) is not None

    def _reported(self, allowed: int) -> ChainReport:
        chosen, trie = set(self._chosen), self._trie
        free = partial(_is_free, self._free)
        return ChainReport(
            trie.requests,
            trie.unknown,
            trie.missing,
            allowed,
            len(chosen),
            sum(n.tokens for n in chosen),
            served=share(trie, lambda node, depth: node in chosen or free(node, depth)),
            before=share(trie, free),
        )

    def links(self) -> Iterator[Link]:
        """The chosen segments, each right after what it follows, so that few caches of chains are needed at a time.

        Their documents must be stored by now. Raises NotFoundError where one is not any more.
        """
        chosen = set(self._chosen)
        left = [(child, *self.planner.contexts["prefix"]) for child in self._trie.root.after.values()]
        while left:
            node, context, chain = left.pop()
            below = [c for c in node.after.values() if c in chosen]
            if node in chosen or below:  # the first of a chain may be stored as a document alone
                task = self.planner.task(context, chain, self._ids(node.place), followed=bool(below))
                if node in chosen:
                    yield Link(node.place, task)
                after = Context.parent(task.key, context.tokens + len(task.ids))
                left += [(child, after, (*chain, task.ids)) for child in below]

    def _ids(self, place: Place) -> tuple[int, ...]:
        passage, planner = self._by_source[place[0]].passages[place[1]], self.planner
        return tuple(planner.store.stored(passage.prefix or passage.isolated or "", planner.encoding.id).ids.tolist())

    def changed(self, done: Iterable[Link]) -> list[Row]:
        """The rows that get other chains than they have, of those links that are stored by now."""
        index, encoding = self.planner.store.index, self.planner.encoding.id
        index.refresh_packs()
        chains: dict[str, list[Chained]] = defaultdict(list)
        for link in done:
            before = link.task.context.value
            if isinstance(before, str) and index.has(link.task.key, encoding):  # else an anchor stands before it alone: no chain
                chains[link.place[0]].append(Chained(link.place[1], before, link.task.key))
        found = ((row, with_chains(row, chains[row.source])) for row in self.rows.values())
        return [new for old, new in found if new != old]


def rows_after(planner: Planner, waiting: Iterable[Row], removed: Iterable[RowId]) -> tuple[dict[RowId, Row], dict[RowId, Row]]:
    """The rows of a build's model, template and encoding as its last commit leaves them; and those of them that lose chains by it: what stood
    before these is no longer there."""
    now = planner.store.rows(model=planner.model.key, template=planner.renderer.record.id, encoding=planner.encoding.id)
    rows, gone = {r.id: r for r in (*now, *waiting)}, set(removed)
    rows = {i: r for i, r in rows.items() if i not in gone}
    shorter = {r.id: r for r in pruned(rows.values())}
    return rows | shorter, shorter


def _is_free(free: Callable[[Place], bool], node: Node, depth: int) -> bool:
    return depth == 1 and free(node.place)
