"""A store on a local file system: memory-mapped reads, atomic and durable publication.

Nothing published is ever changed in place. A folder is staged under `.kvstore/tmp`, synced bottom-up and renamed into place; a
single file is written beside its target and hard-linked to it, which fails if the name is taken: that is the only lock.
"""

from __future__ import annotations

import errno
import filecmp
import logging
import mmap
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.errors import NotFoundError, StorageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("kvstore")
TMP = ".kvstore/tmp"
LOCK = ".kvstore/lock"
_REMEDY = {
    errno.ENOSPC: "free some space and run the same command again: it does only what is missing",
    errno.EDQUOT: "free some quota and run the same command again: it does only what is missing",
    errno.EACCES: "check the permissions of the store",
    errno.EPERM: "check the permissions of the store; its file system must allow hard links",
    errno.EROFS: "the store is on a read-only file system: copy it to write to it",
}


@contextmanager
def translated(what: str) -> Iterator[None]:
    """OSError becomes StorageError with the path and a remedy."""
    try:
        yield
    except (StorageError, NotFoundError):
        raise
    except OSError as error:
        remedy = _REMEDY.get(error.errno or 0, "check the disk and run the same command again")
        raise StorageError(f"{what}: {error.strerror or error}", remedy=remedy) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """A folder and its parents; the names of those that are new are on the disk when this returns."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_folder(folder.parent)


def same_content(ours: Path, theirs: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    names, others = ({p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} for folder in (ours, theirs))
    return names == others and not any(filecmp.cmpfiles(ours, theirs, names, shallow=False)[1:])


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """A new file with `data`, on the disk when this returns (its name is not, before `sync_folder`)."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
            _hold(file.fileno(), exclusive)
            yield

    def publish(self, staged: Path, name: str, *, mend: bool = False) -> bool:
        """Rename a staged and synced folder to `name`. False, and nothing changed, where `name` exists already.

        With `mend`, what stands there is compared byte for byte, and replaced where it is damaged.
        """
        target = self.path(name)
        with translated(str(target)):
            if mend and target.exists() and not same_content(staged, target):
                log.warning("%s was damaged: replaced", target)
                self.retire(name)
            if target.exists():
                shutil.rmtree(staged, ignore_errors=True)
                os.utime(target)  # young again: a collector leaves it alone until the snapshot that needs it is there
                return False
            try:
                os.rename(staged, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not target.exists():
                    raise
                shutil.rmtree(staged, ignore_errors=True)
                return False
            sync_folder(target.parent)
            return True

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
        """Delete a file or a folder: moved out of sight in one step first, so that no reader sees half of it. Bytes freed."""
        path, grave = self.path(name), self.path(TMP) / f"retired-{uuid.uuid4().hex}"
        with translated(str(path)):
            make_folder(grave.parent)
            try:
                os.rename(path, grave)
            except FileNotFoundError:
                return 0
            sync_folder(path.parent)
            return self.sweep(grave)

    def sweep(self, path: Path) -> int:
        """Delete a file or folder under tmp, if nobody else did. Bytes freed."""
        try:
            if path.is_file():
                freed = path.stat().st_size
                path.unlink(missing_ok=True)
                return freed
            freed = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        except FileNotFoundError:
            freed = 0
        shutil.rmtree(path, ignore_errors=True)
        return freed

    def leftovers(self, older_than: float) -> list[Path]:
        """What crashed writers left under tmp, untouched for `older_than` seconds."""
        folder = self.path(TMP)
        found = folder.iterdir() if folder.exists() else ()
        return [p for p in found if time.time() - newest_change(p) >= older_than]


def _hold(handle: int, exclusive: bool) -> None:
    """Lock an open file until it is closed. Where the file system has no locks, the grace period alone protects writers from gc."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    except OSError as error:
        log.warning("no file locks here (%s): do not run gc while something is built", error.strerror)


def newest_change(path: Path) -> float:
    """Time of the last change anywhere below `path`: a live writer keeps touching its files."""
    try:
        return max([path.stat().st_mtime, *(f.stat().st_mtime for f in path.rglob("*"))])
    except FileNotFoundError:
        return time.time()
