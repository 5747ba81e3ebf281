"""The log of versions: deltas add up, nobody's commit is lost, and what was tampered with is refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.errors import FormatError, IntegrityError, KvstoreError, NotFoundError
from kvstore.manifest import Row, Snapshot
from kvstore.snapshot import FULL_EVERY, Change, Rows, SnapshotLog, file_name
from kvstore.storage.local import LocalStorage
from tests.synthetic import Document


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def log(tmp_path: Path) -> SnapshotLog:
    return SnapshotLog(LocalStorage(tmp_path / "store"))


def row(source: str, version: int = 0) -> Row:
    return Document(source, version).row()


def test_empty_log_has_no_rows(log: SnapshotLog) -> None:
    assert (log.numbers(), log.newest(), log.rows(), log.newest_rows()) == ([], 0, {}, (0, {}))
    with pytest.raises(NotFoundError):
        log.rows(1)


def test_commit_without_change_writes_nothing(log: SnapshotLog) -> None:
    assert log.commit(Change(), "nothing") == 0
    assert log.commit(Change((row("a"),)), "one") == 1
    assert log.commit(Change((row("a"),), (row("b").id,)), "the same") == 1
    assert log.numbers() == [1]


def test_deltas_and_full_lists_add_up(log: SnapshotLog) -> None:
    """Over several full lists, every number reads as what was committed by then."""
    rng, model, history = random.Random(1), Rows(), {}
    for version in range(1, 2 * FULL_EVERY + 20):
        put = tuple(row(f"d{rng.randrange(30)}", version) for _ in range(rng.randrange(1, 4)))
        gone = tuple(set(rng.sample(sorted(model), min(2, len(model)))) - {r.id for r in put}) if version % 3 == 0 else ()
        number = log.commit(Change(put, gone), f"n{version}")
        model = {i: r for i, r in model.items() if i not in gone} | {r.id: r for r in put}
        history[number] = dict(model)
    assert sorted(history) == log.numbers() == list(range(1, 2 * FULL_EVERY + 20))
    assert [n for n in log.numbers() if log.read(n).full] == [1, FULL_EVERY, 2 * FULL_EVERY]
    for number in [1, 2, FULL_EVERY - 1, FULL_EVERY, FULL_EVERY + 1, *rng.sample(sorted(history), 20)]:
        assert log.rows(number) == history[number]
    assert log.newest_rows() == (max(history), model)


def test_needed_files_are_those_down_to_the_full_list(log: SnapshotLog) -> None:
    for version in range(FULL_EVERY + 6):
        log.commit(Change((row("a", version),)), "")
    assert log.needed([3]) == {1, 2, 3}
    assert log.needed([FULL_EVERY + 2]) == {FULL_EVERY, FULL_EVERY + 1, FULL_EVERY + 2}
    assert log.needed([2, FULL_EVERY]) == {1, 2, FULL_EVERY}


text = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.none() | st.booleans() | numbers | text | st.lists(st.integers(0, 9))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=text.filter(bool), metadata=st.dictionaries(text, values))
def test_any_source_and_metadata_come_back(tmp_path_factory: pytest.TempPathFactory, source: str, metadata: dict[str, object]) -> None:
    log = SnapshotLog(LocalStorage(tmp_path_factory.mktemp("log")))
    wanted = msgspec.structs.replace(row("a"), source=source, metadata=metadata)
    log.commit(Change((wanted,)), source)
    assert log.rows() == {wanted.id: wanted}
    assert log.commit(Change((wanted,)), "again") == 1


# conflicts


def test_lost_race_is_applied_on_top_of_what_won(log: SnapshotLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.commit(Change((row("a"),)), "first")
    other, create = SnapshotLog(log.storage), log.storage.create
    raced: list[str] = []

    def late(name: str, data: bytes) -> bool:
        if not raced:
            raced.append(name)
            monkeypatch.setattr(log.storage, "create", create)
            assert other.commit(Change((row("b"),), (row("a").id,)), "faster") == 2
        return create(name, data)

    monkeypatch.setattr(log.storage, "create", late)
    assert log.commit(Change((row("c"),)), "slower") == 3
    assert sorted(r.source for r in log.rows().values()) == ["b", "c"]


def test_threads_lose_nothing(log: SnapshotLog) -> None:
    def work(who: int) -> list[int]:
        return [log.commit(Change((row(f"{who}/{i}"),)), "") for i in range(20)]

    with ThreadPoolExecutor(6) as pool:
        numbers = [n for found in pool.map(work, range(6)) for n in found]
    assert sorted(numbers) == log.numbers() == list(range(1, 121))
    assert {r.source for r in log.rows().values()} == {f"{w}/{i}" for w in range(6) for i in range(20)}


COMMITTER = """
import sys
from pathlib import Path
from kvstore.snapshot import Change, SnapshotLog
from kvstore.storage.local import LocalStorage
from tests.synthetic import Document

