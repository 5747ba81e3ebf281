"""The tokens whose keys differ most from the stored ones computed anew: those that the missing documents before them changed."""

from __future__ import annotations

from typing import ClassVar

from kvstore.reuse.base import NONE, Budget, Mode, Rows, Scene, ranked

CHECK_LAYER = 1


class CacheBlend(Mode):
    """All moved tokens pass the layers before the check layer; there those with the largest deviation of keys are chosen for the layers from it on.

    Source: Yao et al., "CacheBlend: Fast Large Language Model Serving for RAG with Cached Knowledge Fusion", arXiv 2405.16444: a share of 15 %,
    chosen at layer 1, as its authors' LMCache does by keys (their research code by values). A lossy tier's error is in the deviation too.
    """

    name: ClassVar[str] = "cacheblend"
    default: ClassVar[Budget] = 0.15

    def choose(self, scene: Scene) -> Rows:
        if not self.recompute:
            return NONE
        return ranked(scene.deviation(min(CHECK_LAYER, scene.layers - 1)), scene.moved, self.recompute)
