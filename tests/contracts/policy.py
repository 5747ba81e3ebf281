"""What every token policy must do. A policy's test subclasses `PolicyContract` and says how to make it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.errors import InputError
from kvstore.policies import DROP, Policy, parse
from kvstore.policies.base import Flags, Floats

LAYERS, HEADS = 3, 2


class FakeView:
    """A segment whose attention follows from a seed; counts what is asked of it."""

    layers, kv_heads = LAYERS, HEADS

    def __init__(self, tokens: int, seed: int = 0, equal: bool = False):
        self.ids = np.arange(tokens, dtype=np.int64)
        self.special, self.punctuation = self.ids % 11 == 0, self.ids % 5 == 2
        self.chance, self.equal, self.asked = np.random.default_rng(seed), equal, 0
        self.scores = self._scores()

    def _scores(self) -> Floats:
        shape = (LAYERS, HEADS, len(self.ids))
        return np.ones(shape, np.float32) if self.equal else self.chance.random(shape, np.float32)

    def mass(self) -> Floats:
        self.asked += 1
        return self.scores

    def reconstruction(self) -> Floats:
        self.asked += 1
        return self.scores

    def recovered(self, kept: Flags, windows: npt.NDArray[np.int64]) -> Floats:
        """As if the attention of the last token stood for all."""
        self.asked += 1
        near = np.stack([self.ids >= len(self.ids) - max(int(w), 1) for w in windows])[:, None, None]
        return ((kept | near) * self.scores).sum(-1) / self.scores.sum(-1)


class PolicyContract:
    """`specs`: the policy under a few settings. `looks`: whether it asks for attention."""

    specs: ClassVar[list[str]] = []
    looks: ClassVar[bool] = True

    def policies(self) -> list[Policy]:
        return [parse(spec) for spec in self.specs]

    @pytest.mark.parametrize("tokens", [1, 2, 7, 100, 700])
    def test_shape_range_and_repeatability(self, tokens: int) -> None:
        for policy in self.policies():
            found = policy.assign(FakeView(tokens))
            classes = found.classes
            assert classes.dtype == np.int8
            assert classes.shape == ((LAYERS, HEADS, tokens) if policy.per_head else (tokens,)) and found.per_head == policy.per_head
            assert np.isin(classes, [DROP, *range(-3, 4)]).all()
            assert policy.drops or not (classes == DROP).any()
            assert found.profile is None or (found.profile.shape == (LAYERS, HEADS) and found.profile.dtype == np.uint8)
            np.testing.assert_array_equal(policy.classes(FakeView(tokens)), classes)
            assert found.dropped(LAYERS, HEADS).shape == (LAYERS, HEADS, tokens)

    def test_asks_for_attention_only_where_it_needs_it(self) -> None:
        for policy in self.policies():
            view = FakeView(50)
            policy.assign(view)
            assert bool(view.asked) == self.looks

    def test_leaves_the_view_as_it_was(self) -> None:
        for policy in self.policies():
            view = FakeView(60)
            before = view.scores.copy()
            policy.assign(view)
            np.testing.assert_array_equal(view.scores, before)

    @pytest.mark.parametrize("tokens", [1, 10, 333])
    def test_respects_its_budget_even_among_equals(self, tokens: int) -> None:
        for policy in self.policies():
            if "budget" in policy.params:
                classes = policy.classes(FakeView(tokens, equal=True))
                rest = DROP if policy.drops else policy.params["rest"]
                kept = int((classes != rest).sum())
                assert (
                    kept == max(1, classes.size * policy.number("budget") // 100)
                    or abs(kept - classes.size * policy.number("budget") / 100) < HEADS * LAYERS
                )

    def test_its_spec_restores_it(self) -> None:
        for policy in self.policies():
            again = parse(policy.spec)
            assert again.spec == policy.spec and again.params == policy.params and type(again) is type(policy)
            assert all(isinstance(v, (int, str)) for v in policy.params.values()) and set(policy.params) == set(policy.defaults)

    def test_refuses_foreign_parameters(self) -> None:
        for policy in self.policies():
            with pytest.raises(InputError, match="surprise"):
                parse(f"{policy.name}:surprise=1")
            for name in policy.params:
                with pytest.raises(InputError, match=name):
                    parse(f"{policy.name}:{name}=-99999")
                with pytest.raises(InputError, match=name):
                    parse(f"{policy.name}:{name}=much")
