"""Which coefficients the codec `transform` codes at which tier, by which tables and in which steps: encoder and decoder derive it alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.runs import Runs, cut

CLASSES, PER_THREE = 49, 8  # scale classes, and how many of them are a factor of three
TRITS = 10  # a level of the finest tier has ten digits of -1, 0, 1, one tier up nine ...
I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Ladder:
    """Which coefficients of a group are coded at which tier, by which tables, in which steps. `classes` int64 [rank]."""

    classes: I64
    tiers: int
    least: int
    step: float

    @property
    def finest(self) -> int:
        return self.tiers - 1

    def at(self, tier: int, step_class: int) -> I64:
        """int64 [rank]: scale classes for tokens of a step class, not clamped."""
        return self.classes - PER_THREE * (self.finest - tier + step_class)

    def count(self, tier: int, step_class: int) -> int:
        """How many coefficients are coded: the first ones, since classes descend."""
        return int((self.at(tier, step_class) >= self.least).sum())

    def tables(self, tier: int, step_class: int) -> Bytes:
        """uint8 [rank]: rows of the tables."""
        return np.clip(self.at(tier, step_class), 0, CLASSES - 1).astype(np.uint8)

    def step_of(self, tier: int, step_class: int) -> np.float32:
        return np.float32(self.step * 3.0 ** (self.finest - tier + step_class))

    def limit(self, tier: int) -> int:
        """The largest level: 29,524 at the finest tier, a third of that one tier up."""
        return int((3 ** (TRITS - self.finest + tier) - 1) // 2)


class Rows(NamedTuple):
    """Coefficients of a set in a tier: the first `coded` ones, of which the first `refined` are coded one tier up already."""

    refined: int
    coded: int
    run: int

    @property
    def added(self) -> int:
        return (self.coded - self.refined) * self.run

    def cuts(self) -> list[Runs]:
        """How the rows are cut into streams: refinements, added levels; none where a row is empty."""
        return [cut(symbols, self.run) for symbols in (self.refined * self.run, self.added) if symbols]


def rows_of(ladder: Ladder, tier: int, step_class: int, tokens: int) -> Rows:
    refined = ladder.count(tier - 1, step_class) if tier else 0
    return Rows(refined, ladder.count(tier, step_class), tokens)
