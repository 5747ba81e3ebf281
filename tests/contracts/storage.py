"""What every storage must do, whatever it stores in. Subclass it and provide the fixture `storage`, empty."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.errors import NotFoundError
from kvstore.storage.local import LocalStorage


def stage(storage: LocalStorage, **files: bytes) -> Path:
    folder = storage.stage()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


class StorageContract:
    """Reads by name, exclusive creation, atomic publication, removal in one step, a lock."""

    def test_missing_names_are_not_found(self, storage: LocalStorage) -> None:
        for read in (storage.read, storage.map, storage.size):
            with pytest.raises(NotFoundError, match=r"nothing\.json"):
                read("a/nothing.json")
        assert not storage.exists("a/nothing.json")
        assert storage.names("a") == []
        assert storage.age("a") == 0.0
        assert storage.stamp("a") is None
        assert storage.retire("a") == 0

    def test_created_file_is_whole_and_first_writer_wins(self, storage: LocalStorage) -> None:
        assert storage.create("a/b/1.json", b"first")
        assert not storage.create("a/b/1.json", b"second")
        assert storage.read("a/b/1.json") == bytes(storage.map("a/b/1.json")) == b"first"
        assert storage.size("a/b/1.json") == 5
        assert storage.leftovers(0) == []

    def test_of_many_creators_exactly_one_succeeds(self, storage: LocalStorage) -> None:
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda i: storage.create("race.json", str(i).encode()), range(64)))
        assert won.count(True) == 1
        assert storage.read("race.json") == str(won.index(True)).encode()

    def test_names_are_sorted_and_leave_out_what_is_not_an_entry(self, storage: LocalStorage) -> None:
        for name in ("b", "a", ".hidden", "zarr.json"):
            storage.create(f"folder/{name}", b"")
        assert storage.names("folder") == ["a", "b"]

    def test_empty_file_can_be_mapped(self, storage: LocalStorage) -> None:
        storage.create("empty", b"")
        assert bytes(storage.map("empty")) == b""

    def test_published_folder_is_whole_and_first_publisher_wins(self, storage: LocalStorage) -> None:
        first, second = stage(storage, x=b"1", y=b"2"), stage(storage, x=b"3")
        storage.create("packs/zarr.json", b"{}")
        assert storage.publish(first, "packs/p")
        assert not storage.publish(second, "packs/p")
        assert (storage.names("packs/p"), storage.read("packs/p/x")) == (["x", "y"], b"1")
        assert not first.exists()
        assert not second.exists()

    def test_mending_replaces_only_what_is_damaged(self, storage: LocalStorage) -> None:
        storage.create("packs/zarr.json", b"{}")
        storage.publish(stage(storage, x=b"1", y=b"2"), "packs/p")
        before = storage.stamp("packs/p/x")
        assert not storage.publish(stage(storage, x=b"1", y=b"2"), "packs/p", mend=True)
        assert storage.stamp("packs/p/x") == before
        for damage in (lambda p: p.write_bytes(b"!"), Path.unlink, lambda p: p.write_bytes(b"22")):
            damage(storage.path("packs/p/y"))
            assert storage.publish(stage(storage, x=b"1", y=b"2"), "packs/p", mend=True)
            assert (storage.read("packs/p/x"), storage.read("packs/p/y")) == (b"1", b"2")

    def test_publishing_again_makes_a_folder_young(self, storage: LocalStorage) -> None:
        """So that a collector spares what a builder is about to commit."""
        import os

        storage.create("packs/zarr.json", b"{}")
        storage.publish(stage(storage, x=b"1"), "packs/p")
        os.utime(storage.path("packs/p"), (1, 1))
        assert storage.age("packs/p") > 1e6
        storage.publish(stage(storage, x=b"1"), "packs/p", mend=True)
        assert storage.age("packs/p") < 60

    def test_retired_entries_are_gone_and_counted(self, storage: LocalStorage) -> None:
        storage.create("packs/zarr.json", b"{}")
        storage.publish(stage(storage, x=b"12345"), "packs/p")
        view = storage.map("packs/p/x")
        assert storage.retire("packs/p") == 5
        assert not storage.exists("packs/p")
        assert storage.leftovers(0) == []
        assert bytes(view) == b"12345", "who has it mapped may finish reading"

    def test_leftovers_are_what_nobody_touched_for_a_while(self, storage: LocalStorage) -> None:
        folder = stage(storage, x=b"123")
        assert storage.leftovers(3600) == []
        assert storage.leftovers(0) == [folder]
        assert storage.sweep(folder) == 3
        assert storage.sweep(folder) == 0
        assert storage.leftovers(0) == []

    def test_exclusive_lock_waits_for_shared_ones_and_keeps_them_out(self, storage: LocalStorage) -> None:
        events: list[str] = []

        def hold(exclusive: bool, name: str) -> None:
            with storage.lock(exclusive=exclusive):
                events.append(f"{name} in")
                time.sleep(0.05)
                events.append(f"{name} out")

        with storage.lock(exclusive=False), storage.lock(exclusive=False):  # shared ones stand side by side
            waiting = threading.Thread(target=hold, args=(True, "collector"))
            waiting.start()
            time.sleep(0.05)
            events.append("builder out")
        waiting.join()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: hold(True, str(i)), range(4)))
        assert events[:3] == ["builder out", "collector in", "collector out"]
        assert all(events[i].split()[0] == events[i + 1].split()[0] for i in range(3, len(events), 2))
