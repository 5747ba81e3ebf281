"""Reconstruction importance: tokens that the model needs to repeat the segment."""

from __future__ import annotations

from typing import ClassVar

from kvstore.policies.base import STEPS, Assignment, Limits, Policy, View, share_of, top


class KVzip(Policy):
    """`budget` percent are kept, by the largest attention that a token receives while the model, asked to, repeats the segment.

    With `rest=drop` the budget is shared among all heads of all layers, as published: a head that is never needed keeps nothing. With a step class
    all heads agree, by the mean over heads and layers.
    Source: Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.
    """

    name: ClassVar[str] = "kvzip"
    defaults: ClassVar[dict[str, int | str]] = {"budget": 60, "keep": 0, "rest": 2}
    limits: ClassVar[Limits] = {**STEPS, "budget": (1, 100)}

    @property
    def per_head(self) -> bool:
        return self.drops

    def assign(self, view: View) -> Assignment:
        scores = view.reconstruction()
        if not self.drops:
            shared = scores.mean(axis=(0, 1))
            return Assignment(self.split(top(shared, share_of(self.number("budget"), len(shared)))))
        kept = top(scores.reshape(-1), share_of(self.number("budget"), scores.size))
        return Assignment(self.split(kept.reshape(scores.shape)))
