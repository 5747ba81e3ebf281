"""Calibrate a store: learn from its corpus what the transform codec needs, publish it, make it current for new builds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvstore import bundled
from kvstore import documents as reading
from kvstore.calibration import files, shelf
from kvstore.calibration.learn import Choices, Learned, Learner
from kvstore.calibration.live import Live
from kvstore.calibration.record import CLASSES, Calibration, CalibrationRecord, Metric
from kvstore.calibration.sample import SEQUENCE_TOKENS, pooled
from kvstore.calibration.statistics import default_group_layers
from kvstore.documents import Document, Skipped
from kvstore.errors import InputError
from kvstore.manifest import FORMAT, Layout
from kvstore.models import ModelSource
from kvstore.plan import template_in
from kvstore.provenance import provenance
from kvstore.records import create
from kvstore.store import Store
from kvstore.template import Renderer
from kvstore.tokens import TextEncoder

Progress = Callable[[str, float], None]
NOBODY = "0" * 64
log = logging.getLogger("kvstore")


@dataclass
class CalibrationReport:
    """What was learnt. `bits`: ideal bits a stored value of the tiers up to each, base first; `kl`: nats a token of each tier, on held-out text
    of the sample; `tokens` learnt from, `sampled` of the sample written by the model; `current`: digest of the calibration that new builds use,
    another one where somebody was faster. Seconds are wall clock."""

    store: str
    digest: str = ""
    current: str = ""
    model: str = ""
    metric: str = ""
    documents: int = 0
    tokens: int = 0
    sampled: int = 0
    exempt: float = 0.0
    group_layers: int = 0
    ranks: list[int] = field(default_factory=list)
    step: float = 0.0
    kl: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def calibrate(
    documents: Any,
    store: str | Path = "kv.zarr",
    model: Any = None,
    tokenizer: Any = None,
    *,
    metric: Metric = "fisher",
    tokens: int | None = None,
    tiers: int = 3,
    target_kl: float | None = None,
    target_ratio: float | None = None,
    group_layers: int | None = None,
    seed: int = 0,
    template: str = "auto",
    system: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    include: Sequence[str] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Learn a calibration from a sample of `documents` (as `kvstore.build` takes them) and make it the model's current one in `store`.

    `metric`: `fisher` (forward and backward passes), `attention` (forward only) or `identity`. `tokens`: learnt from; None means 16 per dimension
    of a group and 32,768 at least. The finest tier is to lose `target_kl` nats a token (4e-4 by default) or to be `target_ratio` times smaller
    than 16 bits. `group_layers`: layers coded together. The same corpus, model and seed give the same calibration on one machine.
    Raises InputError for choices that make no sense, IncompatibleError for a model whose cache kvstore cannot explain, ResourceError.
    """
    choices = Choices(metric, tokens, tiers, target_kl, target_ratio, group_layers, seed)
    choices.check()
    source = model if isinstance(model, ModelSource) else ModelSource(model, tokenizer, dtype=dtype, device=device)
    found = reading.read(documents, include=include, strict=strict)
    create(store)
    opened, encoder = Store(store), TextEncoder(source.tokenizer)
    renderer = Renderer(template_in(opened, template, source.tokenizer, system, encoder), encoder)
    return Calibrating(opened, source, renderer, choices, progress).run(found)


@dataclass
class Calibrating:
    """One calibration of one store and model."""

    store: Store
    source: ModelSource
    renderer: Renderer
    choices: Choices
    progress: Progress | None = None

    def run(self, found: Iterable[Document | Skipped]) -> CalibrationReport:
        """Learn, publish, make current."""
        started, storage, key = time.perf_counter(), self.store.storage, self.source.identity.key
        before = shelf.current(storage, key)
        self.source.register(self.store, provenance())
        learned = self._learned(found)
        digest = shelf.publish(storage, learned.calibration)
        current = shelf.set_current(storage, key, digest, replacing=before)
        report = self._report(learned, digest, current)
        report.seconds["total"] = time.perf_counter() - started
        return report

    def _learned(self, found: Iterable[Document | Skipped]) -> Learned:
        source, layout = self.source, self.source.layout_in(self.store)
        learner = Learner(Live(source.model, layout), source.identity.key, self.choices, provenance(), self.progress)
        pool = pooled(found, self.choices.seed, learner.tokens)
        if not pool.documents:
            raise InputError("no document to calibrate on", remedy="name a folder or file with text, Markdown, JSONL or Parquet")
        return learner.learn(pool, self.renderer, min(SEQUENCE_TOKENS, source.context_tokens))

    def _report(self, learned: Learned, digest: str, current: str) -> CalibrationReport:
        record = shelf.record_of(self.store.storage, digest)
        nbytes = sum(f.bytes for f in record.files.values())
        return CalibrationReport(
            str(self.store.path), digest, current, record.model, record.metric, learned.documents, record.tokens, learned.sampled, learned.exempt,
            record.group_layers, list(record.ranks), record.step, list(record.kl), list(learned.bits), nbytes, dict(learned.seconds),
        )  # fmt: skip


