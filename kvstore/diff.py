"""What changed between two snapshots."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.manifest import Row
from kvstore.snapshot import require
from kvstore.store import Store


@dataclass(frozen=True)
class Changed:
    """One document before and after. `fields` names what differs: `text`, `passages`, `recipe`, `head`, `metadata`, `root`, `chains`."""

    before: Row
    after: Row
    fields: tuple[str, ...]

    @property
    def text(self) -> bool:
        return "text" in self.fields

    @property
    def tokens(self) -> tuple[int, int]:
        """Before and after."""
        return row_tokens(self.before), row_tokens(self.after)


@dataclass(frozen=True)
class Diff:
    """Rows that are only in `b`, only in `a`, and in both but not equal, each by source, model, template and encoding."""

    a: int
    b: int
    added: tuple[Row, ...]
    removed: tuple[Row, ...]
    changed: tuple[Changed, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    @property
    def tokens(self) -> int:
        """How many more tokens `b` has; negative where it has fewer."""
        grown = sum(after - before for before, after in (c.tokens for c in self.changed))
        return sum(map(row_tokens, self.added)) - sum(map(row_tokens, self.removed)) + grown


def row_tokens(row: Row) -> int:
    return sum(p.tokens for p in row.passages)


def diff(store: Store, a: int, b: int) -> Diff:
    """From snapshot `a` to snapshot `b`; 0 is the empty store before the first. Raises NotFoundError, IntegrityError."""
    numbers = [0, *store.snapshots.numbers()]
    old, new = (store.snapshots.rows(require(numbers, number)) for number in (a, b))
    changed = (Changed(old[i], new[i], _fields(old[i], new[i])) for i in sorted(old.keys() & new.keys()) if old[i] != new[i])
    added, removed = (tuple(rows[i] for i in sorted(ids)) for rows, ids in ((new, new.keys() - old.keys()), (old, old.keys() - new.keys())))
    return Diff(a, b, added, removed, tuple(changed))


def _fields(before: Row, after: Row) -> tuple[str, ...]:
    return tuple(f for f in Row.__struct_fields__ if getattr(before, f) != getattr(after, f))
