"""Cutting a prompt into head, document wrapper and query wrapper where ids on one side do not depend on the other.

Such a seam is the end of a special token, or of a run of newlines: never inside the run, since vocabularies hold merged
ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvstore.digest import sha256
from kvstore.errors import InputError
from kvstore.tokens import Piece, TextEncoder

MARKERS = ("{system}", "{document}", "{query}")
PREFACE = "Documents:\n"  # gives a seam to templates such as `[INST] ...` that have none before the user's text
FILE_REMEDY = "write the prompt to a file with the markers {system}, {document} and {query}, and give --template FILE"
_NEWLINES = re.compile(r"\n(?:[ \t]*\n)*")


@dataclass(frozen=True)
class Parts:
    """A prompt's fixed text: `head` before all documents, `document_*` around each, `query_*` around the question."""

    head: tuple[Piece, ...]
    document_start: str
    document_end: str
    query_start: str
    query_end: str


def plain(encoder: TextEncoder, system: str | None) -> Parts:
    """BOS, the system prompt, documents on lines of their own, `Question: ... Answer:`."""
    head = () if system is None else (Piece(system, False), Piece("\n\n", True))
    return _with_bos(Parts(head, "", "\n", "Question: ", " Answer:"), encoder)


def file(text: str, encoder: TextEncoder, system: str | None) -> Parts:
    """A prompt with markers in place of its contents. Each document repeats the line that {document} stands on.

    A BOS is put before it where there is none. Raises InputError for markers that are missing, repeated or out of
    order, and for lines of the document that do not begin and end at a seam.
    """
    system_at, document_at, query_at = (_only(text, marker) for marker in MARKERS)
    if document_at is None or query_at is None:
        raise InputError(f"the template has no {MARKERS[1] if document_at is None else MARKERS[2]}", remedy=FILE_REMEDY)
    if system is not None and system_at is None:
        raise InputError(
            "there is a system prompt, but the template has no {system}",
            remedy="add the marker, or leave the prompt out",
        )
    parts = cut(text, MARKERS if system_at is not None else (None, *MARKERS[1:]), encoder, system or "")
    if encoder.bos is not None and encoder.bos != encoder.eos:
        inside = encoder.markup(parts.document_start) + encoder.markup(parts.document_end)
        if encoder.bos in inside:
            raise InputError("the template puts a BOS at every document", remedy="a prompt has one, at its start")
    return _with_bos(parts, encoder)


def chat(tokenizer: Any, encoder: TextEncoder, system: str | None, jinja: str) -> tuple[Parts, Parts | None]:
    """The tokenizer's chat template, documents and question in one user message; and the same without a system prompt.

    Where the template refuses or drops system messages, the prompt goes first in the user's. Raises InputError where it
    cannot be cut.
    """
    marks = tuple(f"kvstore{name}{sha256((jinja + (system or '')).encode())[:16]}" for name in ("system", "document", "query"))
    reasons: list[str] = []
    for merged, preface in ((m, p) for m in (False, True) for p in ("", PREFACE)):
        try:
            parts = _rendered(tokenizer, encoder, system, marks, merged, preface)
            return parts, None if system is None else _bare(tokenizer, encoder, marks, preface)
        except InputError as error:
            reasons.append(error.message)
        if merged and system is None:
            break
    raise InputError(f"the tokenizer's chat template cannot be cut: {reasons[0]}", remedy=FILE_REMEDY, code="template")


def _bare(tokenizer: Any, encoder: TextEncoder, marks: Sequence[str], preface: str) -> Parts | None:
    for attempt in (preface, PREFACE):
        try:
            return _rendered(tokenizer, encoder, None, marks, False, attempt)
        except InputError:  # a template that insists on a system prompt: the anchor is BOS
            continue
    return None


def _rendered(tokenizer: Any, encoder: TextEncoder, system: str | None, marks: Sequence[str], merged: bool, preface: str) -> Parts:
    user = {"role": "user", "content": f"{preface}{marks[1]}\n\n{marks[2]}"}
    messages = [user]
    if system is not None and merged:
        messages = [user | {"content": f"{marks[0]}\n\n{user['content']}"}]
    elif system is not None:
        messages = [{"role": "system", "content": marks[0]}, user]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise on purpose (raise_exception) and by accident
        raise InputError(f"it refuses the messages ({error})") from error
    parts = cut(text, (None if system is None else marks[0], *marks[1:]), encoder, system or "")
    if parts.document_start.strip():
        raise InputError(f"before the document stands {parts.document_start!r}, with no special token or newline behind it")
    return parts


def cut(text: str, marks: Sequence[str | None], encoder: TextEncoder, system: str) -> Parts:
    """Cut `text` at the marks of system prompt (or None), document, query. Raises InputError without a mark or seam."""
    places = [_required(text, mark) for mark in marks if mark is not None]
    if places != sorted(places):
        raise InputError(f"its parts are not in the order {', '.join(MARKERS)}")
    before, between, after = re.split("|".join(re.escape(m) for m in marks[1:] if m is not None), text)
    head, document_start = _split_head(before, marks[0], encoder, system)
    end = next(_seams(between, encoder), None)
    if end is None:
        raise InputError(f"between document and query stands {between!r}, with neither a newline nor a special token that separates")
    return Parts(head, document_start, between[:end], between[end:], after)


def _split_head(before: str, mark: str | None, encoder: TextEncoder, system: str) -> tuple[tuple[Piece, ...], str]:
    """Up to the last seam before the document; what stands after that seam is repeated with each document."""
    opening, rest = ("", before) if mark is None else before.split(mark)
    end = max(_seams(rest, encoder), default=0)
    if mark is not None and not end:
        raise InputError("the system prompt is not followed by a newline or a special token")
    pieces = (Piece(opening, True), Piece(system, False), Piece(rest[:end], True))
    return tuple(p for p in pieces if p.text), rest[end:]


def _seams(text: str, encoder: TextEncoder) -> Iterator[int]:
    """Ends of the runs of newlines, and of the control tokens where these separate."""
    at = 0
    for part, control in encoder.spans(text):
        if control is None:
            yield from (at + m.end() for m in _NEWLINES.finditer(part))
        elif encoder.separates:
            yield at + len(part)
        at += len(part)


def _only(text: str, marker: str) -> int | None:
    if text.count(marker) > 1:
        raise InputError(f"the template has {marker} {text.count(marker)} times", remedy=FILE_REMEDY)
    return text.index(marker) if marker in text else None


def _required(text: str, mark: str) -> int:
    if text.count(mark) != 1:
        name = next((n for n in ("system", "document", "query") if n in mark), mark)
        raise InputError(f"the {name} text comes out {text.count(mark)} times")
    return text.index(mark)


def _with_bos(parts: Parts, encoder: TextEncoder) -> Parts:
    """A BOS where the head has none, and `fallback` for an empty head."""
    written = {control for piece in parts.head if piece.trusted for _, control in encoder.spans(piece.text)}
    lead = () if encoder.bos is None or encoder.bos in written else (Piece(encoder.bos_text, True),)
    if not parts.head:
        lead = (Piece(fallback(encoder), True),)
    return replace(parts, head=lead + parts.head)


def fallback(encoder: TextEncoder) -> str:
    """The shortest text that documents may follow: BOS, else a newline; both where a special token is no seam."""
    return (encoder.bos_text if encoder.bos is not None else "") + ("" if encoder.bos is not None and encoder.separates else "\n")
