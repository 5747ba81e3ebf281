"""The prompt's fixed parts, frozen at build, and rendering documents and questions between them.

What is compiled is the rendered prompt, so the record is part of the format: a template that prints today's date stays
as it was built. Ids at the edge of a document or question come from tokenising it together with the plain text around
it, up to the next special token: `.` and a newline are one token in many vocabularies. The record's ids of these parts
are those they have alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore import cutting
from kvstore.cutting import Parts
from kvstore.digest import digest
from kvstore.errors import IncompatibleError, InputError
from kvstore.manifest import FORMAT, Part, TemplateRecord
from kvstore.sources import clean_newlines, decoded
from kvstore.tokens import Piece, TextEncoder

ANCHOR_TOKENS = 32  # a longer head is not put before isolated documents: its KV is computed each time and dropped
_SAMPLE = (["The first document.\n\nIts last line", "(2) Another one, of 1,234 words!"], "What is in it?")
log = logging.getLogger("kvstore")


def make_template(kind: str | Path, tokenizer: Any, system: str | None = None, *, encoder: TextEncoder | None = None) -> TemplateRecord:
    """Cut the prompt of `tokenizer` into its fixed parts.

    `kind` is `auto` (the tokenizer's chat template, `plain` where it has none), `plain`, or the path of a file that
    holds one prompt with the markers {system}, {document} and {query}; one newline at the end of the file does not
    count. `system` is the system prompt; it and its surrounding parts become the head. `encoder` saves reading the
    vocabulary again. The anchor is the head without the system prompt where that takes at most 32 tokens, else BOS,
    else a newline. Raises InputError where a template cannot be cut at special tokens or newlines, or begins with two
    BOS.
    """
    encoder = encoder or TextEncoder(tokenizer)
    system = _trimmed(system)
    name, text = _chosen(kind, tokenizer)
    if name == "auto":
        parts, bare = cutting.chat(tokenizer, encoder, system, text)
    elif name == "plain":
        parts, bare = cutting.plain(encoder, system), None if system is None else cutting.plain(encoder, None)
    else:
        parts, bare = cutting.file(text, encoder, system), None if system is None else cutting.file(text, encoder, None)
    source = _source(name, text, tokenizer, system)
    record = _record(name, source, encoder, system, parts, bare if system is not None else parts)
    _check(record, encoder)
    return record


def template_source(kind: str | Path, tokenizer: Any, system: str | None = None) -> str:
    """The `source` of the record that `make_template` would return: finds the one that an earlier build froze."""
    name, text = _chosen(kind, tokenizer)
    return _source(name, text, tokenizer, _trimmed(system))


def _source(kind: str, text: str, tokenizer: Any, system: str | None) -> str:
    """BOS and EOS too: templates write them by name, and another choice of them leaves the vocabulary as it is."""
    named = [str(getattr(tokenizer, name, None) or "") for name in ("bos_token", "eos_token")]
    return digest("kvstore/template-source/1", {"kind": kind, "text": text, "system": system, "special": named})


def _trimmed(system: str | None) -> str | None:
    return clean_newlines(system or "").strip() or None


def _chosen(kind: str | Path, tokenizer: Any) -> tuple[str, str]:
    """(auto, jinja), (plain, "") or (file, its text)."""
    if kind == "auto" and getattr(tokenizer, "chat_template", None):
        try:
            return "auto", tokenizer.get_chat_template()
        except ValueError as error:  # several named templates and no default
            raise InputError(f"the tokenizer's chat template: {error}", remedy=cutting.FILE_REMEDY) from error
    if kind in ("auto", "plain"):
        return "plain", ""
    path = Path(kind)
    if not path.is_file():
        raise InputError(f"no template {kind}", remedy="choose auto, plain or the path of a file")
    text = decoded(path.read_bytes())
    if text is None:
        raise InputError(f"{path}: not UTF-8 text", remedy="write the template in UTF-8")
    return "file", clean_newlines(text).removesuffix("\n")


def _record(kind: str, source: str, encoder: TextEncoder, system: str | None, parts: Parts, bare: Parts | None) -> TemplateRecord:
    head = _head(parts.head or (Piece(cutting.fallback(encoder), True),), encoder)
    anchor = _head(bare.head, encoder) if bare is not None and bare.head else head
    if bare is None or len(anchor.ids) > ANCHOR_TOKENS:
        anchor = _head((Piece(cutting.fallback(encoder), True),), encoder)
    if encoder.bos is not None and head.ids[:2] == (encoder.bos, encoder.bos):
        raise InputError("the template begins with two BOS", remedy=cutting.FILE_REMEDY)
    fixed = (Part(t, tuple(encoder.markup(t))) for t in (parts.document_start, parts.document_end, parts.query_start, parts.query_end))
    return TemplateRecord(FORMAT, kind, source, encoder.digest, system, anchor, head, *fixed)


def _head(pieces: Sequence[Piece], encoder: TextEncoder) -> Part:
    return Part("".join(p.text for p in pieces), tuple(encoder.segment(pieces, start=True)))


def _check(record: TemplateRecord, encoder: TextEncoder) -> None:
    """Ids are the truth, so segments stay what they are; but say so where tokenising at once gives others."""
    where = Renderer(record, encoder).difference(*_SAMPLE)
    if where is not None:
        log.warning(
            "template: tokenised in segments, a sample prompt differs from tokenising it at once, from token %d on",
            where,
        )


class Renderer:
    """Ids and text of heads, documents and questions under one template record.

    Raises IncompatibleError where the record was made with another tokenizer. Text is trimmed: white space at the edge
    of a document would change the ids of what stands beside it. Control tokens spelt in documents and questions come
    out as plain text.
    """

    def __init__(self, record: TemplateRecord, encoder: TextEncoder):
        if record.tokenizer != encoder.digest:
            raise IncompatibleError(
                f"tokenizer: the template was made with {record.tokenizer[:12]}, this is {encoder.digest[:12]}",
                remedy="use the tokenizer that the store was built with, or build again",
            )
        self.record, self.encoder = record, encoder

    @property
    def head_ids(self) -> tuple[int, ...]:
        """Everything before the first document, BOS and system prompt included."""
        return self.record.head.ids

    @property
    def anchor_ids(self) -> tuple[int, ...]:
        """What is put before a document that is compiled to be used anywhere."""
        return self.record.anchor.ids

    def document(self, text: str) -> list[int]:
        """Ids of a document with its wrapper; they do not depend on what stands before or behind it."""
        return self.documents([text])[0]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`document` for many at once, tokenised in parallel."""
        return self.encoder.segments([self._document_pieces(t) for t in texts])

    def query(self, text: str) -> list[int]:
        """Ids of the question and everything up to where the answer begins."""
        return self.encoder.segment(self._query_pieces(text), followed=False)

    def prompt(self, documents: Sequence[str], query: str) -> list[int]:
        """The whole prompt: head, documents in this order, question."""
        return [*self.head_ids, *(i for ids in self.documents(documents) for i in ids), *self.query(query)]

    def document_text(self, text: str) -> str:
        return "".join(p.text for p in self._document_pieces(text))

    def query_text(self, text: str) -> str:
        return "".join(p.text for p in self._query_pieces(text))

    def prompt_text(self, documents: Sequence[str], query: str) -> str:
        """The whole prompt as one string, as a server without stored segments would tokenise it."""
        return self.record.head.text + "".join(map(self.document_text, documents)) + self.query_text(query)

    def difference(self, documents: Sequence[str], query: str) -> int | None:
        """The first position where tokenising the whole prompt at once gives another id, or None.

        Text that spells control tokens always differs: that is why it is tokenised apart.
        """
        ours, whole = self.prompt(documents, query), self.encoder.whole(self.prompt_text(documents, query))
        if ours == whole:
            return None
        return next((i for i, (a, b) in enumerate(zip(ours, whole, strict=False)) if a != b), min(len(ours), len(whole)))

    def _document_pieces(self, text: str) -> list[Piece]:
        record = self.record
        return [
            Piece(record.document_start.text, True),
            Piece(clean_newlines(text).strip(), False),
            Piece(record.document_end.text, True),
        ]

    def _query_pieces(self, text: str) -> list[Piece]:
        record = self.record
        return [
            Piece(record.query_start.text, True),
            Piece(clean_newlines(text).strip(), False),
            Piece(record.query_end.text, True),
        ]
