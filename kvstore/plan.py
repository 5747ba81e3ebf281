"""What a build has to do: documents to rows, and the segments that are not stored yet."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from kvstore.documents import Document, Skipped, text_digest
from kvstore.errors import InputError
from kvstore.identity import Context, segment_key
from kvstore.manifest import Chained, CodecSpec, Encoding, Layout, Model, Passage, Regime, Row, TemplateRecord
from kvstore.passages import LongRule, plan_document
from kvstore.prefill import Chain
from kvstore.snapshot import RowId
from kvstore.store import Store
from kvstore.template import Renderer, make_template, template_source
from kvstore.tokens import TextEncoder

RegimeChoice = Literal["prefix", "isolated", "both"]
REGIMES: dict[str, tuple[Regime, ...]] = {"prefix": ("prefix",), "isolated": ("isolated",), "both": ("prefix", "isolated")}


@dataclass(frozen=True)
class Task:
    """A segment to prefill after `chain` and store under `key`. `followed`: more will be prefilled after it, its cache is worth keeping."""

    key: str
    context: Context
    chain: Chain
    ids: tuple[int, ...]
    followed: bool = False


@dataclass(frozen=True)
class Planned:
    """One document: its row for the snapshot, and the tasks that must be done before the row is true."""

    row: Row
    tasks: tuple[Task, ...]
    changed: bool


@dataclass
class Rules:
    """How documents are cut and in which contexts they are compiled."""

    regime: RegimeChoice = "prefix"
    passage_tokens: int | None = None
    long: LongRule = "split"
    context_tokens: int = 4096
    reserve: int = 512

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise InputError(f"unknown regime {self.regime!r}", remedy=f"choose one of {', '.join(REGIMES)}")
        if self.long not in ("split", "skip", "error"):
            raise InputError(f"unknown rule {self.long!r} for long documents", remedy="choose split, skip or error")
        if self.reserve < 0:
            raise InputError(f"a reserve of {self.reserve} tokens", remedy="give 0 or more")
        if self.passage_tokens is not None and self.passage_tokens < 16:
            raise InputError(f"passages of {self.passage_tokens} tokens are too short", remedy="give --passage-tokens 16 or more")

    @property
    def recipe(self) -> str:
        """Enters the row, so that another way of cutting is noticed."""
        return f"passages={self.passage_tokens or 0} long={self.long} room={self.context_tokens - self.reserve}"


@dataclass
class Planner:
    """Plans one document after another for one model, template and encoding."""

    store: Store
    model: Model
    layout: Layout
    encoding: Encoding
    renderer: Renderer
    rules: Rules
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prior: dict[RowId, Row] = {r.id: r for r in self.store.rows()}
        recalibrated = older_encodings(self.store, self.encoding)
        mine = (self.model.key, self.renderer.record.id)
        self.older = {r.source: r for r in self.prior.values() if r.encoding in recalibrated and (r.model, r.template) == mine}
        self.taken: set[str] = set()
        head, anchor = tuple(self.renderer.head_ids), tuple(self.renderer.anchor_ids)
        self.head_task = self.task(Context.root(), (), head)
        same = head == anchor
        self.contexts: dict[Regime, tuple[Context, Chain]] = {
            "prefix": (Context.anchor(anchor) if same else Context.parent(self.head_task.key, len(head)), (head,)),
            "isolated": (Context.anchor(anchor), (anchor,)),
        }

    def plan(self, documents: Iterable[Document | Skipped]) -> Iterator[Planned]:
        """In order. What cannot be compiled goes to `skipped`."""
        for document in documents:
            if isinstance(document, Skipped):
                self.skipped.append(document)
            elif (planned := self._document(document)) is not None:
                yield planned

    def _document(self, document: Document) -> Planned | None:
        text = text_digest(document.text)
        tasks: tuple[Task, ...] = ()
        prior = self.prior.get((document.source, self.model.key, self.renderer.record.id, self.encoding.id))
        before = prior or self.older.get(document.source)  # a new calibration takes the place of the old one: what held there holds on
        if prior is not None and self._still_true(prior, text):
            passages = prior.passages
        else:
            texts = plan_document(
                document,
                self.renderer,
                passage_tokens=self.rules.passage_tokens,
                context=self.rules.context_tokens,
                reserve=self.rules.reserve,
                long=self.rules.long,
            )
            if isinstance(texts, Skipped):
                self.skipped.append(texts)
                return None
            keep = set(REGIMES[self.rules.regime]) | self._regimes_of(before, text)
            done = [self._passage(tuple(self.renderer.document(t)), keep) for t in texts]
            passages, tasks = tuple(p for p, _ in done), (self.head_task, *(t for _, ts in done for t in ts))
        row = Row(
            document.source,
            self.model.key,
            self.renderer.record.id,
            self.encoding.id,
            text,
            self.rules.recipe,
            self.head_task.key,
            passages,
            root_of(document, before),
            dict(document.metadata),
            self._chains_of(prior, text) or UNSET,
        )
        return Planned(row, self.missing(tasks), row != prior)

    def _still_true(self, prior: Row, text: str) -> bool:
        """The same text, cut the same way, in every context asked for, and all of it stored."""
        asked = all(getattr(p, regime) is not None for p in prior.passages for regime in REGIMES[self.rules.regime])
        return self._same_cut(prior, text) and asked and all(self.store.index.has(k, self.encoding.id) for k in prior.segment_keys())

    def _same_cut(self, prior: Row, text: str) -> bool:
        return prior.text == text and prior.recipe == self.rules.recipe and prior.head == self.head_task.key

    def _chains_of(self, prior: Row | None, text: str) -> tuple[Chained, ...]:
        """Those of an unchanged document that are stored. Where what stands before them changed, they go at the end of the build."""
        if prior is None or not self._same_cut(prior, text):
            return ()
        return tuple(c for c in prior.chained if all(self.store.index.has(k, self.encoding.id) for k in (c.parent, c.key)))

    def _regimes_of(self, prior: Row | None, text: str) -> set[Regime]:
        """Contexts that the unchanged text is stored in already: a narrower build does not forget them."""
        if prior is None or prior.text != text:
            return set()
        return {r for r in REGIMES["both"] if all(getattr(p, r) is not None for p in prior.passages)}

    def _passage(self, ids: tuple[int, ...], regimes: set[Regime]) -> tuple[Passage, list[Task]]:
        tasks = {r: self.task(*self.contexts[r], ids) for r in REGIMES["both"] if r in regimes}
        if tasks.keys() == {"prefix"} and self.contexts["prefix"] == self.contexts["isolated"] and not self.layout.state:
            tasks["isolated"] = tasks["prefix"]  # nothing but the anchor before it: it is both
        keys = {r: t.key for r, t in tasks.items()}
        return Passage(len(ids), keys.get("prefix"), keys.get("isolated")), list(tasks.values())

    def task(self, context: Context, chain: Chain, ids: tuple[int, ...], followed: bool = False) -> Task:
        return Task(segment_key(self.model, self.layout, context, ids), context, chain, ids, followed)

    def missing(self, tasks: Iterable[Task]) -> tuple[Task, ...]:
        """Tasks whose artifact is neither stored nor planned by an earlier document."""
        fresh = {t.key: t for t in tasks if t.key not in self.taken and not self.store.index.has(t.key, self.encoding.id)}
        self.taken |= fresh.keys()
        return tuple(fresh.values())


def template_in(store: Store, kind: str, tokenizer: Any, system: str | None, encoder: TextEncoder) -> TemplateRecord:
    """The record that an earlier build froze from the same template and tokenizer (one that prints the date stays as it was), or a new one."""
    source = template_source(kind, tokenizer, system)
    frozen = [t for t in store.templates() if (t.source, t.tokenizer) == (source, encoder.digest)]
    return frozen[0] if frozen else make_template(kind, tokenizer, system, encoder=encoder)


def root_of(document: Document, prior: Row | None) -> str:
    """The root to keep for a document: a file named alone stays under the folder it was built from before.

    Raises InputError where the name belongs to another file that is still there: one of the two would silently replace the other.
    """
    if prior is None or not prior.root or not document.root or prior.root == document.root:
        return document.root
    before, now = file_of(prior.root, prior.source), file_of(document.root, document.source)
    if before == now:
        return min(prior.root, document.root, key=len)
    if os.path.exists(before):
        raise InputError(
            f"{document.source!r} names two files, {before} (stored) and {now}",
            remedy="build the folder above both, or give each folder its own store",
            code="clash",
        )
    return document.root


def file_of(root: str, source: str) -> str:
    """The path that a source was read from; `root` is the folder, or the file itself where that was named."""
    name = os.path.basename(root)
    folder = os.path.dirname(root) if source == name or source.startswith(f"{name}/") else root
    return os.path.join(folder, *source.split("/"))


def gone(store: Store, planned_for: tuple[str, str, str], roots: set[str], seen: set[str]) -> tuple[RowId, ...]:
    """Rows of the synced roots whose source is no longer there, in the model, template and encoding of this build."""
    return tuple(r.id for r in store.rows() if _synced(r.root, roots) and r.source not in seen and (r.model, r.template, r.encoding) == planned_for)


def superseded(
    store: Store, planned_for: tuple[str, str, str], encoding: Encoding, roots: set[str], seen: set[str], unreadable: set[str]
) -> tuple[RowId, ...]:
    """Rows of this build's model and template that only differ in their calibration: of what it compiled anew, and of what is gone from its roots."""
    model, template, mine = planned_for
    rows = [r for r in store.rows() if (r.model, r.template) == (model, template) and r.encoding != mine]
    older = older_encodings(store, encoding) if rows else set()
    left = [r for r in rows if r.encoding in older and r.source not in unreadable]
    return tuple(r.id for r in left if r.source in seen or _synced(r.root, roots))


def older_encodings(store: Store, encoding: Encoding) -> set[str]:
    """Encodings (ids) of the store that only differ from this one in their calibration."""
    if _uncalibrated(encoding) is None:
        return set()
    return {i for i, e in store.encodings().items() if i != encoding.id and _uncalibrated(e) == _uncalibrated(encoding)}


def _uncalibrated(encoding: Encoding) -> tuple[CodecSpec, ...] | None:
    """What stays the same when a model is calibrated again (groups and tiers follow from the calibration); None where there is none."""
    plain = tuple(msgspec.structs.replace(c, calibration=None) for c in encoding.codecs)
    return None if plain == encoding.codecs else plain


def _synced(root: str, roots: set[str]) -> bool:
    return root in roots or any(root.startswith(os.path.join(r, "")) for r in roots)
