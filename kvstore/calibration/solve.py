"""From metric and covariance to a basis: whiten, diagonalise, order by variance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.calibration.metric import regularised
from kvstore.calibration.statistics import FLOAT64_DIM, Moments
from kvstore.transforms.klt import Basis

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric16:
    """Blocks of F as they are stored: `halves` float16 [blocks, C, C] times `scale` float32 [blocks]; `wide` is their product, float64."""

    halves: Tensor
    scale: Tensor
    wide: Tensor


def stored_metric(blocks: Tensor) -> Metric16:
    """Regularised blocks [..., C, C] rounded to float16; more is added to the diagonal of those that rounding makes indefinite.

    The analysis uses the rounded blocks, so they are what must be whitened by.
    """
    flat = blocks.flatten(0, -3)
    wide = regularised(flat)
    for _ in range(8):
        scale = wide.abs().amax((-2, -1)).float()
        halves = (wide / scale.double()[:, None, None]).half()
        rounded = halves.double() * scale.double()[:, None, None]
        means = wide.diagonal(dim1=-2, dim2=-1).mean(-1)
        weak = torch.linalg.eigvalsh(rounded)[:, 0] < 1e-3 * means
        if not bool(weak.any()):
            break
        wide = wide + (0.03 * means * weak)[:, None, None] * torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    return Metric16(halves, scale, rounded)


@dataclass(frozen=True)
class Solved:
    """A group's basis over all its dimensions, most varying coefficient first, and their standard deviations `sigma` float64 [D]."""

    basis: Basis
    sigma: F64


def solve(sums: Moments, metric: Metric16, part: slice) -> Solved:
    """The basis of one group; `part` are its blocks of `metric`. The covariance is overwritten."""
    blocks = metric.wide[part]
    values, vectors = torch.linalg.eigh(blocks)
    root = values.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    half, inverse = ((vectors * r[:, None]) @ vectors.mT for r in (root, 1 / root))
    whitened = _sandwich(sums.covariance, half)
    variances, directions = torch.linalg.eigh(whitened if len(whitened) <= FLOAT64_DIM else whitened.float())
    directions = directions.flip(1)
    rows = _rows(directions, inverse)
    scale = rows.abs().amax(1).clamp_min(1e-30)
    basis = Basis(
        mean=sums.mean.float().cpu().numpy(),
        rows=(rows / scale[:, None]).half().cpu().numpy(),
        scale=scale.float().cpu().numpy(),
        metric=metric.halves[part].cpu().numpy(),
        metric_scale=metric.scale[part].cpu().numpy(),
    )
    return Solved(basis, variances.flip(0).double().clamp_min(0).sqrt().cpu().numpy())


def _sandwich(covariance: Tensor, half: Tensor) -> Tensor:
    """Block-diagonal `half` on both sides of `covariance`, in its memory."""
    channels = half.shape[-1]
    for block, one in enumerate(half):
        part = slice(block * channels, (block + 1) * channels)
        covariance[part] = one @ covariance[part]
    for block, one in enumerate(half):
        part = slice(block * channels, (block + 1) * channels)
        covariance[:, part] = covariance[:, part] @ one
    return (covariance + covariance.T) / 2


def _rows(directions: Tensor, inverse: Tensor) -> Tensor:
    """U' F^(-1/2): [D, D]."""
    rows, channels = torch.empty_like(directions.T, memory_format=torch.contiguous_format), inverse.shape[-1]
    for block, one in enumerate(inverse):
        part = slice(block * channels, (block + 1) * channels)
        rows[:, part] = directions[part].T @ one.to(directions.dtype)
    return rows


def truncated(basis: Basis, order: npt.NDArray[np.int64]) -> Basis:
    """The rows of `order`, in that order."""
    return Basis(basis.mean, np.ascontiguousarray(basis.rows[order]), basis.scale[order], basis.metric, basis.metric_scale)
