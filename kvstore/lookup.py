"""From what a caller names or brings to the ids and keys of stored segments. Where a caller brings text, the ids of that text decide."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvstore.artifact import Stored
from kvstore.documents import Document, Skipped, from_objects, text_digest
from kvstore.errors import InputError, NotFoundError
from kvstore.identity import Context
from kvstore.manifest import Layout, Model, Row
from kvstore.passages import passage_names, plan_document
from kvstore.plan import Rules, older_encodings
from kvstore.prefixes import PrefixIndex
from kvstore.sources import text_name
from kvstore.store import Store, describe
from kvstore.template import Renderer
from kvstore.tokens import TextEncoder
from kvstore.turns import Turns

log = logging.getLogger("kvstore")


@dataclass(frozen=True)
class Block:
    """A run of prompt ids that may be stored: the head, or a passage. `miss` says beforehand why it cannot be."""

    label: str
    ids: tuple[int, ...]
    miss: str = ""


class View:
    """One model, template and encoding of a store, as of one snapshot."""

    def __init__(self, store: Store, model: Model, encoder: TextEncoder, *, template: str | None = None, encoding: str | None = None):
        self.store, self.model = store, model
        self.layout: Layout = store.model_record(model.key).layout
        row = self._representative(store.rows(model=model.key, template=template, encoding=encoding))
        self.encoding_id = row.encoding
        self.renderer = Renderer(store.template(row.template), encoder)
        if self.renderer.record.tokenizer != encoder.digest:
            raise InputError("the tokenizer is not the one that the store was built with", remedy="pass the model's own tokenizer")
        self._rules = row.recipe

    def _representative(self, rows: Sequence[Row]) -> Row:
        if not rows:
            raise NotFoundError(f"{self.store.path} holds nothing of model {self.model.name}", remedy="build a corpus with it")
        kinds = {(r.template, r.encoding): r for r in rows}
        if len(kinds) > 1 and (newest := self._recalibrated(kinds.values())) is not None:
            older = sum(r.encoding != newest.encoding for r in rows)
            log.warning("%d documents were compiled with an older calibration and count as not stored: build them again", older)
            return newest
        if len(kinds) > 1:
            raise InputError(
                f"the store holds {len(kinds)} versions: {'; '.join(describe(r) for r in kinds.values())}",
                remedy="say which with template= and encoding= (--template, --encoding)",
                code="ambiguous",
            )
        return rows[0]

    def _recalibrated(self, rows: Iterable[Row]) -> Row | None:
        """The row of the model's current calibration, where that is all in which the versions differ."""
        current, encodings = self.store.current_calibration(self.model.key), self.store.encodings()
        given = list(rows)
        mine = [r for r in given if any(c.calibration == current for c in encodings[r.encoding].codecs if c.calibration)]
        if len(mine) != 1 or len({r.template for r in given}) > 1:
            return None
        others = {r.encoding for r in given} - {mine[0].encoding}
        return mine[0] if others <= older_encodings(self.store, encodings[mine[0].encoding]) else None

    @property
    def snapshot(self) -> int:
        """The snapshot that names are looked up in now."""
        return self.store.number

    @cached_property
    def anchor_context(self) -> Context:
        return Context.anchor(self.renderer.anchor_ids)

    def head(self) -> Block:
        return Block("(head)", tuple(self.renderer.head_ids))

    def follow(self, context: Context, key: str, tokens: int, block: Block) -> Context:
        """The context after a block: its segment, or the anchor where nothing but the anchor stands before."""
        if context.kind == "root" and tuple(self.renderer.anchor_ids) == block.ids:
            return self.anchor_context
        return Context.parent(key, tokens)

    @property
    def prefixes(self) -> PrefixIndex:
        """What is stored, by token ids instead of names."""
        return self.store.prefixes(self.model, self.encoding_id)

    def find(self, key: str) -> Stored | None:
        return self.store.stored(key, self.encoding_id) if self.store.index.has(key, self.encoding_id) else None

    def moved(self, stored: Stored) -> Stored:
        """Where an artifact is now, after its pack was collected. Raises NotFoundError."""
        self.store.refresh()
        return self.store.stored(stored.segment.key, stored.pack.manifest.encoding_id)

    def row(self, source: str) -> Row | None:
        rows = self.store.rows(source, model=self.model.key, template=self.renderer.record.id, encoding=self.encoding_id)
        return rows[0] if rows else None

    @cached_property
    def turns(self) -> Turns:
        return Turns(self.renderer)

    def tail(self, asked: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of everything after the documents: a question, or messages that end with one."""
        return self.renderer.query(asked) if isinstance(asked, str) else self.turns.tail(asked)

    def blocks(self, given: Any) -> list[Block]:
        """The passages of a name (`a.md`, `a.md#3`), a Document, a dict with text, or a retriever object. Raises NotFoundError for unknown names."""
        if isinstance(given, str):
            return self._named(given)
        (document,) = from_objects([given])
        if isinstance(document, Skipped):
            raise InputError(f"{document.source}: {document.reason}", remedy="leave it out")
        return self._brought(document)

    def _named(self, name: str) -> list[Block]:
        source, passage = self.store.resolve(name)
        row = self.row(source)
        if row is None:
            raise NotFoundError(f"{name!r} is not in {self.store.path}", remedy="`kvstore ls` lists what is; text goes in as a Document")
        wanted = range(len(row.passages)) if passage is None else range(passage, passage + 1)
        if passage is not None and passage >= len(row.passages):
            raise NotFoundError(f"{source!r} has {len(row.passages)} passages, there is no #{passage}", remedy="they count from 0")
        several = len(row.passages) > 1
        return [Block(f"{source}#{i}" if several else source, self._stored_ids(row, i)) for i in wanted]

    def _stored_ids(self, row: Row, passage: int) -> tuple[int, ...]:
        p = row.passages[passage]
        stored = self.store.stored(p.prefix or p.isolated or "", row.encoding)
        return tuple(int(i) for i in stored.ids)

    def _brought(self, document: Document) -> list[Block]:
        """A text's own ids; cut as the stored version was cut, so that unchanged passages are found."""
        row = self._row_of(document)
        miss = "" if row is None or row.text == text_digest(document.text) else "changed since build"
        rules = rules_of(row.recipe if row is not None else self._rules)
        texts = plan_document(document, self.renderer, passage_tokens=rules.passage_tokens, context=rules.context_tokens, reserve=0, long="split")
        if isinstance(texts, Skipped):
            raise InputError(f"{texts.source}: {texts.reason}", remedy="leave it out")
        names = passage_names(document.source if row is None else row.source, len(texts))
        return [Block(n, tuple(self.renderer.document(t)), miss) for n, t in zip(names, texts, strict=True)]

    def _row_of(self, document: Document) -> Row | None:
        """The row of that name, or of that very text: later chunks of a file were called after it (`a.md/text-...`), and retrievers tell the file."""
        row = self.row(document.source)
        if row is None or row.text == text_digest(document.text):
            return row
        return self.row(f"{document.source}/{text_name(document.text)}") or row


def rules_of(recipe: str) -> Rules:
    """How a row was cut."""
    values = dict(part.split("=") for part in recipe.split())
    passages = int(values["passages"])
    return Rules(passage_tokens=passages or None, long="split", context_tokens=int(values["room"]), reserve=0)
