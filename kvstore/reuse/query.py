"""The tokens that the question attends to most computed anew: what the answer will be read from."""

from __future__ import annotations

from typing import ClassVar

from kvstore.reuse.base import NONE, Budget, Mode, Rows, Scene, ranked


class Query(Mode):
    """The question runs once over the stored keys; the tokens with the largest attention mass over all layers are chosen.

    Source: the selection by the question's attention of "ProphetKV", arXiv 2602.02579, and of "A3: Attention-Aware Accurate KV Cache Fusion", arXiv
    2511.17560, in one stage: their further stages choose again layer by layer.
    """

    name: ClassVar[str] = "query"
    default: ClassVar[Budget] = 0.15

    def choose(self, scene: Scene) -> Rows:
        return ranked(scene.mass(), scene.moved, self.recompute) if self.recompute else NONE
