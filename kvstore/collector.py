"""One run of gc. Nothing is re-encoded: what must stay is copied verbatim before its old pack goes.

Safe at every moment. A pack is retired only under the store's exclusive lock, after the snapshots were looked at again, and only while
all of it that they reach lies in another published pack. A killed run leaves at most copies, which the next one drops.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.calibration.shelf import CALIBRATIONS
from kvstore.calibration_gc import Shelves
from kvstore.errors import FormatError, InputError, IntegrityError, NotFoundError
from kvstore.pack import PACKS, Pack
from kvstore.pack_writer import PackWriter, copy_segment
from kvstore.quality_upkeep import unneeded_reports
from kvstore.reach import Reach, pack_keys
from kvstore.snapshot import SnapshotLog, file_name
from kvstore.storage.local import LocalStorage
from kvstore.verify_pack import file_problems, segment_problems

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class GcRules:
    """What stays. `keep_snapshots` newest ones; packs and leftovers younger than `grace_seconds`; packs with less than `rewrite_share` dead."""

    keep_snapshots: int = 8
    grace_seconds: float = 3600.0
    rewrite_share: float = 0.2
    drop_damaged: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.keep_snapshots < 1 or self.grace_seconds < 0 or not 0 <= self.rewrite_share <= 1:
            raise InputError("gc keeps at least one snapshot, waits 0 seconds or more, and rewrites from a share between 0 and 1")


@dataclass
class GcReport:
    """What was collected, or would be in a dry run. `packs_rewritten` maps an old name to the new one ("" in a dry run).

    `snapshots_kept` includes those that stay only because a kept one is written against them.
    """

    dry_run: bool = False
    packs_removed: list[str] = field(default_factory=list)
    packs_rewritten: dict[str, str] = field(default_factory=dict)
    packs_kept: int = 0
    calibrations_removed: list[str] = field(default_factory=list)
    calibrations_kept: int = 0
    reports_removed: list[str] = field(default_factory=list)
    artifacts_dropped: int = 0
    artifacts_kept: int = 0
    snapshots_removed: list[int] = field(default_factory=list)
    snapshots_kept: list[int] = field(default_factory=list)
    leftovers_removed: int = 0
    bytes_freed: int = 0
    damaged: list[str] = field(default_factory=list)


class Collector:
    """One collection."""

    def __init__(self, storage: LocalStorage, rules: GcRules):
        self.storage, self.rules, self.report = storage, rules, GcReport(rules.dry_run)
        self.reach = Reach(storage, rules.keep_snapshots)
        self.shelves = Shelves(storage)
        self.opened: dict[str, Pack] = {}
        self.home: dict[tuple[str, bytes], tuple[str, int]] = {}  # (encoding, key) -> the pack and row that keep it
        self.unreadable: list[str] = []
        for name in storage.names(PACKS):
            if (problem := self._open(name)) is not None:
                self.unreadable.append(name)
                self.report.damaged.append(f"{name}: {problem}")

    def _open(self, name: str) -> str | None:
        """What is wrong with a pack's metadata, if anything."""
        try:
            pack = Pack(self.storage, name)
            _ = pack.rows
        except NotFoundError as error:
            return str(error) if self.storage.exists(f"{PACKS}/{name}") else None  # None: collected by somebody else
        except (IntegrityError, FormatError) as error:
            return str(error)
        self.opened[name] = pack
        return None

    def _deleting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.rules.dry_run else self.storage.lock(exclusive=True)

    def snapshots(self) -> None:
        """Before the packs: no snapshot must outlive its artifacts without need."""
        log = SnapshotLog(self.storage)
        with self._deleting():
            self.reach.look(self.opened.values())
            needed = log.needed(self.reach.kept)
            gone = sorted(set(log.numbers()) - needed, reverse=True)  # downwards: what is left can be read at any moment
            names = [file_name(number) for number in gone]
            self.report.bytes_freed += sum(map(self.storage.size, names))
            if not self.rules.dry_run:
                self.storage.discard(names)
        self.report.snapshots_removed, self.report.snapshots_kept = gone[::-1], sorted(needed)

    def packs(self) -> None:
        """Give every artifact that is reached one home, then drop or rewrite what holds more than that.

        Nothing where there is no snapshot: a copy that left out the hidden `.kvstore` must not lose its packs too.
        """
        if not self.reach.kept:
            self.report.packs_kept = len(self.opened)
            return
        for name in sorted(self.opened):
            self._settle(self.opened[name])
        for name in sorted(self.opened):
            self._judge(self.opened[name])
        for name in self.unreadable if self.rules.drop_damaged else ():
            self._retire_unreadable(name)

    def _settle(self, pack: Pack) -> None:
        """Claim what no earlier pack keeps. Of two copies the later one counts only where the earlier one is damaged."""
        encoding = pack.manifest.encoding_id
        wanted = self.reach.keys(encoding)
        for row, key in enumerate(pack_keys(pack)):
            if key in wanted and not self._kept_already(encoding, key, pack, row):
                self.home[encoding, key] = (pack.name, row)

    def _kept_already(self, encoding: str, key: bytes, pack: Pack, row: int) -> bool:
        if (encoding, key) not in self.home:
            return False
        name, theirs = self.home[encoding, key]
        other = self.opened[name]
        return not segment_problems(other, other.segment(theirs)) or bool(segment_problems(pack, pack.segment(row)))

    def _live(self, pack: Pack) -> Mask:
        """bool [segments]: the rows that are reached and kept here."""
        encoding = pack.manifest.encoding_id
        here = (self.home.get((encoding, k)) == (pack.name, row) for row, k in enumerate(pack_keys(pack)))
        return np.fromiter(here, np.bool_, len(pack.rows))

    def _judge(self, pack: Pack) -> None:
        """Drop, rewrite or keep one pack."""
        if not self.storage.exists(pack.folder):
            return  # somebody else was faster
        live, (bad, broken) = self._live(pack), self._damage(pack)
        young = self.storage.age(pack.folder) < self.rules.grace_seconds
        stay = (live | young) & ~bad
        sizes = np.sum([pack.rows[f"{a}.nbytes"] for a in pack.arrays], axis=0)
        due = not stay.all() and float(sizes[~stay].sum()) >= self.rules.rewrite_share * float(sizes.sum())
        done = (broken or due) and (self._rewrite(pack, stay, bad) if stay.any() else self._drop(pack, bad))
        self.report.packs_kept += not done
        self.report.artifacts_kept += int(stay.sum()) if done else len(stay)
        self.report.artifacts_dropped += int((~stay).sum()) if done else 0

    def _damage(self, pack: Pack) -> tuple[Mask, bool]:
        """bool [segments]: what cannot be read as it was written; and whether anything is wrong. Looked for only where it shall be dropped."""
        bad = np.zeros(len(pack.rows), np.bool_)
        if not self.rules.drop_damaged:
            return bad, False
        lost = self.shelves.damage_for(pack.encoding)
        problems = [p for _, p in file_problems(pack)] + lost
        for row in range(len(bad)):
            found = segment_problems(pack, pack.segment(row))
            bad[row] = bool(found or lost)
            problems += found
        self.report.damaged += [f"{pack.name}: {p}" for p in dict.fromkeys(problems)]
        return bad, bool(problems)

    def _drop(self, pack: Pack, bad: Mask) -> bool:
        size = pack.nbytes
        if not self._retire(pack, bad):
            return False
        self.report.packs_removed.append(pack.name)
        self.report.bytes_freed += size
        return True

    def _rewrite(self, pack: Pack, stay: Mask, bad: Mask) -> bool:
        """Publish a pack of the rows that stay, then retire the old one, which is left alone where one of them is damaged."""
        name = self._copy(pack, stay)
        if name is None:
            return False
        freed = int(sum(pack.rows[f"{a}.nbytes"][~stay].sum() for a in pack.arrays))
        if name and name != pack.name:  # the same name: nothing was dead, and the damage is mended in place
            if (size := self._move_in(pack, stay, name)) is None or not self._retire(pack, bad):
                return False
            freed = pack.nbytes - size
        self.report.packs_rewritten[pack.name] = name
        self.report.bytes_freed += freed
        return True

    def _copy(self, pack: Pack, stay: Mask) -> str | None:
        """The new pack's name, "" in a dry run, None where something is damaged."""
        if self.rules.dry_run:
            return ""
        m = pack.manifest
        writer = PackWriter(self.storage, m.model, m.layout, m.encoding, m.provenance)
        try:
            for row in np.flatnonzero(stay):
                copy_segment(pack, pack.segment(int(row)), writer)
            return writer.close()
        except (IntegrityError, NotFoundError) as error:
            if self.storage.exists(pack.folder):
                self.report.damaged.append(f"{pack.name}: {error}")
            return None
        finally:
            writer.abandon()

    def _move_in(self, pack: Pack, stay: Mask, name: str) -> int | None:
        """The rows that stay have their home in the new pack from now on. Its bytes, None where another gc has taken it already."""
        try:
            moved = Pack(self.storage, name)
        except NotFoundError:
            return None
        rows = {key: row for row, key in enumerate(pack_keys(moved))}
        keys, encoding = pack_keys(pack), pack.manifest.encoding_id
        self.home |= {(encoding, keys[row]): (name, rows[keys[row]]) for row in np.flatnonzero(stay)}
        return moved.nbytes

    def _retire(self, pack: Pack, bad: Mask) -> bool:
        """Delete a pack, unless a builder has just taken it up, or a readable row is reached by now and lies nowhere else."""
        if self.rules.dry_run:
            return True
        with self._deleting():
            self.reach.look(self.opened.values())
            encoding, wanted = pack.manifest.encoding_id, self.reach.keys(pack.manifest.encoding_id)
            needed = {k for k, lost in zip(pack_keys(pack), bad, strict=True) if k in wanted and not lost}
            young = self.storage.age(pack.folder) < self.rules.grace_seconds
            if (young and not self.rules.drop_damaged) or not all(self._elsewhere(encoding, k, pack.name) for k in needed):
                return False
            self.storage.retire(pack.folder)
            return True

    def _elsewhere(self, encoding: str, key: bytes, name: str) -> bool:
        home = self.home.get((encoding, key), (name, 0))[0]
        return home != name and self.storage.exists(f"{PACKS}/{home}/zarr.json")

    def _retire_unreadable(self, name: str) -> None:
        """A pack that nobody can read, unless a builder has mended it meanwhile."""
        with self._deleting():
            if self._open(name) is not None:
                self.report.packs_removed.append(name)
                if not self.rules.dry_run:
                    self.storage.retire(f"{PACKS}/{name}")

    def calibrations(self) -> None:
        """After the packs: what none of them names any more. Where one cannot be read, all stay; and where there is no snapshot, as packs do."""
        if not self.reach.kept:
            return
        with self._deleting():
            try:
                free, self.report.calibrations_kept = self.shelves.unused(
                    self.rules.grace_seconds,
                    gone=self.report.packs_removed if self.rules.dry_run else (),
                    drop_damaged=self.rules.drop_damaged,
                )
            except (IntegrityError, FormatError) as error:
                self.report.damaged.append(f"calibrations stay: {error}")
                self.report.calibrations_kept = len(self.storage.names(CALIBRATIONS))
                return
            for digest in free:
                self._shelve(digest)

    def _shelve(self, digest: str) -> None:
        name = f"{CALIBRATIONS}/{digest}"
        self.report.calibrations_removed.append(digest)
        self.report.bytes_freed += self.storage.total(name) if self.rules.dry_run else self.storage.retire(name)

    def quality_reports(self) -> None:
        """After the packs: those of encodings (ids) that none of them has any more."""
        if not self.reach.kept:
            return
        with self._deleting():
            for folder in unneeded_reports(self.storage, self.report.packs_removed if self.rules.dry_run else ()):
                self.report.reports_removed.append(folder.rsplit("/", 1)[1])
                self.report.bytes_freed += self.storage.total(folder) if self.rules.dry_run else self.storage.retire(folder)

    def leftovers(self) -> None:
        """What crashed writers left."""
        for path in self.storage.leftovers(self.rules.grace_seconds):
            self.report.leftovers_removed += 1
            if not self.rules.dry_run:
                self.report.bytes_freed += self.storage.sweep(path)
