"""Versions of the corpus: an append-only log of numbered files, each a delta, a full list every 64th. Design section 4.

A number is taken by an exclusive link. A writer that loses the race reads what won, applies its own change on top, and takes the next number.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from kvstore.errors import IntegrityError, NotFoundError
from kvstore.manifest import FORMAT, Row, Snapshot, parse
from kvstore.storage.local import LocalStorage

FOLDER = ".kvstore/snapshots"
FULL_EVERY = 64
_FILE = re.compile(r"[0-9]{12}\.json")
RowId = tuple[str, str, str, str]
Rows = dict[RowId, Row]


@dataclass(frozen=True)
class Change:
    """What a commit does to whatever the newest rows are by then."""

    rows: tuple[Row, ...] = ()
    removed: tuple[RowId, ...] = ()

    def against(self, current: Rows) -> Change:
        """Without what changes nothing."""
        rows = tuple(r for r in self.rows if current.get(r.id) != r)
        return Change(rows, tuple(i for i in self.removed if i in current))

    def __bool__(self) -> bool:
        return bool(self.rows or self.removed)


class SnapshotLog:
    """The snapshots of one store."""

    def __init__(self, storage: LocalStorage):
        self.storage = storage

    def numbers(self) -> list[int]:
        """Ascending."""
        return [int(n[:-5]) for n in self.storage.names(FOLDER) if _FILE.fullmatch(n)]

    def newest(self) -> int:
        """0 where nothing was ever committed."""
        return max(self.numbers(), default=0)

    def read(self, number: int) -> Snapshot:
        """One file, checked against its own digest. Raises NotFoundError, IntegrityError."""
        name = file_name(number)
        snapshot = parse(self.storage.read(name), Snapshot, name)
        sound = snapshot.number == number and snapshot.parent in (None, number - 1)
        if snapshot.digest != snapshot.own_digest() or not sound:
            raise IntegrityError(f"{name} does not match its digest", remedy="restore it from a copy; earlier snapshots are intact")
        return snapshot

    def rows(self, number: int | None = None) -> Rows:
        """Every row of a snapshot, the newest by default. Raises NotFoundError, IntegrityError."""
        return self.newest_rows()[1] if number is None else self._rows(number)

    def newest_rows(self) -> tuple[int, Rows]:
        """The newest number and its rows."""
        while True:
            newest = self.newest()
            try:
                return newest, self._rows(newest)
            except NotFoundError:
                if self.newest() == newest:
                    raise  # else collected meanwhile, and a newer one is there

    def _rows(self, number: int) -> Rows:
        if number == 0:
            return {}
        chain = [self.read(number)]
        while not chain[-1].full:
            chain.append(self._parent(chain[-1]))
        rows: Rows = {}
        for snapshot in reversed(chain):
            rows = apply(rows, snapshot)
        return rows

    def _parent(self, child: Snapshot) -> Snapshot:
        if child.parent is None:
            raise IntegrityError(f"snapshot {child.number} is a delta without a parent", remedy="restore it from a copy")
        parent = self.read(child.parent)
        if parent.digest != child.parent_digest:
            raise IntegrityError(
                f"snapshot {parent.number} is not the one that {child.number} was written against",
                remedy="restore the snapshots folder from one copy",
            )
        return parent

    def commit(self, change: Change, note: str, guard: Callable[[Rows], None] | None = None) -> int:
        """Apply `change` to the newest rows and take the next number; durable when this returns. The newest number where nothing changes.

        `guard` sees the rows the change is about to meet and may refuse by raising; nothing is collected between its check and the commit.
        """
        while True:
            with self.storage.lock(exclusive=False):
                newest, current = self.newest_rows()
                if guard is not None:
                    guard(current)
                effective = change.against(current)
                if not effective:
                    return newest
                snapshot = self._next(newest, current, effective, note)
                if self.storage.create(file_name(snapshot.number), msgspec.json.encode(snapshot, order="deterministic")):
                    return snapshot.number

    def _next(self, newest: int, current: Rows, change: Change, note: str) -> Snapshot:
        number, full = newest + 1, newest == 0 or (newest + 1) % FULL_EVERY == 0
        parent = self.read(newest).digest if newest else None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        rows, removed = change.rows, change.removed
        if full:
            kept = {i: r for i, r in current.items() if i not in set(change.removed)} | {r.id: r for r in change.rows}
            rows, removed = tuple(kept[i] for i in sorted(kept)), ()
        draft = Snapshot(FORMAT, number, newest or None, parent, full, now, note, rows, removed)
        return msgspec.structs.replace(draft, digest=draft.own_digest())

    def needed(self, kept: Iterable[int]) -> set[int]:
        """The files that must stay so that the `kept` numbers can be read: each with its chain down to a full list."""
        found: set[int] = set()
        for number in kept:
            while number not in found:
                found.add(number)
                snapshot = self.read(number)
                if snapshot.full or snapshot.parent is None:
                    break
                number = snapshot.parent
        return found


def file_name(number: int) -> str:
    return f"{FOLDER}/{number:012d}.json"


def apply(rows: Rows, snapshot: Snapshot) -> Rows:
    """The rows after `snapshot`, given those of its parent."""
    base = {} if snapshot.full else {i: r for i, r in rows.items() if i not in set(snapshot.removed)}
    return base | {r.id: r for r in snapshot.rows}


def require(numbers: list[int], number: int) -> int:
    """Raises NotFoundError for a snapshot that is not there."""
    if number not in numbers:
        raise NotFoundError(f"there is no snapshot {number}", remedy="`kvstore snapshots` lists them")
    return number
