"""Cutting documents into passages that fit, at the most natural places that leave them short enough."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal

from kvstore.errors import InputError
from kvstore.sources import Document, Skipped
from kvstore.template import Renderer
from kvstore.tokens import TextEncoder

LongRule = Literal["split", "skip", "error"]
Counts = Callable[[Sequence[str]], list[int]]
Span = tuple[int, int]
# after a blank line, a line, a sentence, a word: the end of each match is where the text may be cut
_SENTENCE = r"[.!?…。！？][\"'”’)\]]*\s+|[。！？]"
_CUTS = [re.compile(p) for p in (r"\n[ \t]*(?:\n[ \t]*)+", r"\n", _SENTENCE, r"\s+")]


def plan_document(
    document: Document,
    renderer: Renderer,
    *,
    passage_tokens: int | None = None,
    context: int,
    reserve: int,
    long: LongRule = "split",
) -> list[str] | Skipped:
    """The texts to compile for a document: itself where it fits and `passage_tokens` is None, else its passages.

    A document fits where its rendered ids and the head leave `reserve` of the `context` tokens free for question and
    answer. One that does not is cut, skipped or refused (InputError), as `long` says; `passage_tokens` bounds the
    rendered ids of a passage in any case. Raises InputError where the head leaves no room at all.
    """
    room = context - reserve - len(renderer.head_ids)
    if room < 1:
        raise InputError(
            f"a head of {len(renderer.head_ids)} tokens and a reserve of {reserve} leave no room in {context}",
            remedy="shorten the system prompt, or keep less in reserve",
        )
    tokens = len(renderer.document(document.text))
    if tokens > room and long != "split":
        reason = f"{tokens} tokens are more than the {room} that the context leaves"
        if long == "skip":
            return Skipped(document.source, reason, document.root)
        raise InputError(f"{document.source}: {reason}", remedy="give --long split or --long skip", code="too-long")
    limit = room if passage_tokens is None else min(room, passage_tokens)
    if tokens <= limit:
        return [document.text]
    return split(document.text, renderer.encoder, limit, rendered=lambda texts: list(map(len, renderer.documents(texts))))


def passage_names(source: str, passages: int) -> list[str]:
    """`source` for one passage; `source#0`, `source#1`... for more."""
    return [source] if passages == 1 else [f"{source}#{n}" for n in range(passages)]


def split(text: str, encoder: TextEncoder, limit: int, *, rendered: Counts | None = None) -> list[str]:
    """Cut `text` into trimmed passages of at most `limit` tokens, each as long as whole paragraphs allow.

    A paragraph that is longer is cut between lines, sentences, words, and inside a word at last. Nothing but white
    space at the cuts is lost. `rendered` counts the tokens of passages (default: their plain ids).
    Raises InputError where not even one character fits.
    """
    cutter = _Cutter(text, rendered or (lambda texts: list(map(len, encoder.texts(texts)))), limit)
    spans = list(cutter.spans((0, len(text)), 0))
    sizes = map(len, encoder.texts([text[a:b] for a, b in spans]))
    return [passage for passage in cutter.packed(spans, [0, *accumulate(sizes)]) if passage]


class _Cutter:
    """One text, how passages of it are counted, and how many tokens they may have."""

    def __init__(self, text: str, counts: Counts, limit: int):
        self.text, self.counts, self.limit = text, counts, limit

    def fits(self, spans: Sequence[Span]) -> list[bool]:
        return [n <= self.limit for n in self.counts([self.text[a:b].strip() for a, b in spans])]

    def spans(self, span: Span, level: int) -> Iterator[Span]:
        """Neighbouring spans that fit one by one, cut no finer than each needs."""
        if level == len(_CUTS):
            yield from self.letters(span)
            return
        edges = sorted({*span, *(m.end() for m in _CUTS[level].finditer(self.text, *span))})
        parts = list(pairwise(edges))
        for part, fits in zip(parts, self.fits(parts), strict=True):
            if fits:
                yield part
            else:
                yield from self.spans(part, level + 1)

    def letters(self, span: Span) -> Iterator[Span]:
        """A word that is longer than a passage, cut where each piece is as long as it may be."""
        start, end = span
        while start < end:
            stop = self.reach(start, end)
            yield start, stop
            start = stop

    def reach(self, start: int, end: int) -> int:
        """The furthest place before `end` to which a passage from `start` fits, by doubling, then halving."""
        step = 1
        while start + step < end and self.fits([(start, start + step)])[0]:
            step *= 2
        low, high = start, min(start + step, end)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits([(start, middle)])[0] else (low, middle - 1)
        if low == start:
            raise InputError(f"passages of {self.limit} tokens have no room for text", remedy="allow more tokens a passage")
        return self.before_marks(start, low, end)

    def before_marks(self, start: int, stop: int, end: int) -> int:
        """Do not tear a combining mark from its letter, unless the letter has more marks than fit."""
        at = stop
        while start < at < end and unicodedata.combining(self.text[at]):
            at -= 1
        return at if at > start else stop

    def packed(self, spans: Sequence[Span], sums: Sequence[int]) -> Iterator[str]:
        """As many neighbours as fit: by their added lengths (`sums`, from 0) first, by the exact count then."""
        room = self.limit - self.counts([""])[0]
        first = 0
        while first < len(spans):
            last = max(first + 1, bisect_right(sums, sums[first] + room) - 1)
            while last > first + 1 and not self.fits([(spans[first][0], spans[last - 1][1])])[0]:
                last -= 1
            yield self.text[spans[first][0] : spans[last - 1][1]].strip()
            first = last
