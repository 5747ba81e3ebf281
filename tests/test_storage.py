"""The local file system: the contract, durable order, and errors that say what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import KvstoreError, StorageError
from kvstore.records import create
from kvstore.snapshot import Change, SnapshotLog
from kvstore.storage import files
from kvstore.storage.files import make_folder, same_content
from kvstore.storage.local import LocalStorage
from tests.contracts.storage import StorageContract, stage
from tests.synthetic import Document, build, files_of, make_store, make_units, new_writer


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


class TestLocalStorage(StorageContract):
    pass


class Recorder:
    """Which inodes were synced when a name was published, and which folders after it."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.synced: set[int] = set()
        self.owed: dict[int, str] = {}  # folders that got a new name and were not synced since
        self.published: list[str] = []
        self.fsync, self.rename, self.link = os.fsync, os.rename, os.link
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(os, "rename", self._named(os.rename))
        patch.setattr(os, "link", self._named(os.link))

    def _fsync(self, handle: int) -> None:
        self.fsync(handle)
        self.synced.add(os.fstat(handle).st_ino)
        self.owed.pop(os.fstat(handle).st_ino, None)

    def _named(self, act: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def wrapped(source: Any, target: Any) -> None:
            if "retired-" not in str(target):
                below = [Path(source), *Path(source).rglob("*")]
                late = [p.name for p in below if p.stat().st_ino not in self.synced]
                assert not late, f"{target} is published before {late} are on the disk"
                self.published.append(str(target))
            act(source, target)
            changed = Path(source if "retired-" in str(target) else target).parent
            self.owed[changed.stat().st_ino] = str(changed)

        return wrapped


def test_everything_is_on_the_disk_before_its_name_and_its_name_before_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    store = make_store(tmp_path / "kv.zarr")
    assert not recorder.owed
    build(store, [Document("a"), Document("b", lengths=(3, 30))])
    assert not recorder.owed, "reported as stored while a name may still be lost"
    assert {Path(p).parent.name for p in recorder.published} == {"kv.zarr", "packs", "models", "calibrations", "templates", "snapshots"}


def test_new_folders_are_synced_into_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(synced) == 3


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some quota"),
        (errno.EACCES, "permissions"),
        (errno.EPERM, "hard links"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "check the disk"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename", "link"])
def test_failing_disk_is_named_with_a_remedy_and_costs_nothing(
    call: str, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "kv.zarr")
    build(store, [Document("a")])
    before = files_of(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(StorageError, match=says) as caught:
            build(store, [Document("a"), Document("b")])
    assert isinstance(caught.value, KvstoreError)
    assert isinstance(caught.value, OSError)
    assert caught.value.exit_status == 7
    now = files_of(store)
    assert before.items() <= now.items(), "what was stored is as it was"
    assert store.snapshots.newest() == 1
    build(store, [Document("a"), Document("b")])
    assert store.sources() == ["a", "b"]


def test_full_disk_while_a_segment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "kv.zarr")
    writer = new_writer(store.storage)
    task = Document("a").tasks()[1]
    writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids)))
    shard = writer._shards["t1"]
    monkeypatch.setattr(shard, "append", failing(errno.ENOSPC))
    other = Document("b").tasks()[1]
    with pytest.raises(StorageError, match="free some space"):
        writer.add(other.key, other.context, other.ids, make_units(other.key, len(other.ids)))
    writer.abandon()
    assert store.storage.leftovers(0) == []
    assert store.storage.names("packs") == []


def test_store_in_a_file_or_under_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StorageError, match="file"):
            create(path)


def test_without_file_locks_writing_goes_on_with_a_warning(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert SnapshotLog(storage).commit(Change((Document("a").row(),)), "test") == 1
    assert "do not run gc while something is built" in caplog.text


def test_sound_folder_stays_when_the_staged_one_is_swept(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a writer that was too slow would take away what a faster one has published and reported."""
    storage.create("packs/zarr.json", b"{}")
    assert storage.publish(stage(storage, x=b"1"), "packs/p")
    slow, compare = stage(storage, x=b"1"), files.same_content

    def swept_first(ours: Path, theirs: Path) -> bool:
        storage.sweep(slow)
        return compare(ours, theirs)

    monkeypatch.setattr(files, "same_content", swept_first)
    with pytest.raises(StorageError):
        storage.publish(slow, "packs/p", mend=True)
    assert storage.read("packs/p/x") == b"1"


def test_same_content_sees_every_difference(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_bytes(b"123")
    ours, theirs = tmp_path / "a", tmp_path / "b"
    assert same_content(ours, theirs)
    (theirs / "sub" / "file").write_bytes(b"124")
    assert not same_content(ours, theirs)
    (theirs / "sub" / "file").unlink()
    assert not same_content(ours, theirs)
