"""A prompt as reuse modes see it, over a live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvstore.errors import IncompatibleError
from kvstore.families.assemble import dynamic_cache
from kvstore.families.attention import observing
from kvstore.families.capture import forward
from kvstore.families.recompute import Recomputer
from kvstore.families.twin import twin_of
from kvstore.reuse.base import Mode, Rows, Scores

KV = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LiveScene:
    """`ids` int64 [T] of the cached tokens, `kv` their keys and values per layer, [1, kv_heads, T, width], rotated to their places.

    `moved`: rows of documents that were stored alone. `absent`: int64, rows that nothing is stored of and that are computed in any case.
    `question`: the ids after them, from position `at`. `masked`: keys may be NaN, where a policy dropped tokens.
    """

    recomputer: Recomputer
    ids: Tensor
    kv: Sequence[KV]
    moved: tuple[range, ...]
    absent: Tensor
    question: tuple[int, ...]
    at: int
    masked: bool = False

    @property
    def layers(self) -> int:
        return len(self.kv)

    def deviation(self, layer: int) -> Scores:
        rows = torch.cat([torch.tensor([i for rows in self.moved for i in rows], dtype=torch.long), self.absent]).sort().values
        found = torch.zeros(len(self.ids))
        if len(rows):
            fresh, _ = self.recomputer.fresh(self.ids, rows, self.kv, layer)
            off = (fresh[0].float() - self.kv[layer][0][0, :, rows].float()).square()
            found[rows] = off.nan_to_num(0.0).sum((0, 2)).cpu()  # NaN: a dropped token, of which nothing is known to deviate
        return found.numpy()

    def mass(self) -> Scores:
        """Raises IncompatibleError where the model's attention cannot be observed, or tokens are missing."""
        if self.masked:
            raise _unobserved("the tier has dropped tokens")
        present = torch.ones(len(self.ids), dtype=torch.bool)
        present[self.absent] = False
        found = torch.zeros(len(self.ids))
        try:
            found[present] = self._observed(present)
        except IncompatibleError as error:
            raise _unobserved(error.message) from error
        return found.numpy()

    def _observed(self, present: Tensor) -> Tensor:
        """float32 [present tokens]: attention that the question pays to each."""
        summed = torch.zeros(int(present.sum()))
        cache = dynamic_cache(self.recomputer.model.config, self._present(present))

        def take(layer: int, weights: Tensor, row: int) -> None:
            if row < len(summed):
                raise IncompatibleError(f"layer {layer} looks back over {row} of {len(summed)} tokens")
            summed.add_(weights[..., : len(summed)].sum((0, 1, 2)).cpu())

        model, positions = twin_of(self.recomputer.model), torch.arange(self.at, self.at + len(self.question))
        with observing(model, take):  # of the twin: other threads may generate with the model itself
            forward(model, torch.tensor([self.question]), positions[None], cache)
        return summed

    def _present(self, present: Tensor) -> Sequence[KV]:
        """The tensors as they are, or copies without the rows that hold nothing yet."""
        if present.all():
            return self.kv
        return [(keys[:, :, present.to(keys.device)], values[:, :, present.to(values.device)]) for keys, values in self.kv]


def _unobserved(why: str) -> IncompatibleError:
    return IncompatibleError(
        f"reuse='query' cannot observe the question's attention: {why}", remedy="use reuse='epic' or reuse='cacheblend'", code="recompute"
    )


def recompute_chosen(mode: Mode, scene: LiveScene) -> Rows:
    """Compute anew what the mode chooses, and what nothing is stored of, in place. The rows, ascending."""
    rows = np.union1d(mode.choose(scene), scene.absent.numpy())
    scene.recomputer.run(scene.ids, torch.from_numpy(rows), scene.kv)
    return rows
