"""Text to token ids, with the line between trusted and untrusted text drawn here and nowhere else.

Documents and questions are untrusted: whatever they say, they never yield a control token. Templates are trusted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from kvstore.errors import InputError
from kvstore.vocabulary import FastVocabulary, SlowVocabulary, Vocabulary

_NEXT = "A"  # stands for the segment that follows: only whether white space follows matters to a pre-tokenizer


class Piece(NamedTuple):
    """A string of a prompt; `trusted` is text of the template, in which control tokens count."""

    text: str
    trusted: bool


class _Run(NamedTuple):
    """Plain text between two control tokens, or (`ids`) a control token."""

    text: str
    ids: tuple[int, ...] = ()


class TextEncoder:
    """Token ids for one tokenizer of transformers, or a bare `tokenizers.Tokenizer`, whatever its state of padding.

    Ids of a text are those it has in the middle of a prompt: without the space that SentencePiece tokenizers put before
    a first word.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.bos, self.eos = (_special(tokenizer, name) for name in ("bos_token_id", "eos_token_id"))
        self.bos_text: str = str(getattr(tokenizer, "bos_token", None) or "")

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        backend = getattr(self.tokenizer, "backend_tokenizer", self.tokenizer)
        return FastVocabulary(backend) if hasattr(backend, "to_str") else SlowVocabulary(self.tokenizer)

    @property
    def digest(self) -> str:
        """Which tokenizer this is, as 64 hexadecimal digits: saving and loading it again does not change them."""
        return self._vocabulary.digest

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that no text yields: all added tokens but white space and the like.

        What a vocabulary cannot spell may become its `<unk>`, unless that is also BOS or EOS.
        """
        return frozenset(set(self._spelt) - (self._vocabulary.allowed - {self.bos, self.eos}))

    @cached_property
    def _spelt(self) -> dict[int, str]:
        return {i: c.content for i, c in self._vocabulary.controls.items()}

    @property
    def separates(self) -> bool:
        """Whether a control token is a clean seam: False where the tokenizer puts a space of its own after it."""
        return self._vocabulary.prefix != "always"

    @property
    def prefixes(self) -> bool:
        """Whether the tokenizer puts a space of its own before the first word of a text."""
        return self._vocabulary.prefix != "never"

    def text(self, text: str) -> list[int]:
        """Ids of untrusted text inside a prompt. Raises InputError where only a control token could spell it."""
        return self.segment([Piece(text, False)], followed=False)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`text` for many at once, in parallel."""
        return self.segments([[Piece(t, False)] for t in texts], followed=False)

    def markup(self, text: str, *, start: bool = False) -> list[int]:
        """Ids of trusted text, control tokens included; `start` where it begins the prompt. Adds no BOS."""
        return self.segment([Piece(text, True)], start=start, followed=False)

    def whole(self, text: str) -> list[int]:
        """Ids of trusted text as the tokenizer itself gives them, in one go and without adding special tokens."""
        if hasattr(self.tokenizer, "to_str"):
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def segment(self, pieces: Iterable[Piece], *, start: bool = False, followed: bool = True) -> list[int]:
        """Ids of neighbouring pieces as in the whole prompt: plain text is tokenised across their borders.

        `followed`: another segment comes behind, beginning with anything but white space.
        """
        return self.segments([pieces], start=start, followed=followed)[0]

    def segments(self, batch: Iterable[Iterable[Piece]], *, start: bool = False, followed: bool = True) -> list[list[int]]:
        """`segment` for many at once."""
        rows = [list(self._runs(pieces)) for pieces in batch]
        wanted: dict[bool, dict[str, list[int]]] = {False: {}, True: {}}
        for row in rows:
            for text, prefixed in self._plain_of(row, start, followed):
                wanted[prefixed][text] = []
        for prefixed, texts in wanted.items():
            if texts:
                texts.update(zip(texts, self._checked(list(texts), prefixed), strict=True))
        return [self._joined(row, self._plain_of(row, start, followed), wanted) for row in rows]

    def spans(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Trusted text cut at its control tokens: (text, None) or (literal with the white space it swallows, id)."""
        at = 0
        for match in self._pattern.finditer(text) if self._spelt else ():
            if match.start() > at:
                yield text[at : match.start()], None
            yield match[0], int(str(match.lastgroup)[1:])
            at = match.end()
        if at < len(text):
            yield text[at:], None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Longest first, as the tokenizers library matches. A second pattern for a token would not be reached."""
        longest = sorted(self._vocabulary.controls.values(), key=lambda c: (-len(c.content), c.id))
        return re.compile("|".join(f"(?P<t{c.id}>{c.pattern})" for c in longest))

    def _runs(self, pieces: Iterable[Piece]) -> Iterator[_Run]:
        pending = ""
        for piece in pieces:
            for text, control in self.spans(piece.text) if piece.trusted else [(piece.text, None)]:
                if control is None:
                    pending += text
                    continue
                if pending:
                    yield _Run(pending)
                yield _Run(text, (control,))
                pending = ""
        if pending:
            yield _Run(pending)

    def _plain_of(self, row: Sequence[_Run], start: bool, followed: bool) -> list[tuple[str, bool]]:
        """What to tokenise for the plain runs of a row, and whether with the tokenizer's own space before it."""
        found = []
        for at, run in enumerate(row):
            if not run.ids:
                guard = _NEXT if followed and at == len(row) - 1 and run.text[-1].isspace() else ""
                found.append((run.text + guard, (start and self.prefixes) if at == 0 else not self.separates))
        return found

    def _joined(self, row: Sequence[_Run], plain: Sequence[tuple[str, bool]], ids_of: dict[bool, dict[str, list[int]]]) -> list[int]:
        ids: list[int] = []
        rest = iter(plain)
        for run in row:
            if run.ids:
                ids += run.ids
                continue
            text, prefixed = next(rest)
            ids += ids_of[prefixed][text] if text == run.text else self._unguarded(run.text, ids_of[prefixed][text], prefixed)
        return ids

    def _unguarded(self, text: str, ids: list[int], prefixed: bool) -> list[int]:
        """GPT-2's pattern cuts a run of newlines in two where something follows: tokenised so, without what follows."""
        guard = self._guard
        return ids[: -len(guard)] if ids[-len(guard) :] == guard else self._checked([text], prefixed)[0]

    @cached_property
    def _guard(self) -> list[int]:
        return self._vocabulary.plain([_NEXT], False)[0]

    def _checked(self, texts: list[str], prefixed: bool) -> list[list[int]]:
        try:
            found = self._vocabulary.plain(texts, prefixed)
        except (TypeError, UnicodeEncodeError) as error:  # lone surrogates
            raise InputError(f"the tokenizer refuses a text: {error}", remedy="decode it with the right encoding") from error
        for text, ids in zip(texts, found, strict=True):
            if not self.control_ids.isdisjoint(ids):
                names = sorted(self._spelt.get(i, str(i)) for i in self.control_ids.intersection(ids))
                raise InputError(
                    f"the tokenizer spells the control tokens {', '.join(names)} from the text {text[:60]!r}",
                    remedy="take them out of the text",
                    code="control-token",
                )
        return found


def _special(tokenizer: Any, name: str) -> int | None:
    found = getattr(tokenizer, name, None)
    return found if isinstance(found, int) else None
