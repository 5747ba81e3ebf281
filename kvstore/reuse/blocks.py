"""Documents stored alone, side by side: none saw another."""

from __future__ import annotations

from typing import ClassVar

from kvstore.reuse.base import NONE, Mode, Rows, Scene


class Blocks(Mode):
    """Keys rotated to their places, nothing computed anew: the prompt under a block mask.

    Source: Ma et al., "Block-Attention for Efficient Prefilling", arXiv 2409.15355 (there with fine-tuning, which this does not need to be defined,
    but to be as good); also TurboRAG, arXiv 2410.07590.
    """

    name: ClassVar[str] = "blocks"

    def choose(self, scene: Scene) -> Rows:
        return NONE
