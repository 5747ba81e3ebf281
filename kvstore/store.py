"""The door to a store: documents, artifacts, models, templates, snapshots. Torch-free; safe to open on a read-only mount."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore.artifact import Artifact, Stored
from kvstore.calibration import registry, shelf
from kvstore.calibration.record import Calibration, CalibrationRecord
from kvstore.calibration.shelf import CALIBRATIONS
from kvstore.certificates import Certified, Known, merge, read_reports, report_names
from kvstore.errors import FormatError, InputError, IntegrityError, NotFoundError, StorageError
from kvstore.index import Index
from kvstore.manifest import (
    Encoding,
    Model,
    ModelRecord,
    Row,
    StoreRecord,
    TemplateRecord,
    Tier,
    parse_group,
)
from kvstore.prefixes import PrefixIndex
from kvstore.records import MODELS, TEMPLATES, read_model, read_probe, read_template
from kvstore.snapshot import Change, SnapshotLog
from kvstore.storage.local import LocalStorage

log = logging.getLogger("kvstore")


class Store:
    """A store, opened for reading. `refresh` sees what others committed meanwhile.

    Raises NotFoundError where there is no store, FormatError where there is something else.
    """

    def __init__(self, path: str | Path, *, cache: Path | None = None):
        self.path = Path(path)
        self.storage = LocalStorage(Path(os.path.abspath(path)))  # the process may change its folder
        self._require_store()
        self.record = parse_group(self.storage.read("zarr.json"), StoreRecord, str(self.path / "zarr.json"))
        registry.register(self.storage.path(CALIBRATIONS))  # packs name them by digest alone
        self._cache = cache
        self.snapshots = SnapshotLog(self.storage)
        self._prefixes: dict[tuple[str, str], PrefixIndex] = {}
        self._certified: dict[tuple[str, str], tuple[list[str], Certified]] = {}
        self.index.refresh()

    def _require_store(self) -> None:
        if not self.path.exists():
            raise NotFoundError(f"there is no store at {self.path}", remedy="`kvstore build PATH` makes one; --store names another place")
        if not self.storage.exists("zarr.json"):
            raise FormatError(f"{self.path} is not a kvstore store", remedy="name another folder with --store")

    @cached_property
    def index(self) -> Index:
        return Index(self.storage, self.record.id, self._cache)

    def refresh(self) -> None:
        self.index.refresh()

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def number(self) -> int:
        """The newest snapshot's number."""
        return self.index.number()

    def commit(self, change: Change, note: str) -> int:
        """A new snapshot, if `change` changes anything: its number. Every segment its rows name must be stored by now.

        Raises StorageError where one is not: it was thought to be stored, and was collected meanwhile.
        """
        return self.snapshots.commit(change, note, guard=lambda _: self._require_stored(change.rows))

    def _require_stored(self, rows: Sequence[Row]) -> None:
        self.index.refresh_packs()
        self._require_calibrations({r.encoding for r in rows})
        lacking = [r.source for r in rows if not all(self.index.has(k, r.encoding) for k in sorted(r.segment_keys()))]
        if lacking:
            raise StorageError(
                f"{len(lacking)} documents (first: {lacking[0]}) need segments that are not stored, or no longer",
                remedy="run the same command again: it does only what is missing",
                code="collected",
            )

    def _require_calibrations(self, encodings: set[str]) -> None:
        needed = {c.calibration for id, e in self.encodings().items() if id in encodings for c in e.codecs if c.calibration is not None}
        lacking = sorted(d for d in needed if not shelf.has(self.storage, d))
        if lacking:
            raise StorageError(f"calibration {lacking[0]} is not stored, or no longer", remedy="run the same command again", code="collected")

    # documents

    def rows(self, source: str | None = None, *, model: str | None = None, template: str | None = None, encoding: str | None = None) -> list[Row]:
        """Rows of the newest snapshot; `model`, `template` and `encoding` are keys or their beginnings."""
        wanted = {"model": model, "template": template, "encoding": encoding}
        source = None if source is None else normal(source)
        return [r for r in self.index.rows(source) if all(v is None or getattr(r, k).startswith(v) for k, v in wanted.items())]

    def row(self, source: str, **filters: str | None) -> Row:
        """The one row of a document. Raises NotFoundError, and InputError where several models, templates or encodings have it."""
        found = self.rows(source, **filters)
        if not found:
            raise NotFoundError(f"{source!r} is not in {self.path}", remedy="`kvstore ls` lists what is; `kvstore build` adds")
        if len(found) > 1:
            raise InputError(
                f"{source!r} is stored {len(found)} times: {'; '.join(describe(r) for r in found)}",
                remedy="say which with --model, --template or --encoding",
                code="ambiguous",
            )
        return found[0]

    def sources(self) -> list[str]:
        return sorted({r.source for r in self.index.rows()})

    def __len__(self) -> int:
        return len(self.sources())

    def __contains__(self, source: object) -> bool:
        if not isinstance(source, str):
            return False
        name, passage = self.resolve(source)
        return any(passage is None or passage < len(r.passages) for r in self.rows(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources())

    def __getitem__(self, source: str) -> Artifact:
        return self.artifact(source)

    def artifact(self, source: str, **filters: str | None) -> Artifact:
        """A document (`a.md`) or one passage of it (`a.md#3`) as stored."""
        name, passage = self.resolve(source)
        row = self.row(name, **filters)
        if passage is not None and passage >= len(row.passages):
            raise NotFoundError(f"{name!r} has {len(row.passages)} passages, there is no #{passage}", remedy="they count from 0")
        return Artifact(self, row, row.passages if passage is None else row.passages[passage : passage + 1])

    def resolve(self, source: str) -> tuple[str, int | None]:
        """`a.md#3` is passage 3 of a.md, unless a document has that very name."""
        source = normal(source)
        return (source, None) if self.index.rows(source) else split_source(source)

    def stored(self, key: str, encoding: str) -> Stored:
        """Raises NotFoundError."""
        pack, row = self.index.find(key, encoding)
        return Stored(pack, pack.segment(row))

    def prefixes(self, model: Model, encoding: str) -> PrefixIndex:
        """Look-ups by token ids in one model and encoding (its id). Raises NotFoundError where the store does not know the model."""
        key = (model.key, encoding)
        if key not in self._prefixes:
            self._prefixes[key] = PrefixIndex(self, model, encoding)
        return self._prefixes[key]

    # records

    def models(self) -> list[ModelRecord]:
        return [self.model_record(name) for name in self.storage.names(MODELS)]

    def model_record(self, key: str) -> ModelRecord:
        """Raises NotFoundError, IntegrityError."""
        return read_model(self.storage, key)

    def has_model(self, key: str) -> bool:
        return self.storage.exists(f"{MODELS}/{key}/zarr.json")

    def probe(self, key: str) -> npt.NDArray[np.float32]:
        """float32 [layers, 2, tokens, projections]: what the probe's K and V were when the model was first seen."""
        record = self.model_record(key)
        data = read_probe(self.storage, record)
        return np.frombuffer(data, "<f4").reshape(record.layout.layers, 2, len(record.probe_ids), -1)

    def template(self, id: str) -> TemplateRecord:
        """Raises NotFoundError, IntegrityError."""
        return read_template(self.storage, id)

    def templates(self) -> list[TemplateRecord]:
        return [self.template(name[:-5]) for name in self.storage.names(TEMPLATES)]

    def calibrations(self) -> dict[str, CalibrationRecord]:
        """The records of all calibrations, by digest. Raises IntegrityError, FormatError."""
        return {digest: shelf.record_of(self.storage, digest) for digest in shelf.list_calibrations(self.storage)}

    def calibration(self, digest: str) -> Calibration:
        """One calibration; verified when this process loads it first. Raises NotFoundError, IntegrityError, FormatError."""
        if not shelf.has(self.storage, digest):
            raise NotFoundError(f"calibration {digest} is not in {self.path}", remedy="`kvstore stats` lists those that are")
        return registry.find(digest)

    def current_calibration(self, model: str) -> str | None:
        """Digest of the calibration that new builds of a model (its key) use; None where there is none, or it is gone."""
        digest = shelf.current(self.storage, model)
        return digest if digest is not None and shelf.has(self.storage, digest) else None

    def encodings(self) -> dict[str, Encoding]:
        """Every encoding that some pack holds, by id."""
        return {p.manifest.encoding_id: p.encoding for p in map(self.index.pack, self.index.one_of_each())}

    # quality

    def quality(self, encoding: str, model: str) -> Certified:
        """What builds measured of an encoding's (id) tiers with a model (key). Raises FormatError, IntegrityError where a report is damaged."""
        names, key = report_names(self.storage, encoding), (encoding, model)
        if key not in self._certified or self._certified[key][0] != names:
            self._certified[key] = (names, merge([r for r in read_reports(self.storage, encoding) if r.model == model]))
        return self._certified[key][1]

    def known(self, stored: Stored, tier: Tier) -> Known:
        """The KL of an artifact at a tier, as far as it is known: to be shown. A damaged report is warned of and counts as none."""
        try:
            return self.quality(stored.pack.manifest.encoding_id, stored.pack.manifest.model).known(stored.id, tier)
        except (FormatError, IntegrityError) as error:
            log.warning("%s", error)
            return Certified().known(stored.id, tier)


def split_source(source: str) -> tuple[str, int | None]:
    """`a.md#3` -> (`a.md`, 3); other names stay whole."""
    name, mark, number = source.rpartition("#")
    return (name, int(number)) if mark and number.isascii() and number.isdecimal() else (source, None)


def normal(source: str) -> str:
    """A source as it is stored: NFC. Raises InputError for what is no Unicode text."""
    if any("\ud800" <= c <= "\udfff" for c in source):
        raise InputError(f"{source!r} is not Unicode text", remedy="decode the name with the right encoding")
    return unicodedata.normalize("NFC", source)


def describe(row: Row) -> str:
    return f"model {row.model[:12]} template {row.template[:12]} encoding {row.encoding[:12]}"
