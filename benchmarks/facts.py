"""Fact recall: documents of prose with facts scattered through them, and questions about the facts.

The sentences are those that the bundled model was trained on, so it can answer; the second model (`train_model.py`) learns them too.
Everything follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ADJECTIVES = (
    "old red quiet northern silver broken hidden eastern golden tall narrow blue ancient black green white southern western "
    "crooked empty stone little grey royal wooden iron distant lonely bright cold"
).split()
NOUNS = (
    "harbour lantern orchard captain mirror engine garden letter sparrow castle river candle bridge merchant violin compass statue "
    "market temple meadow pilot farmer kettle wagon tower island forest doctor window cellar station library museum anchor basket "
    "hammer ladder helmet curtain tailor baker miller sailor widow student teacher painter soldier hunter bishop prince judge nurse "
    "poet sister brother cousin uncle"
).split()
NAMES = (
    "Ashford Bellamy Carver Dunmore Ellery Farrow Garland Hawthorne Ives Jessop Kendrick Lambert Mercer Norwood Osborne Pemberton "
    "Quincy Radcliffe Sutton Thornton Underhill Vickers Wexford Yardley"
).split()
WORDS = (
    "amber copper velvet marble cedar falcon juniper saffron indigo thistle granite willow crimson ebony pearl scarlet maple bronze "
    "lavender ivory coral hazel onyx topaz walnut olive sable cobalt"
).split()
DIGITS, AMOUNTS, PEOPLE = ("access code", "number", "password"), ("age", "price", "weight"), ("keeper", "owner")
ATTRIBUTES = (*DIGITS, *AMOUNTS, *PEOPLE, "secret word", "colour")


@dataclass(frozen=True)
class Question:
    """What is asked after a document, and the answer; both with the white space they are joined by."""

    text: str
    answer: str


@dataclass(frozen=True)
class Recall:
    """Token ids of a document and the questions about it."""

    ids: tuple[int, ...]
    questions: tuple[Question, ...]


class Facts:
    """Makes fact-recall documents from a stretch of tokenised prose."""

    def __init__(self, tokenizer: Any, prose: Sequence[int], seed: int):
        self.tokenizer, self.prose, self.chance = tokenizer, prose, random.Random(seed)

    def document(self, tokens: int, facts: int) -> Recall:
        """A document of exactly `tokens` tokens with `facts` facts at random places, and one question a fact in random order."""
        chosen = self.draw(facts)
        stated = [self._encode(f" The {a} of the {e} is {v}.") for (a, e), v in chosen.items()]
        room = tokens - sum(map(len, stated))
        if room < 0:
            raise ValueError(f"{facts} facts do not fit into {tokens} tokens")
        filler = self.stretch(room)
        cuts = sorted(self.chance.randint(0, room) for _ in stated)
        ids: list[int] = []
        for start, stop, fact in zip([0, *cuts], cuts, stated, strict=False):
            ids += [*filler[start:stop], *fact]
        ids += filler[cuts[-1] if cuts else 0 :]
        asked = self.chance.sample(list(chosen.items()), len(chosen))
        return Recall(tuple(ids), tuple(Question(f"\nQuestion: What is the {a} of the {e}? Answer:", f" {v}.") for (a, e), v in asked))

    def stretch(self, tokens: int) -> list[int]:
        """`tokens` neighbouring tokens of the prose."""
        start = self.chance.randint(0, len(self.prose) - tokens - 1)
        return [int(i) for i in self.prose[start : start + tokens]]

    def draw(self, count: int) -> dict[tuple[str, str], str]:
        """`count` facts: (attribute, thing) -> value."""
        facts: dict[tuple[str, str], str] = {}
        while len(facts) < count:
            attribute = self.chance.choice(ATTRIBUTES)
            entity = f"{self.chance.choice(ADJECTIVES)} {self.chance.choice(NOUNS)}"
            facts.setdefault((attribute, entity), self.value(attribute))
        return facts

    def value(self, attribute: str) -> str:
        """A value such as the attribute may have."""
        if attribute in DIGITS:
            return "".join(self.chance.choice("0123456789") for _ in range(self.chance.randint(3, 6)))
        if attribute in AMOUNTS:
            return str(self.chance.randint(2, 999))
        return self.chance.choice(NAMES if attribute in PEOPLE else WORDS)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
