"""Heavy hitters: tokens that later tokens have looked at most, and the most recent ones."""

from __future__ import annotations

from typing import ClassVar

from kvstore.policies.base import STEPS, Assignment, Limits, Policy, View, recent, share_of, top


class H2O(Policy):
    """`budget` percent of the tokens are kept: `recent` percent of these are the last ones, the others those with the most accumulated attention.

    With `rest=drop` each KV head keeps its own, as published. With a step class all heads agree, by the sum over heads and layers.
    Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048 (half of the
    budget for each kind). Attention is that of the segment's own tokens: the question is not known when a document is compiled.
    """

    name: ClassVar[str] = "h2o"
    defaults: ClassVar[dict[str, int | str]] = {"budget": 30, "keep": 0, "recent": 50, "rest": 1}
    limits: ClassVar[Limits] = {**STEPS, "budget": (1, 100), "recent": (0, 100)}

    @property
    def per_head(self) -> bool:
        return self.drops

    def assign(self, view: View) -> Assignment:
        tokens = len(view.ids)
        budget = share_of(self.number("budget"), tokens)
        late = recent(tokens, budget * self.number("recent") // 100)
        mass = view.mass() if self.drops else view.mass().sum(axis=(0, 1))
        mass = mass.copy()
        mass[..., late] = -1.0  # kept anyway: they must not use up the heavy hitters' share
        return Assignment(self.split(top(mass, budget - int(late.sum())) | late))
