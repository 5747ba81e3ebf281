"""Values to levels on a device: the arithmetic of `codecs.transform_levels` in torch, all blocks of a segment in one matrix product.

Levels equal the CPU's but for coefficients that lie so near the middle of two levels that the order of a sum decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.codecs.scalar import LARGEST
from kvstore.codecs.transform_ladder import Ladder
from kvstore.codecs.transform_levels import EXEMPT_CLASS, Limits
from kvstore.codecs.transform_sets import RAW, STEP_CLASSES
from kvstore.codecs.transform_units import Set
from kvstore.transforms.klt import Basis

I8 = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Analysis:
    """What one group's values are analysed with, float32 on a device: mean [D], analysis [D, rank], synthesis [rank, D], weights [D]."""

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    weights: Tensor

    @classmethod
    def of(cls, basis: Basis, device: torch.device) -> Analysis:
        made = (basis.mean, basis.analysis(), basis.synthesis(basis.rank), basis.weights())
        return cls(*(torch.tensor(array, device=device) for array in made))

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.mean, self.analysis, self.synthesis, self.weights))


def holdable(values: Tensor) -> bool:
    """Whether a lossy codec can hold all values: none is NaN or too large."""
    return float(values.abs().amax()) <= LARGEST


def quantise(values: Tensor, steps: I8 | None, analysis: Analysis, ladder: Ladder, limits: Limits) -> tuple[I8, list[Set]]:
    """Step class or RAW of each token, and the levels of each set, as `transform_levels.encode` makes them.

    `values` [layers of the group, 2, tokens, channels] of any dtype on the device of `analysis`; `steps` int8 [tokens], the classes asked for.
    """
    x = values.float().permute(2, 0, 1, 3).flatten(1) - analysis.mean
    far = ~((x * x) @ analysis.weights <= limits.exempt)  # NaN too: squares may overflow
    exempt = far.cpu().numpy()
    asked = np.zeros(len(x), np.int8) if steps is None else steps
    codes = np.where(exempt, np.minimum(asked, EXEMPT_CLASS), asked).astype(np.int8)
    sets = []
    for step_class in STEP_CLASSES:
        tokens = np.flatnonzero(codes == step_class)
        if not len(tokens):
            continue
        mine = x if len(tokens) == len(x) else x[torch.from_numpy(tokens).to(x.device)]
        levels, bad = _levels(mine, exempt[tokens], analysis, ladder, step_class, limits)
        codes[tokens[bad]] = RAW
        if not bad.all():
            sets.append(Set(step_class, tokens[~bad], np.ascontiguousarray(levels[:, ~bad]) if bad.any() else levels))
    return codes, sets


def _levels(
    x: Tensor, exempt: npt.NDArray[np.bool_], analysis: Analysis, ladder: Ladder, step_class: int, limits: Limits
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """int16 [coefficients coded, tokens], and which tokens are to be kept raw. One wait for the device."""
    count, step = ladder.count(ladder.finest, step_class), float(ladder.step_of(ladder.finest, step_class))
    wide = torch.round((analysis.analysis[:, :count].T @ x.T) * float(np.float32(1 / step)))
    fits = wide.abs() <= float(ladder.limit(ladder.finest))  # no NaN does
    levels, bad = torch.where(fits, wide, 0).to(torch.int16), ~fits.all(0)
    if exempt.any():
        error = x - (levels.T.float() * step) @ analysis.synthesis[:count]
        spoilt = ~((error * error) @ analysis.weights <= limits.error)
        bad |= spoilt & torch.from_numpy(exempt).to(x.device)
    return levels.contiguous().cpu().numpy(), bad.cpu().numpy()


def blocks(codes: I8, sets: list[Set], block: int) -> list[tuple[I8, list[Set]]]:
    """The same cut into blocks of `block` tokens, token numbers counted from the block's first."""
    return [(codes[start : start + block], _between(sets, start, start + block)) for start in range(0, len(codes), block)]


def _between(sets: list[Set], start: int, stop: int) -> list[Set]:
    found = []
    for step_class, tokens, levels in sets:
        first, last = np.searchsorted(tokens, (start, stop))  # ascending
        if first < last:
            found.append(Set(step_class, tokens[first:last] - start, np.ascontiguousarray(levels[:, first:last])))
    return found
