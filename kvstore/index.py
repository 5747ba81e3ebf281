"""Where each artifact lies, and the newest rows: a cache in sqlite, outside the store, rebuilt from the packs whenever it is missing.

The store is the truth. The index is brought up to date by comparing names (packs and snapshots are immutable), so an open costs two folder
listings; where the cache folder cannot be written, it lives in memory.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from kvstore.digest import sha256
from kvstore.errors import FormatError, IntegrityError, KvstoreError, NotFoundError, StorageError
from kvstore.manifest import Row
from kvstore.pack import CONTEXT_KINDS, PACKS, Pack
from kvstore.snapshot import Rows, SnapshotLog, file_name
from kvstore.storage.local import LocalStorage

VERSION = 3
Result = TypeVar("Result")
log = logging.getLogger("kvstore")
_TABLES = """
create table if not exists packs (name text primary key, model text, encoding text);
create table if not exists segments (
    key blob, encoding text, pack text, row integer, tokens integer, nbytes integer, primary key (key, encoding, pack)
) without rowid;
create index if not exists by_pack on segments (pack);
create table if not exists parents (parent blob, pack text, primary key (parent, pack)) without rowid;
create table if not exists newest (
    source text, model text, template text, encoding text, row blob, primary key (source, model, template, encoding)
) without rowid;
create table if not exists state (number integer, stamp text);
"""


def cache_folder() -> Path:
    """The user's cache folder for kvstore; `KVSTORE_CACHE` overrides it."""
    if chosen := os.environ.get("KVSTORE_CACHE"):
        return Path(chosen)
    import platformdirs  # only where nothing was chosen: it costs a few milliseconds

    return Path(platformdirs.user_cache_dir("kvstore", appauthor=False))


