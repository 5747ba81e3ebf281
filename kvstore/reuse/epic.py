"""The first tokens of each moved document computed anew: where attention sinks lie that each document grew for itself."""

from __future__ import annotations

from typing import ClassVar

from kvstore.reuse.base import Budget, Mode, Rows, Scene, leading


class Epic(Mode):
    """`recompute` tokens from each document's beginning (or that share of it), whatever they are: nothing has to be measured first.

    Source: LegoLink of Hu et al., "EPIC: Efficient Position-Independent Caching for Serving Large Language Models", arXiv 2410.15332 (up to 32).
    """

    name: ClassVar[str] = "epic"
    default: ClassVar[Budget] = 16

    def choose(self, scene: Scene) -> Rows:
        return leading(scene.moved, self.recompute)
