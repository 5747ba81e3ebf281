"""A store on a local file system: memory-mapped reads, atomic and durable publication.

Nothing published is ever changed in place. A folder is staged under `.kvstore/tmp`, synced bottom-up and renamed into place; a single file
is written beside its target and hard-linked to it, which fails if the name is taken. A lock keeps collectors out while a snapshot is committed.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstore.errors import NotFoundError
from kvstore.storage.files import delete, differs, hold, make_folder, newest_change, rename_to_free, sync_folder, translated, write_synced

log = logging.getLogger("kvstore")
TMP = ".kvstore/tmp"
LOCK = ".kvstore/lock"


class LocalStorage:
    """Files under one folder, by relative POSIX path."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, name: str) -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        """Whole file. Raises NotFoundError."""
        with translated(str(self.path(name))):
            try:
                return self.path(name).read_bytes()
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.path(name)} does not exist") from error

    def map(self, name: str) -> memoryview:
        """The file's bytes, memory-mapped read-only; the view keeps the mapping alive. Raises NotFoundError."""
        with translated(str(self.path(name))):
            try:
                with open(self.path(name), "rb") as file:
                    if os.fstat(file.fileno()).st_size == 0:
                        return memoryview(b"")
                    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.path(name)} does not exist") from error

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def size(self, name: str) -> int:
        """Bytes of one file. Raises NotFoundError."""
        with translated(str(self.path(name))):
            try:
                return self.path(name).stat().st_size
            except FileNotFoundError as error:
                raise NotFoundError(f"{self.path(name)} does not exist") from error

    def names(self, folder: str) -> list[str]:
        """Sorted names in a folder; none if it does not exist. Hidden names and zarr.json are left out."""
        with translated(str(self.path(folder))):
            try:
                return sorted(n for n in os.listdir(self.path(folder)) if not n.startswith(".") and n != "zarr.json")
            except FileNotFoundError:
                return []

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Changes whenever a file or folder is replaced or changed; None if it is gone."""
        try:
            found = self.path(name).stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def age(self, name: str) -> float:
        """Seconds since the file or folder was last changed; 0 if it is gone."""
        try:
            return max(0.0, time.time() - self.path(name).stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def total(self, name: str) -> int:
        """Bytes of the files in a folder; 0 where it is gone."""
        with translated(str(self.path(name))):
            return sum(p.stat().st_size for p in self.path(name).rglob("*") if p.is_file())

    def touch(self, name: str) -> None:
        """Make a folder young again: a collector leaves it alone for its grace period. Nothing where it is gone."""
        with translated(str(self.path(name))), suppress(FileNotFoundError):
            os.utime(self.path(name))

    def stage(self) -> Path:
        """A new empty folder under tmp, for one pack in the making."""
        with translated(str(self.path(TMP))):
            make_folder(self.path(TMP))
            folder = self.path(TMP) / uuid.uuid4().hex
            folder.mkdir()
            return folder

    @contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """Shared while a snapshot is committed, exclusive while something is deleted. The system lets go when a process dies."""
        with translated(str(self.path(LOCK))):
            make_folder(self.path(LOCK).parent)
            file = open(self.path(LOCK), "a+b")  # noqa: SIM115  closed below
        with file:
            hold(file.fileno(), exclusive)
            yield

    def publish(self, staged: Path, name: str, *, mend: bool = False) -> bool:
        """Rename a staged and synced folder to `name`. False, and nothing changed, where `name` exists already.

        With `mend`, what stands there is compared byte for byte, and replaced where it is damaged.
        """
        target = self.path(name)
        with translated(str(target)):
            if mend:
                self._clear_damage(staged, name)
            if rename_to_free(staged, target):
                sync_folder(target.parent)
                return True
            shutil.rmtree(staged, ignore_errors=True)
            self.touch(name)  # a collector leaves it alone until the snapshot that needs it is there
            return False

    def _clear_damage(self, staged: Path, name: str) -> None:
        """Remove what stands under a name without being what it should be. Locked: nobody else removes or replaces it meanwhile."""
        target = self.path(name)
        if differs(target, staged):
            with self.lock(exclusive=True):
                if differs(target, staged):
                    log.warning("%s is damaged and is replaced", target)
                    self.retire(name)

    def create(self, name: str, data: bytes) -> bool:
        """A new file, whole and durable, or False where the name is taken: of two writers exactly one succeeds."""
        target, staged = self.path(name), self.path(TMP) / uuid.uuid4().hex
        with translated(str(target)):
            make_folder(target.parent)
            make_folder(staged.parent)
            try:
                write_synced(staged, data)
                os.link(staged, target)
            except FileExistsError:
                return False
            finally:
                staged.unlink(missing_ok=True)
            sync_folder(target.parent)
            return True

    def retire(self, name: str) -> int:
        """Delete a file or a folder. Bytes freed, 0 where it was gone already."""
        with translated(str(self.path(name))):
            return self.sweep(self.path(name))

    def sweep(self, path: Path) -> int:
        """Delete a file or a folder, tmp's included. Bytes freed.

        It is moved out of sight in one step first: no reader sees half of it, and a writer that was only slow cannot publish what is left.
        """
        grave = self.path(TMP) / f"retired-{uuid.uuid4().hex}"
        make_folder(grave.parent)
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return 0
        if path.parent != grave.parent:
            sync_folder(path.parent)
        return delete(grave)

    def discard(self, names: Sequence[str]) -> int:
        """Delete single files, in this order, with one sync a folder. Bytes freed."""
        freed = 0
        for path in map(self.path, names):
            with translated(str(path)):
                freed += delete(path)
        for folder in {self.path(n).parent for n in names}:
            sync_folder(folder)
        return freed

    def leftovers(self, older_than: float) -> list[Path]:
        """What crashed writers left under tmp, untouched for `older_than` seconds."""
        folder = self.path(TMP)
        found = folder.iterdir() if folder.exists() else ()
        return [p for p in found if time.time() - newest_change(p) >= older_than]
