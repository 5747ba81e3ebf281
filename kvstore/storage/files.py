"""Calls to the file system that say what went wrong, and put names and bytes on the disk before they return."""

from __future__ import annotations

import errno
import filecmp
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.errors import NotFoundError, StorageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("kvstore")
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
    try:
        names, others = ({p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} for folder in (ours, theirs))
    except FileNotFoundError:  # one of them was removed meanwhile
        return False
    return names == others and not any(filecmp.cmpfiles(ours, theirs, names, shallow=False)[1:])


def write_synced(path: Path, data: bytes | memoryview) -> None:
    """A new file with `data`, on the disk when this returns (its name is not, before `sync_folder`)."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def differs(target: Path, staged: Path) -> bool:
    """Whether something stands there that is not what was staged. The staged folder may be swept meanwhile: then nothing is known."""
    return target.exists() and not same_content(staged, target) and staged.exists()


def delete(path: Path) -> int:
    """Bytes of a file or folder that is deleted, as far as nobody else does the same."""
    try:
        freed = sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file())
    except FileNotFoundError:
        freed = 0
    if path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
    return freed


def rename_to_free(source: Path, target: Path) -> bool:
    """Rename a folder, unless something stands there already."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def hold(handle: int, exclusive: bool) -> None:
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
