"""Names for snapshots that gc must keep: `.kvstore/tags/<name>.json`, made once, never changed."""

from __future__ import annotations

import re

import msgspec

from kvstore.errors import InputError, NotFoundError
from kvstore.manifest import FORMAT, Positive, Strict, parse
from kvstore.snapshot import SnapshotLog, require
from kvstore.storage.local import LocalStorage

FOLDER = ".kvstore/tags"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Tag(Strict, frozen=True):
    """One tag file: the snapshot it names."""

    format: int
    snapshot: Positive


def add_tag(storage: LocalStorage, name: str, snapshot: int | None = None) -> int:
    """Name a snapshot, the newest by default; its number.

    Raises InputError for a name that cannot be a file or is taken, NotFoundError for a snapshot that is not there.
    """
    with storage.lock(exclusive=False):  # so that gc cannot remove the snapshot meanwhile
        log = SnapshotLog(storage)
        number = require(log.numbers(), log.newest() if snapshot is None else snapshot)
        if not storage.create(_file(name), msgspec.json.encode(Tag(FORMAT, number))):
            raise InputError(f"there is a tag {name!r} already", remedy="choose another name, or remove that one first", code="taken")
    return number


def list_tags(storage: LocalStorage) -> dict[str, int]:
    """Name -> snapshot number, sorted by name. Raises IntegrityError, FormatError for a file that is no tag."""
    names = (n[:-5] for n in storage.names(FOLDER) if n.endswith(".json"))
    return {name: parse(storage.read(_file(name)), Tag, _file(name)).snapshot for name in names}


def remove_tag(storage: LocalStorage, name: str) -> int:
    """Forget a tag; the number it named. Raises NotFoundError."""
    if not storage.exists(_file(name)):
        raise NotFoundError(f"there is no tag {name!r}", remedy="`kvstore snapshots` lists them")
    number = parse(storage.read(_file(name)), Tag, _file(name)).snapshot
    storage.retire(_file(name))
    return number


def _file(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot name a tag", remedy="use letters, digits, dots, dashes and underscores, up to 100")
    return f"{FOLDER}/{name}.json"
