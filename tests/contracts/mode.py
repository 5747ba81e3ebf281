"""What every reuse mode must do. A mode's test subclasses `ModeContract` and says how it is called."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest

from kvstore.errors import InputError
from kvstore.reuse import NAMES, mode_of
from kvstore.reuse.base import Mode, Scores

BUDGETS: list[int | float] = [0, 1, 7, 10_000, 0.0, 0.01, 0.15, 0.5, 1.0]


class FakeScene:
    """A prompt of 3 exact tokens and documents of the given lengths, with scores that follow from a seed; counts what is asked of it."""

    layers = 4

    def __init__(self, *lengths: int, seed: int = 0):
        self.scores = np.random.default_rng(seed).random(3 + sum(lengths), np.float32)
        self.asked: list[str] = []
        starts = 3 + np.cumsum([0, *lengths])
        self.moved = tuple(range(int(a), int(b)) for a, b in pairwise(starts))

    def deviation(self, layer: int) -> Scores:
        assert 0 <= layer < self.layers
        self.asked.append("deviation")
        return self.scores

    def mass(self) -> Scores:
        self.asked.append("mass")
        return self.scores


class ModeContract:
    """`name` in the registry; `measures`: what it asks a scene for."""

    name: ClassVar[str]
    recomputes: ClassVar[bool] = True
    measures: ClassVar[list[str]] = []

    def mode(self, recompute: int | float | None = None) -> Mode:
        return mode_of(self.name, recompute)

    def budgets(self) -> list[int | float]:
        return BUDGETS if self.recomputes else []

    def test_is_in_the_registry(self) -> None:
        assert self.name in NAMES and self.mode().name == self.name and self.mode().recomputes == self.recomputes

    @pytest.mark.parametrize("lengths", [(), (1,), (9, 4), (40, 1, 300)])
    def test_chooses_rows_of_moved_documents_in_order(self, lengths: tuple[int, ...]) -> None:
        for mode in [self.mode(), *map(self.mode, self.budgets())]:
            rows = mode.choose(FakeScene(*lengths))
            assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
            assert set(rows.tolist()) <= {i for span in FakeScene(*lengths).moved for i in span}

    def test_keeps_its_budget(self) -> None:
        scene = FakeScene(40, 1, 300)
        for budget in self.budgets():
            rows = self.mode(budget).choose(FakeScene(40, 1, 300))
            counts = [int(np.isin(rows, span).sum()) for span in scene.moved]
            if isinstance(budget, int):
                assert counts == [min(budget, len(span)) for span in scene.moved]
            else:
                assert 341 * budget <= sum(counts) < 341 * budget + len(counts)

    def test_looks_at_what_it_says_and_only_then(self) -> None:
        scene = FakeScene(20, 30)
        self.mode().choose(scene)
        assert scene.asked == self.measures
        for nothing in [0, 0.0] if self.recomputes else []:
            scene = FakeScene(20, 30)
            assert len(self.mode(nothing).choose(scene)) == 0 and scene.asked == []

    def test_takes_the_highest_scores(self) -> None:
        if not self.measures:
            return
        scene = FakeScene(50, 60)
        rows = self.mode(0.2).choose(scene)
        rest = np.setdiff1d(np.arange(3, 113), rows)
        assert scene.scores[rows].min() >= scene.scores[rest].max() and len(rows) == 22

    def test_the_same_scene_gives_the_same_rows(self) -> None:
        one, other = (self.mode().choose(FakeScene(33, 44, seed=5)) for _ in range(2))
        np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("wrong", [-1, -0.5, 1.5, 2.0, True, "16", float("nan"), [3]])
    def test_refuses_other_budgets(self, wrong: object) -> None:
        with pytest.raises(InputError, match="recompute"):
            mode_of(self.name, wrong)  # type: ignore[arg-type]

    def test_a_mode_without_a_budget_takes_none(self) -> None:
        if self.recomputes:
            return
        with pytest.raises(InputError, match=f"reuse='{self.name}' computes nothing anew"):
            self.mode(16)