log = SnapshotLog(LocalStorage(Path(sys.argv[1])))
sys.stdin.readline()
for i in range(25):
    print(log.commit(Change((Document(f"{sys.argv[2]}/{i}").row(),)), "test"), flush=True)
"""


def test_processes_lose_nothing(log: SnapshotLog) -> None:
    command = [sys.executable, "-c", COMMITTER, str(log.storage.root)]
    here = Path(__file__).parent.parent
    running = [subprocess.Popen([*command, str(w)], stdin=-1, stdout=-1, text=True, cwd=here) for w in range(4)]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers = [int(n) for process in running for n in process.communicate(timeout=120)[0].split()]
    assert [p.returncode for p in running] == [0] * 4
    assert sorted(numbers) == log.numbers() == list(range(1, 101))
    assert {r.source for r in log.rows().values()} == {f"{w}/{i}" for w in range(4) for i in range(25)}


def test_guard_sees_the_rows_and_may_refuse(log: SnapshotLog) -> None:
    log.commit(Change((row("a"),)), "first")
    seen: list[Rows] = []

    def refuse(rows: Rows) -> None:
        seen.append(rows)
        raise IntegrityError("no")

    with pytest.raises(IntegrityError, match="no"):
        log.commit(Change((row("b"),)), "second", guard=refuse)
    assert seen == [{row("a").id: row("a")}]
    assert log.numbers() == [1]


def test_reader_follows_when_what_it_was_about_to_read_is_collected(log: SnapshotLog, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in range(FULL_EVERY):
        log.commit(Change((row("a", version),)), "")
    listed = iter([FULL_EVERY - 1])  # what a listing said before the last commit and the gc after it
    for number in range(1, FULL_EVERY):
        log.storage.retire(file_name(number))
    newest = log.newest
    monkeypatch.setattr(log, "newest", lambda: next(listed, None) or newest())
    assert log.newest_rows() == (FULL_EVERY, {row("a").id: row("a", FULL_EVERY - 1)})


# damage


def test_any_flipped_byte_in_the_chain_is_noticed(log: SnapshotLog) -> None:
    for version in range(3):
        log.commit(Change((row("a", version), row(f"b{version}"))), "note")
    wanted = log.rows()
    for number in (1, 2, 3):
        path = log.storage.path(file_name(number))
        before = path.read_bytes()
        for at in range(0, len(before), 7):
            path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            with pytest.raises((IntegrityError, FormatError)):
                log.rows()
        path.write_bytes(before)
    assert log.rows() == wanted


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"\xff", b'{"format": 1e999}'])
def test_snapshot_that_is_none(log: SnapshotLog, text: bytes) -> None:
    log.storage.create(file_name(1), text)
    with pytest.raises((IntegrityError, FormatError), match="000000000001"):
        log.rows()


def sign(snapshot: Snapshot) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(snapshot, digest=snapshot.own_digest()))


def test_another_format_version_is_refused_by_name(log: SnapshotLog) -> None:
    log.commit(Change((row("a"),)), "")
    newer = sign(msgspec.structs.replace(log.read(1), format=2, number=2))
    log.storage.create(file_name(2), newer)
    with pytest.raises(FormatError, match="format 2, this kvstore reads format 1"):
        log.rows()


def test_chain_that_goes_in_circles_is_refused(log: SnapshotLog) -> None:
    log.commit(Change((row("a"),)), "")
    for parent in (2, 3, 10**30, -1):
        looped = msgspec.structs.replace(log.read(1), number=2, parent=parent, parent_digest="ab" * 32, full=False)
        log.storage.path(file_name(2)).write_bytes(sign(looped))
        with pytest.raises(KvstoreError):
            log.rows()


def test_parent_of_another_history_is_refused(log: SnapshotLog, tmp_path: Path) -> None:
    """As after copying the snapshots of one store over those of another."""
    for version in range(2):
        log.commit(Change((row("a", version),)), "")
    other = SnapshotLog(LocalStorage(tmp_path / "other"))
    other.commit(Change((row("x"),)), "")
    log.storage.path(file_name(1)).write_bytes(other.storage.read(file_name(1)))
    with pytest.raises(IntegrityError, match="snapshot 1 is not the one that 2 was written against"):
        log.rows()


def test_renamed_snapshot_is_refused(log: SnapshotLog) -> None:
    log.commit(Change((row("a"),)), "")
    log.storage.path(file_name(1)).rename(log.storage.path(file_name(7)))
    with pytest.raises(IntegrityError):
        log.rows()


def test_foreign_files_are_not_numbers(log: SnapshotLog) -> None:
    log.commit(Change((row("a"),)), "")
    for name in ("README.json", "2.json", "000000000002.json.tmp", "00000000000²2.json", "000000000003"):
        log.storage.create(f".kvstore/snapshots/{name}", b"{}")
    assert log.numbers() == [1]
