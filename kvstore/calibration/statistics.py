"""Mean and covariance of each group of layers, over ordinary tokens: streaming, in float64, one token list at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_EXEMPT = 16.0  # times the mean energy; ordinary tokens stay below 4
QUANTILE, MARGIN = 0.95, 4.0  # the first tokens of short sequences are a few in a hundred: the quantile must not see them
FLOAT64_DIM = 2048  # above, products are formed in float32 and added up in float64


def default_group_layers(layers: int, channels: int) -> int:
    """As many layers as keep a group within 8,192 values a token, and from 12 layers on at most a quarter of all."""
    fitting = max(1, 8192 // (2 * channels))
    return min(layers, fitting) if layers < 12 else min(layers // 4, fitting)


@dataclass(frozen=True)
class Grouping:
    """Runs of `size` of `layers` layers; the last may be shorter."""

    layers: int
    size: int

    def __iter__(self) -> Iterator[slice]:
        return (slice(first, min(first + self.size, self.layers)) for first in range(0, self.layers, self.size))

    def __len__(self) -> int:
        return -(-self.layers // self.size)

    def split(self, x: Tensor) -> list[Tensor]:
        """x [tokens, layers, 2, channels] as one [tokens, D] a group."""
        return [x[:, part].flatten(1) for part in self]


@dataclass(frozen=True)
class Ordinary:
    """What tells ordinary tokens from exempt ones before means are known: `centre` [layers, 2, channels], `energy` [groups], `limit` x energy."""

    grouping: Grouping
    weights: Tensor
    centre: Tensor
    energy: Tensor
    limit: float

    def energies(self, x: Tensor) -> Tensor:
        """[tokens, groups]: over the mean of ordinary tokens."""
        return energies(x, self.grouping, self.weights, self.centre) / self.energy

    def kept(self, x: Tensor) -> Tensor:
        """bool [tokens, groups]."""
        return self.energies(x) <= self.limit


def energies(x: Tensor, grouping: Grouping, weights: Tensor, centre: Tensor) -> Tensor:
    """[tokens, groups]: sum over channels of diag(F) (x - centre)^2."""
    weighted = (x - centre) ** 2 * weights
    return torch.stack([weighted[:, part].flatten(1).sum(1) for part in grouping], 1)


def ordinary(x: Tensor, grouping: Grouping, weights: Tensor) -> Ordinary:
    """From a first sample x [tokens, layers, 2, channels]. Medians first: one massive token in a hundred would move the means.

    `weights` float32 [layers, 2, channels] is the diagonal of F. The limit is 16 times the mean, or four times what 95 of 100 tokens stay below.
    """
    centre = x.median(0).values
    found = energies(x, grouping, weights, centre)
    typical = found.median(0).values.clamp_min(torch.finfo(torch.float32).tiny)
    for _ in range(3):
        kept = (found <= LEAST_EXEMPT * typical).float()
        typical = ((found * kept).sum(0) / kept.sum(0).clamp_min(1)).clamp_min(torch.finfo(torch.float32).tiny)
    usual = torch.quantile(found / typical, QUANTILE, dim=0)
    return Ordinary(grouping, weights, centre, typical, max(LEAST_EXEMPT, MARGIN * float(usual.max())))


@dataclass
class Moments:
    """Of one group: `mean` float64 [D], `covariance` float64 [D, D], over `tokens` ordinary tokens; `exempt` were left out."""

    mean: Tensor
    covariance: Tensor
    tokens: int
    exempt: int


def moments(xs: Iterable[Tensor], chosen: Ordinary) -> list[Moments]:
    """One a group. Sums are taken about the first sample's centre, so that nothing cancels."""
    centres = chosen.grouping.split(chosen.centre[None])
    found = [Moments(torch.zeros(c.shape[1], dtype=torch.float64, device=c.device), _square(c), 0, 0) for c in centres]
    for x in xs:
        kept = chosen.kept(x)
        for g, part in enumerate(chosen.grouping.split(x - chosen.centre)):
            _add(found[g], part[kept[:, g]])
            found[g].exempt += int((~kept[:, g]).sum())
    for one, centre in zip(found, centres, strict=True):
        _finish(one, centre[0])
    return found


def _square(centre: Tensor) -> Tensor:
    return torch.zeros(centre.shape[1], centre.shape[1], dtype=torch.float64, device=centre.device)


def _add(sums: Moments, x: Tensor) -> None:
    sums.tokens += len(x)
    sums.mean += x.double().sum(0)
    if x.shape[1] <= FLOAT64_DIM:
        wide = x.double()
        sums.covariance.addmm_(wide.T, wide)
    else:
        sums.covariance += x.T @ x


def _finish(sums: Moments, centre: Tensor) -> None:
    offset = sums.mean / max(sums.tokens, 1)
    sums.covariance /= max(sums.tokens, 1)
    sums.covariance.addr_(offset, offset, alpha=-1.0)
    sums.mean = centre.double() + offset
