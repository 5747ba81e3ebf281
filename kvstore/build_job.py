"""One run of a build over one store: from planned documents to packs, chains, a snapshot and a quality report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from kvstore.build_report import BuildReport, Limits, Progress, Timer
from kvstore.calibration.learn import Choices
from kvstore.calibration.record import Calibration
from kvstore.calibrator import Calibrating, Corpus, current_for, unlearned
from kvstore.certify import Certifier
from kvstore.chain_log import Request
from kvstore.chain_plan import ChainPlan, ChainReport, Link, rows_after
from kvstore.codecs import CALIBRATED
from kvstore.compiling import BATCH_TOKENS, BatchLine, Compiled, Compiler, Line
from kvstore.documents import Document, Skipped
from kvstore.encode import Encoder, make_encoding
from kvstore.errors import InputError
from kvstore.families.batch import batchable
from kvstore.families.states import require_no_state
from kvstore.manifest import Encoding, Layout, Row
from kvstore.models import ModelSource
from kvstore.pack_writer import PackWriter
from kvstore.parts import policy_params
from kvstore.plan import Planned, Planner, Rules, Task, gone, superseded, template_in
from kvstore.policies import Policy
from kvstore.policies import parse as parse_policy
from kvstore.prefill import Prefiller
from kvstore.provenance import provenance
from kvstore.records import add_template
from kvstore.snapshot import Change, RowId
from kvstore.store import Store
from kvstore.template import Renderer
from kvstore.tokens import TextEncoder
from kvstore.viewing import Assign, Assigner, nobody
from kvstore.wording import count


class Job:
    """One run of a build over one store."""

    def __init__(self, store: Store, source: ModelSource, progress: Progress | None, limits: Limits, dry_run: bool):
        self.store, self.source, self.limits, self.dry_run = store, source, limits, dry_run
        self.report = BuildReport(str(store.path))
        self.progress = progress or (lambda report, name: None)
        self.waiting: list[Row] = []
        self.chains: tuple[list[Request], int | None] | None = None
        self.roots: set[str] = set()
        self.certifier: Certifier
        self.policy: Policy = parse_policy("uniform")
        self._assign: Assign = nobody
        self._prefiller: Prefiller | None = None
        self._line: Line | None = None
        self.batch_tokens: int | None = None

    def prepare(
        self, template: str, system: str | None, codec: str, lossless: bool, rules: Rules, calibrated: Callable[[Renderer], Calibration | None]
    ) -> None:
        """Everything that must hold before the first document: template, layout, calibration, encoding."""
        encoder = TextEncoder(self.source.tokenizer)
        record = template_in(self.store, template, self.source.tokenizer, system, encoder)
        renderer, layout = Renderer(record, encoder), self.source.layout_in(self.store)
        self._require_exact(layout, rules)
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

    def _require_exact(self, layout: Layout, rules: Rules) -> None:
        """Raises IncompatibleError for what a model with a recurrent state cannot have: only what stood before a segment may stand there again."""
        if rules.regime != "prefix":
            require_no_state(layout, f"the regime {rules.regime}", "build with --regime prefix")
        if self.policy.drops:
            require_no_state(
                layout, f"the policy {self.policy.name} with dropped tokens", "build without --policy, or with one that keeps all tokens"
            )

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
            if self._line is not None:
                self._line.end()
        except KeyboardInterrupt:
            self.report.interrupted = True
        except BaseException:
            self.writer.abandon()
            raise
        finally:
            if self._line is not None:
                self._line.close()
        self.report.skipped = self.planner.skipped
        if strict and self.planner.skipped:
            first = self.planner.skipped[0]
            self.writer.abandon()
            raise InputError(f"{first.source}: {first.reason}", remedy="mend it, or build without --strict", code="skipped")
        self._finish(seen)

    def _take(self, planned: Planned) -> None:
        """What needs no model while none was needed before it is done at once; the rest in its turn."""
        if self.dry_run:
            for task in planned.tasks:
                self._count(task)
        if self.dry_run or (self._line is None and not planned.tasks):
            self._finished(planned)
        else:
            self._in_line().put(planned)

    def _finished(self, planned: Planned) -> None:
        self.certifier.offer(planned)
        if planned.changed:
            self.waiting.append(planned.row)
        self.report.documents += 1  # counted when done: an interrupt may come before
        self.report.compiled += bool(planned.tasks)
        self.report.unchanged += not planned.changed
        self.progress(self.report, planned.row.source)
        if self._full():
            self._flush("build")

    def _count(self, task: Task) -> None:
        self.report.segments += 1
        self.report.tokens += len(task.ids)

    def _write(self, task: Task, found: Compiled) -> None:
        self._count(task)
        with self._timed("write"):
            ranges = self.writer.add(task.key, task.context, task.ids, found.units, state=found.state)
        names = {t.array: t.name for t in self.encoding.tiers}
        for array, (_, size, _) in ranges.items():
            name = names.get(array, array)
            self.report.nbytes[name] = self.report.nbytes.get(name, 0) + size

    def _compiler(self) -> Compiler:
        return Compiler(self._running(), self.encoder, self._assign, self._timed)

    def _in_line(self) -> Line:
        """The line that documents stand in: in batches where the model lies on a GPU, or where that was asked for."""
        if self._line is None:
            with self._timed("prefill"):
                prefiller = self._running()
            on_cpu = prefiller.model.device.type == "cpu"
            tokens = self.batch_tokens if self.batch_tokens is not None else 0 if on_cpu else BATCH_TOKENS
            if tokens and batchable(prefiller.layout):
                self.report.notes.append(f"prefilled in batches of up to {tokens:,} tokens: K and V equal a live prefix up to rounding")
                self._line = BatchLine(self._compiler(), self._write, self._finished, tokens, background=not on_cpu)
            else:
                self._line = Line(self._compiler(), self._write, self._finished)
        return self._line

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
        self.store.refresh()
        rows, shorter = rows_after(planner, self.waiting, removed)
        self.waiting = [r for r in self.waiting if r.id not in shorter] + list(shorter.values())
        if self.chains is None and any(planner.prior[i].chained for i in removed if i[3] != self.encoding.id):
            self.report.notes.append("chains of the earlier calibration are gone: build with the query log again")
        self._flush("build", removed)
        self.store.refresh()
        chained = self._compile_chains(rows)
        self._certify()
        self.report.serves = serves(planner) + (f"; and {count(chained, 'passage')} in chains, after those before them, exactly" if chained else "")

    def _compile_chains(self, rows: dict[RowId, Row]) -> int:
        """Chains of the query log, after their parents' live KV; an interrupt keeps those that are done. How many passages are chained now."""
        if self.chains is None or self.report.interrupted:
            return sum(len(r.chained) for r in rows.values())
        plan = ChainPlan(self.planner, rows, *self.chains)
        self.report.chains = plan.report
        if self.dry_run:
            return plan.report.segments
        done: list[Link] = []
        try:
            for link in plan.links():
                self._compile_link(link, plan.report)
                done.append(link)
        except KeyboardInterrupt:
            self.report.interrupted = True
        except BaseException:
            self.writer.abandon()
            raise
        self._flush("chains")
        self.waiting = plan.changed(done)
        self._flush("chains")
        self.store.refresh()
        return len(done)

    def _compile_link(self, link: Link, report: ChainReport) -> None:
        for fresh in self.planner.missing([link.task]):
            self._write(fresh, self._compiler().one(fresh))
            report.compiled += 1
            self.progress(self.report, f"chain of {link.place[0]}")
        if self._full():
            self._flush("chains")

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

    def _timed(self, part: str) -> Timer:
        return Timer(self.report.seconds, part)


def serves(planner: Planner) -> str:
    """One line: what can be answered from what was built."""
    if planner.layout.state:
        return "serves one document directly after the head, or a stored chain, exactly; nothing else, for the model keeps a recurrent state"
    both = planner.contexts["prefix"] == planner.contexts["isolated"]
    if both or planner.rules.regime == "both":
        return "serves one document directly after the head exactly, several in any order approximately (reuse='blocks')"
    if planner.rules.regime == "isolated":
        return "serves several documents in any order approximately (reuse='blocks'); build with --regime both for exact single documents"
    return "serves one document after the system prompt, exactly; several in any order: build with --regime both"
