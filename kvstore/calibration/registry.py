"""Where this process finds calibrations: in the stores it has opened, and in the folders that KVSTORE_CALIBRATIONS lists."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from kvstore.calibration.files import read
from kvstore.calibration.record import Calibration
from kvstore.errors import FormatError, KvstoreError

VARIABLE = "KVSTORE_CALIBRATIONS"


class Registry:
    """Folders that hold `<digest>/`, and what was loaded from them. May be used by many threads, and after a fork."""

    def __init__(self) -> None:
        self._folders: dict[Path, None] = {}
        self._loaded: dict[str, Calibration] = {}
        self._locks: dict[int, threading.Lock] = {}

    def _lock(self) -> threading.Lock:
        """One a process: a thread of the parent may have held its own while it forked."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def register(self, folder: Path) -> None:
        """Look there too from now on. The folder need not exist yet."""
        self._folders.setdefault(Path(os.path.abspath(folder)), None)

    def add(self, calibration: Calibration) -> None:
        """Know a calibration that lies nowhere (yet)."""
        self._loaded.setdefault(calibration.digest, calibration)

    def find(self, digest: str) -> Calibration:
        """The calibration, every file compared with its sha256 when it is loaded first.

        Raises FormatError where it is nowhere to be found, IntegrityError where every copy is damaged.
        """
        if not re.fullmatch("[0-9a-f]{64}", digest):  # it becomes part of a path
            raise FormatError(f"{digest!r} names no calibration", remedy="upgrade kvstore")
        known = self._loaded.get(digest)
        if known is not None:
            return known
        with self._lock():
            if digest not in self._loaded:
                self._loaded[digest] = self._load(digest)
            return self._loaded[digest]

    def _load(self, digest: str) -> Calibration:
        problem: KvstoreError | None = None
        for folder in (*self._folders, *_listed()):
            if not (folder / digest / "zarr.json").exists():
                continue
            try:
                return read(folder / digest, digest)
            except KvstoreError as error:
                problem = error
        if problem is not None:
            raise problem
        raise FormatError(f"calibration {digest} is not here",
                          remedy=f"open its store with kvstore.open(), or set {VARIABLE} to the folders of calibrations (STORE/calibrations)",
                          code="no-calibration")  # fmt: skip


def _listed() -> list[Path]:
    return [Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]


_PROCESS = Registry()
register, add, find = _PROCESS.register, _PROCESS.add, _PROCESS.find
