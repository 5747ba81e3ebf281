"""Checking every digest of a store. Needs neither a model nor torch, and writes nothing: a read-only mount is fine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from kvstore.arrays import probe_metadata
from kvstore.calibration import shelf
from kvstore.calibration.record import CalibrationRecord
from kvstore.calibration.shelf import CALIBRATIONS
from kvstore.errors import KvstoreError, NotFoundError
from kvstore.identity import make_model
from kvstore.manifest import ModelRecord, Row, Snapshot, StoreRecord, TemplateRecord, parse_group, zarr_group
from kvstore.pack import CONTEXT_KINDS, PACKS, Pack
from kvstore.quality_upkeep import report_findings
from kvstore.records import MODELS, TEMPLATES, read_model, read_probe, read_template
from kvstore.snapshot import FOLDER as SNAPSHOTS
from kvstore.snapshot import Rows, SnapshotLog, apply, file_name
from kvstore.storage.local import LocalStorage
from kvstore.store import Store
from kvstore.tags import FOLDER as TAGS
from kvstore.tags import list_tags
from kvstore.verify_calibrations import Severity, calibration_findings, link_findings, pack_findings
from kvstore.verify_pack import file_problems, key_problem, segment_problems

SLICE = 64  # segments a thread takes at a time


@dataclass(frozen=True)
class Problem:
    """`notice`: worth knowing, but nothing that is in use is damaged."""

    where: str
    what: str
    severity: Severity = "error"


@dataclass
class VerifyReport:
    """What was read, and what is wrong with it. `bytes` counts the units whose digests were compared."""

    packs: int = 0
    segments: int = 0
    bytes: int = 0
    snapshots: int = 0
    calibrations: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(p.severity == "error" for p in self.problems)


Progress = Callable[[VerifyReport, str], None]


def verify(store: Store | str | Path, *, progress: Progress | None = None, workers: int | None = None) -> VerifyReport:
    """Compare everything in a store with its digests; problems are collected, never raised.

    By path, a store opens even where `Store` refuses it (a damaged newest snapshot). `progress` is called after each pack. Raises
    NotFoundError where there is no store.
    """
    storage = store.storage if isinstance(store, Store) else LocalStorage(Path(store))
    if not storage.exists("zarr.json"):
        raise NotFoundError(f"there is no store at {storage.root}", remedy="--store names another place")
    run = _Run(storage, progress or (lambda report, where: None))
    run.root()
    run.records()
    run.calibrations()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for name in storage.names(PACKS):
            run.pack(name, pool)
    run.snapshots()
    run.quality()
    return run.report


class _Run:
    """One walk over a store."""

    def __init__(self, storage: LocalStorage, progress: Progress):
        self.storage, self.progress, self.report = storage, progress, VerifyReport()
        self.models: dict[str, ModelRecord] = {}
        self.templates: dict[str, TemplateRecord] = {}
        self.known: dict[str, CalibrationRecord] = {}  # intact calibrations
        self.stored: dict[tuple[str, str], int] = {}  # (encoding, segment key) -> tokens
        self.parents: dict[tuple[str, str], str] = {}

    def _note(self, where: str, problems: Iterable[str]) -> None:
        self.report.problems += [Problem(where, p) for p in problems]

    def root(self) -> None:
        """The root's record, and the groups that make the store readable by plain Zarr."""
        try:
            data = self.storage.read("zarr.json")
            record = parse_group(data, StoreRecord, "zarr.json")
            if data != zarr_group(record) or not re.fullmatch(r"[0-9a-f]{32}", record.id):
                self._note("zarr.json", ["is not as kvstore writes it"])
        except KvstoreError as error:
            self._note("zarr.json", [error.message])
        for name in (f"{folder}/zarr.json" for folder in (PACKS, CALIBRATIONS, MODELS)):
            if not self.storage.exists(name):
                self._note(name, ["is missing"])
            elif self.storage.read(name) != zarr_group():
                self._note(name, ["is not as kvstore writes it"])

    def records(self) -> None:
        """Models and templates: their names are digests."""
        for key in self.storage.names(MODELS):
            try:
                self.models[key] = read_model(self.storage, key)
                self._note(f"{MODELS}/{key}", self._model_problems(self.models[key]))
            except KvstoreError as error:
                self._note(f"{MODELS}/{key}", [error.message])
        for name in self.storage.names(TEMPLATES):
            try:
                self.templates[name[:-5]] = read_template(self.storage, name[:-5])
            except KvstoreError as error:
                self._note(f"{TEMPLATES}/{name}", [error.message])

    def calibrations(self) -> None:
        """Before the packs, which name them; then the links that say which is current."""
        for digest in self.storage.names(CALIBRATIONS):
            found = [Problem(*f) for f in calibration_findings(self.storage, digest)]
            if not found:
                self.known[digest] = shelf.record_of(self.storage, digest)
            self.report.problems += found
        self.report.calibrations = len(self.known)
        self.report.problems += [Problem(*f) for f in link_findings(self.storage, self.known)]

    def _model_problems(self, record: ModelRecord) -> Iterator[str]:
        fields = {k: v for k, v in msgspec.structs.asdict(record.model).items() if k != "key"}
        if make_model(**fields).key != record.model.key:
            yield "its key does not follow from its fields"
        folder, values = f"{MODELS}/{record.model.key}", record.layout.layers * 2 * len(record.probe_ids)
        if self.storage.read(f"{folder}/zarr.json") != zarr_group(record):
            yield "zarr.json is not as kvstore writes it"
        projections, rest = divmod(len(read_probe(self.storage, record)), values * 4 or 1)
        if rest:
            yield "its probe has not the size that its layout says"
        shape = [record.layout.layers, 2, len(record.probe_ids), projections]
        if self.storage.read(f"{folder}/probe/zarr.json") != probe_metadata(shape):
            yield "probe/zarr.json is not as kvstore writes it"

    def pack(self, name: str, pool: ThreadPoolExecutor) -> None:
        where = f"{PACKS}/{name}"
        try:
            pack = Pack(self.storage, name)
        except KvstoreError as error:
            if self.storage.exists(where):  # else collected meanwhile
                self._note(where, [error.message])
            return
        self.report.packs += 1
        for file, problem in file_problems(pack):
            self._note(f"{where}/{file}", [problem])
        self._note(where, self._pack_problems(pack))
        try:
            slices = [range(i, min(i + SLICE, len(pack.rows))) for i in range(0, len(pack.rows), SLICE)]
        except KvstoreError:
            return  # noted with its file
        found = [p for problems in pool.map(lambda rows: self._segments(pack, rows), slices) for p in problems]
        self._note(where, dict.fromkeys(found))  # a missing file is the same problem for every segment
        self._count(pack)
        self.progress(self.report, where)

    def _pack_problems(self, pack: Pack) -> Iterator[str]:
        model = self.models.get(pack.manifest.model)
        if model is None:
            yield f"its model {pack.manifest.model[:12]} has no intact record"
        elif model.layout != pack.layout:
            yield "its layout is not that of its model"
        yield from pack_findings(pack, self.known)

    def _segments(self, pack: Pack, rows: range) -> list[str]:
        """Run in several threads: reading, hashing and checksums let go of the interpreter's lock."""
        model = self.models.get(pack.manifest.model)
        found: list[str] = []
        anchors = {t.anchor.ids for t in self.templates.values()}
        for segment in map(pack.segment, rows):
            found += segment_problems(pack, segment)
            if model is not None and (problem := key_problem(pack, segment, model, anchors)) is not None:
                found.append(problem)
        return found

    def _count(self, pack: Pack) -> None:
        self.report.segments += len(pack.rows)
        self.report.bytes += int(sum(pack.rows[f"{a}.nbytes"].sum() for a in pack.arrays))
        keys = (k.tobytes().hex() for k in pack.rows["key"])
        self.stored |= {(pack.manifest.encoding_id, k): int(t) for k, t in zip(keys, pack.rows["tokens"], strict=True)}
        after = pack.rows[pack.rows["context"] == CONTEXT_KINDS.index("parent")]
        self.parents |= {(pack.manifest.encoding_id, r["key"].tobytes().hex()): r["parent"].tobytes().hex() for r in after}

    def snapshots(self) -> None:
        """The chain, and that what the newest and the tagged ones name is stored."""
        log = SnapshotLog(self.storage)
        self._note_foreign(log)
        tags = self._tags(log)
        rows: Rows | None = None
        for number in log.numbers():
            try:
                snapshot = log.read(number)
                self._note(file_name(number), self._chain_problems(log, snapshot))
            except KvstoreError as error:
                self._note(file_name(number), [error.message])
                rows = None
                continue
            rows = apply(rows or {}, snapshot) if snapshot.full or rows is not None else None
            current = number == log.newest() or number in tags
            self._rows(file_name(number), snapshot.rows if rows is None or not current else rows.values(), current)
            self.report.snapshots += 1

    def quality(self) -> None:
        """Reports: loads go by what they say."""
        self.report.problems += [Problem(*f) for f in report_findings(self.storage)]

    def _note_foreign(self, log: SnapshotLog) -> None:
        known = {file_name(n) for n in log.numbers()}
        foreign = (f"{SNAPSHOTS}/{n}" for n in self.storage.names(SNAPSHOTS))
        self.report.problems += [Problem(n, "is not a snapshot", "notice") for n in foreign if n not in known]

    def _tags(self, log: SnapshotLog) -> set[int]:
        try:
            tags = list_tags(self.storage)
        except KvstoreError as error:
            self._note(TAGS, [error.message])
            return set()
        self._note(TAGS, [f"{name} names snapshot {n}, which is not there" for name, n in tags.items() if n not in log.numbers()])
        return set(tags.values())

    def _chain_problems(self, log: SnapshotLog, snapshot: Snapshot) -> Iterator[str]:
        if snapshot.parent is None or not self.storage.exists(file_name(snapshot.parent)):
            if not snapshot.full:
                yield f"is written against snapshot {snapshot.parent}, which is not there"
            return
        try:
            if log.read(snapshot.parent).digest != snapshot.parent_digest:
                yield f"was not written against this snapshot {snapshot.parent}"
        except KvstoreError:
            yield f"is written against snapshot {snapshot.parent}, which is damaged"

    def _rows(self, where: str, rows: Iterable[Row], current: bool) -> None:
        """Missing artifacts are an error in the newest and in tagged snapshots: gc takes those of the others."""
        lacking = [(row, p) for row in rows if (p := self._row_problem(row)) is not None]
        if current:
            self._note(where, [f"{row.source}: {problem}" for row, problem in lacking])
        elif lacking:
            self.report.problems.append(Problem(where, f"{len(lacking)} of its documents can no longer be loaded", "notice"))

    def _row_problem(self, row: Row) -> str | None:
        if row.template not in self.templates:
            return f"template {row.template[:12]} is missing"
        for key in sorted(row.segment_keys()):
            if (row.encoding, key) not in self.stored:
                return f"missing artifact: segment {key[:12]} in encoding {row.encoding[:12]}"
        found = [(p.tokens, self.stored[row.encoding, k]) for p in row.passages for k in (p.prefix, p.isolated) if k is not None]
        if any(c.passage >= len(row.passages) for c in row.chained):
            return "a chain of a passage that it does not have"
        found += [(row.passages[c.passage].tokens, self.stored[row.encoding, c.key]) for c in row.chained]
        if (wrong := next((c for c in row.chained if self.parents.get((row.encoding, c.key)) != c.parent), None)) is not None:
            return f"segment {wrong.key[:12]} does not stand after segment {wrong.parent[:12]}"
        return next((f"a passage of {ours} tokens is stored with {theirs}" for ours, theirs in found if ours != theirs), None)
