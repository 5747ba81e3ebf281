"""Fact recall over several documents: a pool of prose with a few facts in each, questions about one fact or two, and a retriever over the pool.

Everything follows from a seed. Answers are scored teacher-forced: right where each of their tokens is the most likely one after those before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bm25s
from facts import ATTRIBUTES, Facts

from kvstore import Document

FACTS = 2  # in each document


@dataclass(frozen=True)
class Asked:
    """Questions with their answers, asked one after another, and the documents that hold them."""

    questions: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]

    @property
    def query(self) -> str:
        """All questions and no answer: what a prompt is composed for."""
        return "\nQuestion: ".join(question for question, _ in self.questions)

    def turns(self) -> list[tuple[str, str]]:
        """(what is read, what is to be said): each question follows the answers before it, as the model would have given them."""
        return [(f"{'' if i == 0 else chr(10)}Question: {question} Answer:", f" {answer}.") for i, (question, answer) in enumerate(self.questions)]


class Pool:
    """`count` documents of at most `tokens` tokens, each with FACTS facts that no other states."""

    def __init__(self, tokenizer: Any, prose: Sequence[int], tokens: int, count: int, seed: int = 11):
        self.tokenizer, self.chance = tokenizer, random.Random(seed)
        self.facts = Facts(tokenizer, prose, seed)
        self.known: dict[tuple[str, str], tuple[str, str]] = {}  # (attribute, thing) -> (value, source)
        self.documents = [self._document(tokens, f"{i:03d}.txt") for i in range(count)]
        self.retriever = bm25s.BM25()
        self.retriever.index(bm25s.tokenize([d.text for d in self.documents], stopwords="en", show_progress=False), show_progress=False)

    def _document(self, tokens: int, source: str) -> Document:
        stated = []
        while len(stated) < FACTS:
            ((attribute, thing), value), *_ = self.facts.draw(1).items()
            if not any(thing == other for _, other in self.known):
                self.known[attribute, thing] = value, source
                stated.append(f" The {attribute} of the {thing} is {value}.")
        return Document(self._text(stated, tokens), source)

    def _text(self, stated: Sequence[str], tokens: int) -> str:
        """Prose with the statements between its sentences' words, as long as fits."""
        room = tokens - sum(self._length(s) for s in stated)
        while True:
            filler = self.facts.stretch(room)
            cuts = sorted(self.chance.sample(range(1, room), len(stated)))
            pieces = [self.tokenizer.decode(filler[a:b]) for a, b in zip([0, *cuts], [*cuts, room], strict=True)]
            text = "".join(piece + statement for piece, statement in zip(pieces, [*stated, ""], strict=True)).strip()
            if self._length(text) <= tokens:
                return text
            room -= 1

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def one_fact(self, count: int) -> list[Asked]:
        return [Asked((self._question(fact),), (self.known[fact][1],)) for fact in self.chance.sample(sorted(self.known), count)]

    def two_facts(self, count: int) -> list[Asked]:
        """Two facts of two documents, both wanted."""
        found: list[Asked] = []
        while len(found) < count:
            a, b = self.chance.sample(sorted(self.known), 2)
            if self.known[a][1] != self.known[b][1]:
                found.append(Asked((self._question(a), self._question(b)), (self.known[a][1], self.known[b][1])))
        return found

    def _question(self, fact: tuple[str, str]) -> tuple[str, str]:
        return f"What is the {fact[0]} of the {fact[1]}?", self.known[fact][0]

    def chained(self, count: int) -> list[tuple[list[Document], Asked]]:
        """Questions whose second document must be found through the first: the age of the keeper of a thing. The model learnt no such."""
        found = []
        for number in range(count):
            (_, thing), *_ = self.facts.draw(1)
            person, attribute = self.facts.value("keeper"), self.chance.choice([a for a in ATTRIBUTES if a not in ("keeper", "owner")])
            value = self.facts.value(attribute)
            texts = [f" The keeper of the {thing} is {person}.", f" The {attribute} of {person} is {value}."]
            documents = [Document(self._text([t], 249), f"chain/{number}-{i}.txt") for i, t in enumerate(texts)]
            found.append((documents, Asked(((f"What is the {attribute} of the keeper of the {thing}?", value),), tuple(d.source for d in documents))))
        return found

    def retrieve(self, asked: Asked, count: int) -> list[str]:
        """Sources of the best `count` documents for the questions, best first."""
        words = bm25s.tokenize([" ".join(question for question, _ in asked.questions)], stopwords="en", show_progress=False)
        places, _ = self.retriever.retrieve(words, k=count, show_progress=False)
        return [self.documents[int(i)].source for i in places[0]]
