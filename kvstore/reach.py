"""What must stay: the artifacts that the kept snapshots name, and those they were prefilled after."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore.pack import CONTEXT_KINDS, Pack
from kvstore.snapshot import Rows, SnapshotLog, apply
from kvstore.storage.local import LocalStorage
from kvstore.tags import list_tags

PARENT = CONTEXT_KINDS.index("parent")


def kept_snapshots(storage: LocalStorage, newest: int) -> set[int]:
    """The newest so many numbers, and the tagged ones."""
    return set(sorted(SnapshotLog(storage).numbers())[-newest:]) | set(list_tags(storage).values())


def pack_keys(pack: Pack) -> list[bytes]:
    """The segment keys in a pack, by row."""
    data = pack.rows["key"].tobytes()
    return [data[i : i + 32] for i in range(0, len(data), 32)]


def mask(pack: Pack, wanted: set[bytes]) -> npt.NDArray[np.bool_]:
    """bool [segments]: which rows are in `wanted`."""
    return np.fromiter((k in wanted for k in pack_keys(pack)), np.bool_, len(pack.rows))


class Reach:
    """Segment keys by encoding id, as the newest `newest` snapshots and the tags have it at the last `look`."""

    def __init__(self, storage: LocalStorage, newest: int):
        self.storage, self.newest = storage, newest
        self.kept: set[int] = set()
        self._keys: dict[str, set[bytes]] = {}

    def look(self, packs: Iterable[Pack]) -> None:
        """Read again what is reached, unless the kept snapshots are the same. Raises IntegrityError, NotFoundError where one cannot be read."""
        kept = kept_snapshots(self.storage, self.newest)
        if kept != self.kept:
            self._keys = self._named(kept)
            self._add_parents(list(packs))
            self.kept = kept

    def keys(self, encoding: str) -> set[bytes]:
        return self._keys.get(encoding, set())

    def _named(self, kept: set[int]) -> dict[str, set[bytes]]:
        log, rows = SnapshotLog(self.storage), Rows()
        found: dict[str, set[bytes]] = {}
        for number in sorted(log.needed(kept)):  # ascending: each is full, or applies to the one before
            rows = apply(rows, log.read(number))
            if number in kept:
                for row in rows.values():
                    found.setdefault(row.encoding, set()).update(map(bytes.fromhex, row.segment_keys()))
        return found

    def _add_parents(self, packs: list[Pack]) -> None:
        """Until no segment names a parent that is not there: chains are short, one round is usual."""
        grown = True
        while grown:
            grown = False
            for pack in packs:
                wanted = self.keys(pack.manifest.encoding_id)
                children = (pack.rows["context"] == PARENT) & mask(pack, wanted)
                parents = {p.tobytes() for p in pack.rows["parent"][children]} - wanted
                wanted |= parents
                grown = grown or bool(parents)
