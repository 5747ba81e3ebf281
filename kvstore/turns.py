"""Several turns after the documents: earlier questions and their answers, then the question at hand.

The parts around an answer come from the tokenizer's chat template, which is asked for a dialogue of three marked messages; `plain` templates put
a newline between an answer and the next question. Only prompts are made so, never anything stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from kvstore.digest import sha256
from kvstore.errors import IncompatibleError, InputError
from kvstore.sources import clean_newlines
from kvstore.template import Renderer, template_source
from kvstore.tokens import Piece

ROLES = "messages alternate between user and assistant, begin and end with user; a system message may stand before them"


class Joints(NamedTuple):
    """Trusted text: `answer` between a question and its answer, `question` between an answer and the next question."""

    answer: str
    question: str


class Turns:
    """Ids of dialogues under one template."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.encoder, self.record = renderer, renderer.encoder, renderer.record

    def tail(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of everything after the documents. `messages`: dicts with `role` and `content`, as chat templates take them.

        Raises InputError for other roles or orders, and for a system message that is not the template's.
        """
        texts = self._contents(messages)
        pieces = [Piece(self.record.query_start.text, True), Piece(texts[0], False)]
        for number, text in enumerate(texts[1:]):
            pieces += [Piece(self.joints.question if number % 2 else self.joints.answer, True), Piece(text, False)]
        return self.encoder.segment([*pieces, Piece(self.record.query_end.text, True)], followed=False)

    def next(self, answered: Sequence[int], query: str) -> tuple[list[int], list[int]]:
        """Ids of an answer without what ended it, and those that ask `query` after it, the end of the answer's turn included."""
        answer, ends = list(answered), {self.encoder.eos, *self.encoder.markup(self.joints.question)[:1]} & self.encoder.control_ids
        while answer and answer[-1] in ends:
            answer.pop()
        pieces = [Piece(self.joints.question, True), Piece(question_text(query), False), Piece(self.record.query_end.text, True)]
        return answer, self.encoder.segment(pieces, followed=False)

    @cached_property
    def joints(self) -> Joints:
        """Raises InputError where the template knows no second turn, IncompatibleError where it is not the stored one any more."""
        if self.record.kind == "plain":
            return Joints(self.record.query_end.text + " ", "\n" + self.record.query_start.text)
        if self.record.kind != "auto":
            raise InputError("a template from a file has no second turn", remedy="build with the tokenizer's chat template (--template auto)")
        if template_source("auto", self.encoder.tokenizer, self.record.system) != self.record.source:
            raise IncompatibleError(
                "the tokenizer's chat template is not the one that the store was built with",
                remedy="open the store with the tokenizer it was built with",
            )
        return self._from_chat()

    def _from_chat(self) -> Joints:
        marks = [f"kvstore{role}{sha256(self.record.source.encode())[:16]}" for role in ("first", "second", "third")]
        dialogue = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
        try:
            text = self.encoder.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise on purpose (raise_exception) and by accident
            raise InputError(f"the chat template refuses a second turn ({error})", remedy="ask single questions") from error
        parts = re.split("|".join(map(re.escape, marks)), text)
        if len(parts) != 4 or [text.index(m) for m in marks] != sorted(text.index(m) for m in marks):
            raise InputError("the chat template does not give three messages as three", remedy="ask single questions")
        return Joints(parts[1], parts[2])

    def _contents(self, messages: Sequence[Mapping[str, Any]]) -> list[str]:
        given = [(_field(m, "role"), _field(m, "content")) for m in messages]
        if given and given[0][0] == "system":
            self._require_system(given.pop(0)[1])
        expected = ["user", "assistant"] * (len(given) // 2) + ["user"]
        if [role for role, _ in given] != expected:
            raise InputError(f"roles {', '.join(role for role, _ in given) or 'none'}", remedy=ROLES)
        return [question_text(text) for _, text in given]

    def _require_system(self, text: str) -> None:
        if clean_newlines(text).strip() != (self.record.system or ""):
            raise InputError(
                "the system message is not the one that the store was built with", remedy="leave it out, or build with it (--system)", code="system"
            )


def question_text(text: str) -> str:
    """A message's text as it enters prompts. Raises InputError for an empty one."""
    found = clean_newlines(text).strip()
    if not found:
        raise InputError("a message without text", remedy="give every message a text")
    return found


def _field(message: Mapping[str, Any], name: str) -> str:
    value = message.get(name) if isinstance(message, Mapping) else None
    if not isinstance(value, str):
        raise InputError(f"a message without a {name} that is text", remedy='messages are dicts: {"role": "user", "content": "..."}')
    return value
