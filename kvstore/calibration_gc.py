"""Collecting calibrations: what no pack of the store names, and no model's newest link."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvstore.calibration import shelf
from kvstore.calibration.files import problems
from kvstore.errors import IntegrityError, NotFoundError
from kvstore.manifest import Encoding
from kvstore.pack import PACKS, Pack
from kvstore.storage.local import LocalStorage


def calibrations_of(encoding: Encoding) -> set[str]:
    return {c.calibration for c in encoding.codecs if c.calibration is not None}


def in_use(storage: LocalStorage, *, without: Iterable[str] = ()) -> tuple[set[str], set[str]]:
    """Calibrations that packs name (those of `without` do not count), and those that newest links name.

    Raises IntegrityError, FormatError where a pack or a link cannot be read: nobody knows then what it needs.
    """
    packs = set(storage.names(PACKS)) - set(without)
    named = {c for name in packs for pack in _opened(storage, name) for c in calibrations_of(pack.encoding)}
    links = {shelf.current(storage, model) for model in shelf.models(storage)}
    return named, {d for d in links if d is not None}


def _opened(storage: LocalStorage, name: str) -> Iterator[Pack]:
    try:
        yield Pack(storage, name)
    except NotFoundError as error:  # taken by another collector
        if storage.exists(f"{PACKS}/{name}"):
            raise IntegrityError(str(error)) from error


class Shelves:
    """The calibrations of a store as a collector sees them."""

    def __init__(self, storage: LocalStorage):
        self.storage = storage
        self._damage: dict[str, str | None] = {}

    def damage(self, digest: str) -> str | None:
        """What is wrong with a calibration, or that it is missing; looked for once."""
        if digest not in self._damage:
            found = problems(self.storage.path(f"{shelf.CALIBRATIONS}/{digest}"), digest)
            self._damage[digest] = found[0] if found else None
        return self._damage[digest]

    def damage_for(self, encoding: Encoding) -> list[str]:
        """What keeps an encoding's packs from being decoded, if anything."""
        found = ((d, self.damage(d)) for d in sorted(calibrations_of(encoding)))
        return [f"its calibration {d[:12]} is damaged or missing: {what}" for d, what in found if what is not None]

    def unused(self, grace_seconds: float, *, gone: Iterable[str], drop_damaged: bool) -> tuple[list[str], int]:
        """Digests that may go, and how many stay; nobody must publish meanwhile. `gone` are packs that a dry run would have removed.

        Raises IntegrityError, FormatError where it cannot be known.
        """
        there = self.storage.names(shelf.CALIBRATIONS)
        if not there:
            return [], 0
        named, linked = in_use(self.storage, without=gone)
        free = [d for d in there if d not in named and self._goes(d, d in linked, grace_seconds, drop_damaged)]
        return free, len(there) - len(free)

    def _goes(self, digest: str, linked: bool, grace_seconds: float, drop_damaged: bool) -> bool:
        if drop_damaged and self.damage(digest) is not None:
            return True
        return not linked and self.storage.age(f"{shelf.CALIBRATIONS}/{digest}") >= grace_seconds
