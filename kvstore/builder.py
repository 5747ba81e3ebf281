"""Compile a corpus: read, plan, prefill what is missing, encode, pack, commit."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore import __version__
from kvstore import documents as reading
from kvstore.documents import Document, Skipped
from kvstore.encode import Encoder, bits_of, make_encoding
from kvstore.errors import InputError
from kvstore.manifest import Encoding, Row, TemplateRecord
from kvstore.models import ModelSource
from kvstore.pack_writer import PackWriter
from kvstore.passages import LongRule
from kvstore.plan import Planned, Planner, RegimeChoice, Rules, Task, gone
from kvstore.prefill import Prefiller
from kvstore.snapshot import Change
from kvstore.store import Store, add_template, create
from kvstore.template import Renderer, make_template, template_source
from kvstore.tokens import TextEncoder


@dataclass(frozen=True)
class Limits:
    """When a pack closes: what a kill may cost is at most one open pack."""

    nbytes: int = 256 << 20
    segments: int = 4096
    seconds: float = 60.0


@dataclass
class BuildReport:
    """What a build did. Seconds are wall clock; `nbytes` is what the new artifacts' units take, by tier."""

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
    seconds: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "encode": 0.0, "write": 0.0, "total": 0.0})
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
    codec: str = "scalar",
    lossless: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    include: Sequence[str] | None = None,
    strict: bool = False,
    dry_run: bool = False,
    reserve: int | None = None,
    progress: Progress | None = None,
    limits: Limits = Limits(),
) -> BuildReport:
    """Compile `documents` into `store` and commit a snapshot; what is stored already is not computed again.

    `documents`: paths of folders and files, or any iterable of Document, dict, str or retriever objects. `model`: a path, a hub id or a loaded
    model with its `tokenizer`; None is the bundled model. `progress` is called with the report so far and the source at hand.
    Raises InputError for what cannot be read, IncompatibleError for a model whose cache kvstore cannot explain or whose identity clashes.
    """
    started = time.perf_counter()
    source = model if isinstance(model, ModelSource) else ModelSource(model, tokenizer, dtype=dtype, device=device)
    found = reading.read(documents, include=include, strict=strict)
    with ExitStack() as scratch:
        job = _Job(_opened(store, dry_run, scratch), source, progress, limits, dry_run)
        job.report.store, job.roots = str(store), reading.roots_of(documents)
        room = source.context_tokens
        rules = Rules(regime, passage_tokens, long, room, reserve if reserve is not None else min(512, room // 4))
        job.prepare(template, system, codec, lossless, rules)
        job.run(found, strict)
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
        self._prefiller: Prefiller | None = None

    def prepare(self, template: str, system: str | None, codec: str, lossless: bool, rules: Rules) -> None:
        """Everything that must hold before the first document: template, layout, encoding."""
        encoder = TextEncoder(self.source.tokenizer)
        record = self._template(template, system, encoder)
        layout = self.source.layout_in(self.store)
        self.encoding: Encoding = make_encoding(codec, layout, lossless=lossless)
        self.planner = Planner(self.store, self.source.identity, layout, self.encoding, Renderer(record, encoder), rules)
        self.encoder = Encoder(self.encoding, layout)
        self.writer = self._new_writer()
        if not self.dry_run:
            add_template(self.store.storage, record)

    def _template(self, kind: str, system: str | None, encoder: TextEncoder) -> TemplateRecord:
        """The record that an earlier build froze from the same template and tokenizer (one that prints the date stays as it was), or a new one."""
        tokenizer, source = self.source.tokenizer, template_source(kind, self.source.tokenizer, system)
        frozen = [t for t in self.store.templates() if (t.source, t.tokenizer) == (source, encoder.digest)]
        return frozen[0] if frozen else make_template(kind, tokenizer, system, encoder=encoder)

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
        with self._timed("encode"):
            units = self.encoder.encode(bits_of(values))
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
        if self.report.documents == 0 and not self.report.interrupted:
            raise InputError("no document to compile", remedy="name a folder or file with text, Markdown, JSONL or Parquet; `kvstore rm` removes")
        self.report.removed = len(removed)
        self._flush("build", removed)
        self.store.refresh()
        self.report.serves = serves(planner)

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


def provenance() -> dict[str, str]:
    """What made an artifact: never part of its identity."""
    import torch
    import transformers

    return {
        "kvstore": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
