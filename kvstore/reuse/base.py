"""What every reuse mode is: whether documents stored alone are put side by side, and which of their tokens are then computed anew.

Head and documents that are stored after exactly the tokens before them are never computed anew: they are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import InputError

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Budget = int | float | None


class Scene(Protocol):
    """A prompt whose stored keys and values are in place, as modes see it. What costs a pass of the model is computed when asked for."""

    @property
    def moved(self) -> Sequence[range]:
        """The rows of each moved document among the prompt's cached tokens, ascending."""

    @property
    def layers(self) -> int:
        """How many keep keys and values."""

    def deviation(self, layer: int) -> Scores:
        """float32 [cached tokens]: how far the keys of `layer` are, squared, from those computed anew; 0 outside moved documents.

        Moved documents are computed anew in the layers before `layer`, and stay so.
        """

    def mass(self) -> Scores:
        """float32 [cached tokens]: attention that the question pays to each token, summed over layers, heads and the question's tokens."""


class Mode(ABC):
    """`recompute`: an int is tokens of each moved document, a float a share of them all, 0 to 1. An instance holds no state.

    `default` is the budget where none is given; None: the mode computes nothing anew and takes none. `moves`: whether documents stored alone are
    put where they are wanted; else the prompt ends its cached part where the stored chain ends.
    """

    name: ClassVar[str]
    default: ClassVar[Budget] = None
    moves: ClassVar[bool] = True

    def __init__(self, recompute: Budget = None):
        self.recompute = self.default if recompute is None else self._checked(recompute)

    def _checked(self, value: Budget) -> Budget:
        if self.default is None:
            raise InputError(f"reuse={self.name!r} computes nothing anew, it takes no recompute", remedy="leave it out, or choose another mode")
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        share = isinstance(value, float) and 0.0 <= value <= 1.0
        if not (whole or share):
            remedy = "give a whole number of tokens a document (16), or a share of all with a decimal point, 0.0 to 1.0"
            raise InputError(f"reuse={self.name!r}: recompute is {value!r}", remedy=remedy)
        return value

    @property
    def recomputes(self) -> bool:
        """Whether tokens are computed anew at all."""
        return self.recompute is not None

    @abstractmethod
    def choose(self, scene: Scene) -> Rows:
        """int64, ascending: rows of moved documents to compute anew. The same scene gives the same rows."""


NONE: Rows = np.empty(0, np.int64)


def ranked(scores: Scores, moved: Sequence[range], recompute: Budget) -> Rows:
    """The rows with the greatest scores: so many of each document, or of all together where it is a share. Of equal ones the earlier."""
    if isinstance(recompute, int):
        return _ascending([_greatest(scores, np.asarray(rows, np.int64), recompute) for rows in moved])
    rows = _ascending([np.asarray(rows, np.int64) for rows in moved])
    return _ascending([_greatest(scores, rows, share_of(recompute or 0.0, len(rows)))])


def leading(moved: Sequence[range], recompute: Budget) -> Rows:
    """The first rows of each document, so many or that share of it."""
    counts = (recompute if isinstance(recompute, int) else share_of(recompute or 0.0, len(rows)) for rows in moved)
    return _ascending([np.asarray(rows[:count], np.int64) for rows, count in zip(moved, counts, strict=True)])


def share_of(share: float, count: int) -> int:
    """So many of `count`, rounded up: a share above nothing is one token at least."""
    return min(count, int(np.ceil(share * count - 1e-9)))


def _greatest(scores: Scores, rows: Rows, count: int) -> Rows:
    order = np.argsort(-scores[rows], kind="stable")[:count]
    return rows[order]


def _ascending(parts: Sequence[Rows]) -> Rows:
    return np.sort(np.concatenate([NONE, *parts]))