class Corpus:
    """Documents as `kvstore.build` takes them, read lazily, and a second time where a calibration needs a sample first.

    Paths and lists are read again; what comes only once is kept in memory then.
    """

    def __init__(self, documents: Any, include: Sequence[str] | None, strict: bool):
        self.documents, self.include, self.strict = documents, include, strict
        self._found: Iterable[Document | Skipped] = self._read()

    def _read(self) -> Iterator[Document | Skipped]:
        return reading.read(self.documents, include=self.include, strict=self.strict)

    def __iter__(self) -> Iterator[Document | Skipped]:
        return iter(self._found)

    def again(self) -> Iterator[Document | Skipped]:
        """All of them, leaving them to be iterated over once more."""
        if not isinstance(self.documents, Iterator):
            return self._read()
        self._found = list(self._found)
        return iter(self._found)


def current_for(store: Store, source: ModelSource, wanted: Choices, *, publish: bool = True) -> Calibration | None:
    """The calibration that a build uses without making one: the store's current one, else the one that comes with the bundled model.

    None where there is none, or where the bundled one is not what is `wanted`. With `publish` False nothing is written.
    """
    key = source.identity.key
    digest = store.current_calibration(key)
    if digest is not None:
        _warn_of_others(shelf.record_of(store.storage, digest), wanted)
        return store.calibration(digest)
    shipped = _shipped(source) if wanted == Choices() else None
    if shipped is None or not publish:
        return shipped
    before = shelf.current(store.storage, key)
    return store.calibration(shelf.set_current(store.storage, key, shelf.publish(store.storage, shipped), replacing=before))


def unlearned(layout: Layout, wanted: Choices) -> Calibration:
    """What a dry run plans with where there is no calibration: the groups and tiers that learning one would have, and a digest of none."""
    size = min(layout.layers, wanted.group_layers or default_group_layers(layout.layers, layout.channels))
    groups = -(-layout.layers // size)
    record = CalibrationRecord(
        FORMAT, "calibration", NOBODY, layout.layers, layout.kv_heads, layout.head_dim, wanted.metric, size, wanted.tiers, 1.0, 0,
        (0.0,) * wanted.tiers, 1.0, (1.0,) * groups, (1,) * groups, 1, wanted.seed, (), (), {}, {},
    )  # fmt: skip
    return Calibration(NOBODY, record, (), (), np.zeros((CLASSES, 128), np.uint16), np.zeros((CLASSES, 3), np.uint16))


def _warn_of_others(record: CalibrationRecord, wanted: Choices) -> None:
    """Choices that differ from what the current calibration was made with: they would be ignored in silence."""
    usual = Choices()
    differs = [n for n in ("metric", "tiers", "group_layers", "seed") if (w := getattr(wanted, n)) != getattr(usual, n) and w != getattr(record, n)]
    missed = wanted.target_kl is not None and record.kl and not 0.67 < record.kl[-1] / wanted.target_kl < 1.5
    if differs or missed:
        log.warning("the store's calibration was made with another %s and is used as it is; recalibrate to change that",
                    " and ".join([*differs, *(["target KL"] if missed else [])]))  # fmt: skip


def _shipped(source: ModelSource) -> Calibration | None:
    """The calibration that comes with the bundled model, where that is the model at hand."""
    folders = [f.parent for f in sorted(bundled.calibrations_path().glob("*/zarr.json"))]
    mine = next((f for f in folders if files.read_record(f, f.name).model == source.identity.key), None)
    return None if mine is None else files.read(mine, mine.name)