class Index:
    """Look-ups over one store. Use from several threads only through one object each.

    Packs whose metadata is damaged are left out, logged, and listed in `damaged` with what is wrong.
    """

    def __init__(self, storage: LocalStorage, store_id: str, folder: Path | None = None):
        self.storage, self.snapshots = storage, SnapshotLog(storage)
        # two copies of a store share its id: the path tells them apart
        place = sha256(f"{store_id}\0{os.path.realpath(storage.root)}".encode("utf-8", "surrogateescape"))
        self._path = (cache_folder() if folder is None else folder) / f"index-{VERSION}-{place[:32]}.sqlite"
        self._packs: dict[str, Pack] = {}
        self._stamps: dict[str, object] = {}
        self.damaged: dict[str, str] = {}
        self._turn = threading.RLock()  # threads share one connection, and would see each other's transactions
        self._db, self._process = self._connect(), os.getpid()

    def _connect(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return self._prepared(str(self._path))
        except (OSError, sqlite3.OperationalError):
            return self._prepared(":memory:")
        except sqlite3.DatabaseError:  # not a database any more
            self._path.unlink(missing_ok=True)
            return self._prepared(str(self._path))

    @staticmethod
    def _prepared(path: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        try:
            db.execute("pragma synchronous = off")  # it can be rebuilt
            db.executescript(_TABLES)
        except sqlite3.Error:
            db.close()
            raise
        return db

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("begin immediate")
        try:
            yield
            self._db.execute("commit")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("rollback")
            raise

    def _recovering(self, work: Callable[[], Result]) -> Result:
        """`work`, once more after the file proved damaged (then it is replaced) or unusable (then the index moves to memory)."""
        if self._process != os.getpid():  # a forked child must not share its parent's connection, nor a lock that one of its threads held
            self._turn = threading.RLock()
            self._db, self._process = self._connect(), os.getpid()
        with self._turn:
            return self._tried(work)

    def _tried(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except sqlite3.DatabaseError as error:
            log.info("the index %s is rebuilt: %s", self._path, error)
            with suppress(sqlite3.Error):
                self._db.close()
            if isinstance(error, sqlite3.OperationalError):
                self._db = self._prepared(":memory:")
            else:
                self._path.unlink(missing_ok=True)
                self._db = self._connect()
            self._bring_up(rows=True)
            return work()

    def _query(self, query: str, values: tuple[object, ...] = ()) -> list[Any]:
        return self._recovering(lambda: self._db.execute(query, values).fetchall())

    def close(self) -> None:
        self._db.close()

    def refresh(self) -> None:
        """Bring the index up to the store: packs that came or went, and the newest snapshot."""
        self._recovering(lambda: self._bring_up(rows=True))

    def refresh_packs(self) -> None:
        """Packs that came or went, alone: the rows stay those of an earlier snapshot."""
        self._recovering(lambda: self._bring_up(rows=False))

    def _bring_up(self, rows: bool) -> None:
        if self._known() == self._sound() and (not rows or self._state() == self._wanted()):
            return
        with self._transaction():  # everything is read inside, so that of two processes the later one has the later view
            if rows and self._state() != self._wanted():
                number, found = self.snapshots.newest_rows()
                self._replace_rows(found, number)
            known, sound = self._known(), self._sound()  # after the rows: what they need was published before them
            self._drop(known - sound)
            for name in sorted(sound - known):
                self._add(name)

    def _known(self) -> set[str]:
        return {name for (name,) in self._db.execute("select name from packs")}

    def _sound(self) -> set[str]:
        """Packs in the store, without those that were found damaged and are the same since."""
        listed = self.storage.names(PACKS)
        return {n for n in listed if n not in self._stamps or self.storage.stamp(f"{PACKS}/{n}") != self._stamps[n]}

    def number(self) -> int:
        """The snapshot that the rows here belong to; 0 before the first."""
        return self._recovering(self._number)

    def _state(self) -> tuple[int, str]:
        found = self._db.execute("select number, stamp from state").fetchone()
        return found or (0, self._stamp(0))

    def _wanted(self) -> tuple[int, str]:
        number = self.snapshots.newest()
        return number, self._stamp(number)

    def _stamp(self, number: int) -> str:
        """Of the snapshot's file: a store put back from a copy may have the same numbers."""
        return str(self.storage.stamp(file_name(number))) if number else ""

    def _number(self) -> int:
        found = self._db.execute("select max(number) from state").fetchone()[0]
        return int(found or 0)

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._packs.pop(name, None)
            self._db.execute("delete from packs where name = ?", (name,))
            self._db.execute("delete from segments where pack = ?", (name,))
            self._db.execute("delete from parents where pack = ?", (name,))

    def _add(self, name: str) -> None:
        try:
            pack = Pack(self.storage, name)
            rows = pack.rows
        except NotFoundError:  # collected between the listing and now, unless a file of it is missing
            if self.storage.exists(f"{PACKS}/{name}"):
                self._set_aside(name, "a file is missing")
            return
        except (IntegrityError, FormatError, StorageError) as error:
            self._set_aside(name, str(error))
            return
        self._stamps.pop(name, None), self.damaged.pop(name, None)
        encoding, nbytes = pack.manifest.encoding_id, np.sum([rows[f"{a}.nbytes"] for a in pack.arrays], axis=0)
        values = ((r["key"].tobytes(), encoding, name, i, int(r["tokens"]), int(n)) for i, (r, n) in enumerate(zip(rows, nbytes, strict=True)))
        self._db.executemany("insert or replace into segments values (?, ?, ?, ?, ?, ?)", values)
        parents = {p.tobytes() for p in rows["parent"][rows["context"] == CONTEXT_KINDS.index("parent")]}
        self._db.executemany("insert or replace into parents values (?, ?)", ((p, name) for p in parents))
        self._db.execute("insert or replace into packs values (?, ?, ?)", (name, pack.manifest.model, encoding))

    def _set_aside(self, name: str, problem: str) -> None:
        log.warning("pack %s is damaged and left out: %s", name[:12], problem)
        self._stamps[name], self.damaged[name] = self.storage.stamp(f"{PACKS}/{name}"), problem

    def _replace_rows(self, rows: Rows, number: int) -> None:
        self._db.execute("delete from newest")
        self._db.execute("delete from state")
        self._db.executemany("insert into newest values (?, ?, ?, ?, ?)", ((*i, msgspec.json.encode(r)) for i, r in rows.items()))
        self._db.execute("insert into state values (?, ?)", (number, self._stamp(number)))

    def rows(self, source: str | None = None) -> list[Row]:
        """Rows of the newest snapshot, of one source or of all, by source."""
        query = "select row from newest" + (" where source = ?" if source is not None else "") + " order by source, model, template, encoding"
        found = self._query(query, (source,) if source is not None else ())
        return [msgspec.json.decode(data, type=Row) for (data,) in found]

    def has(self, key: str, encoding: str) -> bool:
        """Whether the segment is stored in that encoding."""
        return bool(self._query("select 1 from segments where key = ? and encoding = ? limit 1", (bytes.fromhex(key), encoding)))

    def encodings(self, key: str) -> list[str]:
        """Every encoding the segment is stored in."""
        query = "select distinct encoding from segments where key = ? order by encoding"
        return [e for (e,) in self._query(query, (bytes.fromhex(key),))]

    def find(self, key: str, encoding: str) -> tuple[Pack, int]:
        """The pack and row of one artifact. Raises NotFoundError, IntegrityError where only a damaged pack has it."""
        try:
            return self._find(key, encoding)
        except NotFoundError:
            self.refresh()  # gc may have moved it to another pack
            return self._find(key, encoding)

    def _find(self, key: str, encoding: str) -> tuple[Pack, int]:
        problem: KvstoreError = NotFoundError(f"segment {key[:12]} is not stored in encoding {encoding[:12]}", remedy="build it")
        query = "select pack, row from segments where key = ? and encoding = ? order by pack"
        for name, row in self._query(query, (bytes.fromhex(key), encoding)):
            try:
                if self.storage.exists(f"{PACKS}/{name}/zarr.json"):
                    return self.pack(name), row
            except IntegrityError as error:
                problem = error
        raise problem

    def pack(self, name: str) -> Pack:
        if name not in self._packs:
            self._packs[name] = Pack(self.storage, name)
        return self._packs[name]

    def packs(self) -> list[str]:
        return [name for (name,) in self._query("select name from packs order by name")]

    def packs_of(self, model: str, encoding: str) -> list[str]:
        """The packs of one model (its key) in one encoding (its id)."""
        query = "select name from packs where model = ? and encoding = ? order by name"
        return [name for (name,) in self._query(query, (model, encoding))]

    def followed(self, key: str, model: str, encoding: str) -> bool:
        """Whether any segment of a model (its key) in an encoding (its id) stands after this one."""
        query = "select 1 from parents join packs on pack = name where parent = ? and model = ? and encoding = ? limit 1"
        return bool(self._query(query, (bytes.fromhex(key), model, encoding)))

    def one_of_each(self) -> list[str]:
        """A pack of every encoding: all of them say the same about it."""
        return [name for (name,) in self._query("select min(name) from packs group by encoding")]

    def totals(self) -> tuple[int, int, int]:
        """Artifacts, tokens and bytes of their units."""
        ((count, tokens, nbytes),) = self._query("select count(*), total(tokens), total(nbytes) from segments")
        return int(count), int(tokens), int(nbytes)
