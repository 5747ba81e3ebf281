"""Compile a corpus: read, plan, prefill what is missing, encode, pack, commit."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvstore import documents as reading
from kvstore.calibration.learn import Choices
from kvstore.calibration.record import Calibration, Metric
from kvstore.calibrator import Calibrating, Corpus, current_for, unlearned
from kvstore.certify import DOCUMENTS, Certifier, CertifyRule
from kvstore.codecs import CALIBRATED
from kvstore.documents import Document, Skipped
from kvstore.encode import Encoder, bits_of, make_encoding
from kvstore.errors import InputError
from kvstore.manifest import Encoding, Row
from kvstore.models import ModelSource
from kvstore.pack_writer import PackWriter
from kvstore.parts import policy_params
from kvstore.passages import LongRule
from kvstore.plan import Planned, Planner, RegimeChoice, Rules, Task, gone, superseded, template_in
from kvstore.policies import Policy
from kvstore.policies import parse as parse_policy
from kvstore.prefill import Prefiller
from kvstore.provenance import provenance
from kvstore.records import add_template, create
from kvstore.snapshot import Change
from kvstore.store import Store
from kvstore.template import Renderer
from kvstore.tokens import TextEncoder
from kvstore.viewing import Assign, Assigner, nobody


@dataclass(frozen=True)
class Limits:
    """When a pack closes: what a kill may cost is at most one open pack."""

    nbytes: int = 256 << 20
    segments: int = 4096
    seconds: float = 60.0


@dataclass
class BuildReport:
    """What a build did. Seconds are wall clock; `nbytes` is what the new artifacts' units take, by tier. `calibration`: digest of the one used.

    `quality`: by lossy tier the figures of this build's quality report. `poor_fit`: sampled documents that lose far more than is usual.
    """

    store: str
    snapshot: int = 0
    documents: int = 0
    compiled: int = 0
    unchanged: int = 0
    removed: int = 0
    segments: int = 0
    tokens: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    packs: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calibrate", "prefill", "policy", "encode", "write", "certify", "total"), 0.0)
    )
    calibration: str = ""
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    poor_fit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    serves: str = ""
    interrupted: bool = False


Progress = Callable[[BuildReport, str], None]


def build(
    documents: Any,
    store: str | Path = "kv.zarr",
    model: Any = None,
    tokenizer: Any = None,
    *,
    template: str = "auto",
    system: str | None = None,
    regime: RegimeChoice = "prefix",
    passage_tokens: int | None = None,
    long: LongRule = "split",
    codec: str = "transform",
    policy: str = "uniform",
    lossless: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    include: Sequence[str] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    reserve: int | None = None,
    certify: CertifyRule = "sample",
    certify_documents: int = DOCUMENTS,
    recalibrate: bool = False,
    metric: Metric = "fisher",
    tiers: int = 3,
    target_kl: float | None = None,
    target_ratio: float | None = None,
    progress: Progress | None = None,
    limits: Limits = Limits(),
) -> BuildReport:
    """Compile `documents` into `store` and commit a snapshot; what is stored already is not computed again.

    `documents`: paths of folders and files, or any iterable of Document, dict, str or retriever objects. `model`: a path, a hub id or a loaded
    model with its `tokenizer`; None is the bundled model. `certify`: what each lossy tier loses is measured on a sample of `certify_documents` new
    documents, on `all`, or on `none`; documents that the codec was calibrated on are left out. `progress` is called with the report so far and
    the source at hand. The codec `transform` learns from the documents where the store has no calibration for the model, or anew with
    `recalibrate`: by `metric`, in `tiers`, so that the finest tier loses `target_kl` nats a token (4e-4 by default) or is `target_ratio` times
    smaller than 16 bits.
    `policy`: which tokens get finer or coarser steps, or are dropped, such as `h2o` or `kvzip:budget=30,rest=drop` (kvstore.policies).
    Raises InputError for what cannot be read, IncompatibleError for a model whose cache kvstore cannot explain or whose identity clashes.
    """
    started = time.perf_counter()
    source = model if isinstance(model, ModelSource) else ModelSource(model, tokenizer, dtype=dtype, device=device)
    wanted = Choices(metric, tiers=tiers, target_kl=target_kl, target_ratio=target_ratio)
    wanted.check()
    chosen = parse_policy(policy)
    corpus = Corpus(documents, include, strict)
    with ExitStack() as scratch:
        job = _Job(_opened(store, dry_run, scratch), source, progress, limits, dry_run)
        job.report.store, job.roots = str(store), reading.roots_of(documents)
        room = source.context_tokens
        rules = Rules(regime, passage_tokens, long, room, reserve if reserve is not None else min(512, room // 4))
        job.policy = chosen
        job.prepare(template, system, codec, lossless, rules, lambda renderer: job.calibrated(renderer, corpus, wanted, recalibrate))
        job.certifier = Certifier(source.identity, job.planner.layout, job.encoding, "none" if dry_run else certify, certify_documents)
        job.run(corpus, strict)
    job.report.seconds["total"] = time.perf_counter() - started
    return job.report


def _opened(store: str | Path, dry_run: bool, scratch: ExitStack) -> Store:
    """The store, made where it is missing; a dry run makes it elsewhere, so that nothing appears."""
    if dry_run and not Path(store).exists():
        store = Path(scratch.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-dry-run-"))) / Path(store).name
    create(store)
    return Store(store)


class _Job:
    """One run of a build over one store."""

    def __init__(self, store: Store, source: ModelSource, progress: Progress | None, limits: Limits, dry_run: bool):
        self.store, self.source, self.limits, self.dry_run = store, source, limits, dry_run
        self.report = BuildReport(str(store.path))
        self.progress = progress or (lambda report, name: None)
        self.waiting: list[Row] = []
        self.roots: set[str] = set()
        self.certifier: Certifier
        self.policy: Policy = parse_policy("uniform")
        self._assign: Assign = nobody
        self._prefiller: Prefiller | None = None

    def prepare(
        self, template: str, system: str | None, codec: str, lossless: bool, rules: Rules, calibrated: Callable[[Renderer], Calibration | None]
    ) -> None:
        """Everything that must hold before the first document: template, layout, calibration, encoding."""
        encoder = TextEncoder(self.source.tokenizer)
        record = template_in(self.store, template, self.source.tokenizer, system, encoder)
        renderer, layout = Renderer(record, encoder), self.source.layout_in(self.store)
        self.encoding: Encoding = make_encoding(
            codec,
            layout,
            lossless=lossless,
            params=policy_params(self.policy, codec),
            calibration=calibrated(renderer) if codec in CALIBRATED else None,
        )
        self.planner = Planner(self.store, self.source.identity, layout, self.encoding, renderer, rules)
        if not self.dry_run:
            self.encoder = Encoder(self.encoding, layout)
        self.writer = self._new_writer()
        if not self.dry_run:
            add_template(self.store.storage, record)

    def calibrated(self, renderer: Renderer, corpus: Corpus, wanted: Choices, recalibrate: bool) -> Calibration:
        """The calibration to encode with: the current one, or one learnt now. A dry run learns none."""
        store, source = self.store, self.source
        found = None if recalibrate else current_for(store, source, wanted, publish=not self.dry_run)
        if found is None and self.dry_run:
            return unlearned(source.layout_in(store), wanted)
        if found is None:
            with self._timed("calibrate"):
                found = store.calibration(Calibrating(store, source, renderer, wanted, self._calibrating).run(corpus.again()).current)
        self.report.calibration = found.digest
        return found

    def _calibrating(self, stage: str, share: float) -> None:
        self.progress(self.report, f"calibrating: {stage} {share:.0%}")

    def _new_writer(self) -> PackWriter:
        planner = self.planner
        return PackWriter(self.store.storage, planner.model.key, planner.layout, self.encoding, provenance())

    def run(self, found: Iterable[Document | Skipped], strict: bool) -> None:
        """Plan and compile document by document, then commit what is left and what is gone."""
        seen: set[str] = set()
        try:
            for planned in self.planner.plan(found):
                seen.add(planned.row.source)
                self._take(planned)
        except KeyboardInterrupt:
            self.report.interrupted = True
        except BaseException:
            self.writer.abandon()
            raise
        self.report.skipped = self.planner.skipped
        if strict and self.planner.skipped:
            first = self.planner.skipped[0]
            self.writer.abandon()
            raise InputError(f"{first.source}: {first.reason}", remedy="mend it, or build without --strict", code="skipped")
        self._finish(seen)

    def _take(self, planned: Planned) -> None:
        for task in planned.tasks:
            self._compile(task)
        self.certifier.offer(planned)
        if planned.changed:
            self.waiting.append(planned.row)
        self.report.documents += 1  # counted when done: an interrupt may come before
        self.report.compiled += bool(planned.tasks)
        self.report.unchanged += not planned.changed
        self.progress(self.report, planned.row.source)
        if self._full():
            self._flush("build")

    def _compile(self, task: Task) -> None:
        self.report.segments += 1
        self.report.tokens += len(task.ids)
        if self.dry_run:
            return
        with self._timed("prefill"):
            values = self._running().run(task.ids, task.chain)
        with self._timed("policy"):
            assigned = self._assign(task.ids, task.chain)
        with self._timed("encode"):
            units = self.encoder.encode(bits_of(values), assigned)
        with self._timed("write"):
            self.writer.add(task.key, task.context, task.ids, units)
        for tier in self.encoding.tiers:
            size = sum(len(u) + 4 for group in units[tier.array] for u in group)
            self.report.nbytes[tier.name] = self.report.nbytes.get(tier.name, 0) + size

    def _running(self) -> Prefiller:
        """The live model, loaded and compared with the store's probe at the first need."""
        if self._prefiller is None:
            self.source.register(self.store, provenance())
            self._prefiller = Prefiller(self.source.model, self.planner.layout)
            if self.policy.name != "uniform":
                self._assign = Assigner(self.policy, self._prefiller, self.planner.renderer.encoder, self.source.context_tokens)
        return self._prefiller

    def _full(self) -> bool:
        writer, limits = self.writer, self.limits
        overdue = bool(writer.rows) and time.monotonic() - writer.started > limits.seconds
        return writer.nbytes >= limits.nbytes or len(writer.rows) >= limits.segments or overdue

    def _flush(self, note: str, removed: tuple[Any, ...] = ()) -> None:
        """Publish the open pack, then commit the rows that it completes: only now are they reported as stored."""
        if self.dry_run:
            return
        with self._timed("write"):
            rows, self.waiting = tuple(self.waiting), []  # forgotten if the pack that completes them is not published
            if (name := self.writer.close()) is not None:
                self.report.packs.append(name)
            self.report.snapshot = self.store.commit(Change(rows, removed), note)
        self.writer = self._new_writer()

    def _finish(self, seen: set[str]) -> None:
        planner = self.planner
        removed: tuple[Any, ...] = ()
        if not self.report.interrupted:
            mine = (planner.model.key, planner.renderer.record.id, self.encoding.id)
            unreadable = {s.source for s in planner.skipped if s.reason != "empty"}  # may be back tomorrow
            removed = gone(self.store, mine, self.roots, seen | unreadable)
            removed += superseded(self.store, mine, self.encoding, self.roots, seen, unreadable)
        if self.report.documents == 0 and not self.report.interrupted:
            raise InputError("no document to compile", remedy="name a folder or file with text, Markdown, JSONL or Parquet; `kvstore rm` removes")
        self.report.removed = len(removed)
        self._flush("build", removed)
        self.store.refresh()
        self._certify()
        self.report.serves = serves(planner)

    def _certify(self) -> None:
        """Measure what is stored by now; an interrupt costs the quality report alone."""
        report = self.report
        if self._prefiller is None or report.interrupted:
            return
        self.progress(report, "measuring quality")
        try:
            with self._timed("certify"):
                found = self.certifier.finish(self.store, self._prefiller, provenance(), self.encoder.pool, self._assign)
        except KeyboardInterrupt:
            report.interrupted = True
            report.notes.append("no quality report: interrupted")
            return
        report.poor_fit, report.notes = found.poor_fit, report.notes + found.notes
        report.quality = {t.tier: msgspec.structs.asdict(t) for t in found.report.tiers} if found.report is not None else {}

    def _timed(self, part: str) -> _Timer:
        return _Timer(self.report.seconds, part)


class _Timer:
    def __init__(self, into: dict[str, float], part: str):
        self.into, self.part = into, part

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.into[self.part] += time.perf_counter() - self.started


def serves(planner: Planner) -> str:
    """One line: what can be answered from what was built."""
    both = planner.contexts["prefix"] == planner.contexts["isolated"]
    if both or planner.rules.regime == "both":
        return "serves one document directly after the head exactly, several in any order approximately (reuse='blocks')"
    if planner.rules.regime == "isolated":
        return "serves several documents in any order approximately (reuse='blocks'); build with --regime both for exact single documents"
    return "serves one document after the system prompt, exactly; several in any order: build with --regime both"
