"""Calibrations of values drawn from known covariances, without a model: coding with them is as efficient as with real ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.calibration.files import seal
from kvstore.calibration.record import CLASSES, Calibration, CalibrationRecord
from kvstore.codecs.table_data import BASE, THIRDS
from kvstore.manifest import FORMAT
from kvstore.transforms.klt import Basis

Doubles = npt.NDArray[np.float64]


def make_calibration(
    layers: int = 3,
    kv_heads: int = 2,
    head_dim: int = 8,
    group_layers: int = 2,
    rank: int | Sequence[int] | None = None,
    tiers: int = 3,
    seed: int = 0,
    model: str = "0" * 64,
    step: float = 0.25,
) -> Calibration:
    """Digest and files are right. `rank`: coefficients kept, of every group or group by group; by default those of scale class 12 and more.

    Values to code with it: `make_values` with the same `seed`.
    """
    channels, sizes = kv_heads * head_dim, _sizes(layers, group_layers)
    bases, classes, energy = [], [], []
    for g, size in enumerate(sizes):
        wanted = rank if rank is None or isinstance(rank, int) else rank[g]
        basis, ours = _group(size, channels, wanted, step, seed + g)
        bases.append(basis)
        classes.append(ours)
        covariance = np.diagonal(_covariance(basis.dim, seed + g)[1])
        energy.append(float(basis.weights() @ covariance))
    record = CalibrationRecord(
        format=FORMAT, kind="calibration", model=model, layers=layers, kv_heads=kv_heads, head_dim=head_dim, metric="fisher",
        group_layers=group_layers, tiers=tiers, step=step, least=12, shrink=(0.1,) * (tiers - 1) + (0.04,), exempt=8.0, energy=tuple(energy),
        ranks=tuple(b.rank for b in bases), tokens=1000, seed=seed, kl=tuple(3.0**-j / 100 for j in range(tiers)), texts=("1" * 64,),
        provenance={"made": "by a test"}, files={},
    )  # fmt: skip
    return seal(Calibration("", record, tuple(bases), tuple(classes), _weights(), np.array(THIRDS, np.uint16)))


def make_values(tokens: int, layers: int = 3, kv_heads: int = 2, head_dim: int = 8, group_layers: int = 2, seed: int = 0, draw: int = 0
                ) -> npt.NDArray[np.float32]:  # fmt: skip
    """float32 [layers, 2, tokens, channels] with the mean and covariance that `make_calibration` of the same seed has; `draw` picks the sample."""
    channels, parts = kv_heads * head_dim, []
    for g, size in enumerate(_sizes(layers, group_layers)):
        mean, covariance = _covariance(size * 2 * channels, seed + g)
        noise = np.random.default_rng((seed, g, draw)).standard_normal((tokens, len(mean)))
        x = mean + noise @ np.linalg.cholesky(covariance).T
        parts.append(x.reshape(tokens, size, 2, channels).transpose(1, 2, 0, 3))
    return np.ascontiguousarray(np.concatenate(parts), np.float32)


def _sizes(layers: int, group_layers: int) -> list[int]:
    return [min(group_layers, layers - first) for first in range(0, layers, group_layers)]


def _covariance(dim: int, seed: int) -> tuple[Doubles, Doubles]:
    """Mean and covariance of a group's values: a spectrum that falls a hundredfold, turned at random."""
    random = np.random.default_rng((seed, dim))
    turn = np.linalg.qr(random.standard_normal((dim, dim)))[0]
    spectrum = 2.0 * 10.0 ** (-2 * np.arange(dim) / dim)
    return random.standard_normal(dim), (turn * spectrum**2) @ turn.T


def _metric(blocks: int, channels: int, seed: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Symmetric, positive, of about unit weight before the scale, which is 1 too: then a step means the same everywhere."""
    random = np.random.default_rng((seed, blocks, channels))
    square = random.standard_normal((blocks, channels, 2 * channels))
    metric = (square @ square.transpose(0, 2, 1)) / (2 * channels)
    scale = np.linspace(0.5, 2, blocks)
    halves = ((metric + metric.transpose(0, 2, 1)) / 2).astype(np.float16)
    return halves, scale.astype(np.float32)


def _group(size: int, channels: int, rank: int | None, step: float, seed: int) -> tuple[Basis, npt.NDArray[np.uint8]]:
    """Whiten by F^(1/2), Karhunen-Loeve, keep the leading rows of B = U' F^(-1/2)."""
    blocks, dim = 2 * size, 2 * size * channels
    mean, covariance = _covariance(dim, seed)
    metric, metric_scale = _metric(blocks, channels, seed)
    root, inverse = np.zeros((dim, dim)), np.zeros((dim, dim))
    for b in range(blocks):
        part = slice(b * channels, (b + 1) * channels)
        values, vectors = np.linalg.eigh(metric[b].astype(np.float64) * metric_scale[b])
        root[part, part] = (vectors * np.sqrt(values)) @ vectors.T
        inverse[part, part] = (vectors / np.sqrt(values)) @ vectors.T
    variances, directions = np.linalg.eigh(root @ covariance @ root)
    order = np.argsort(variances)[::-1]
    sigma = np.sqrt(variances[order])
    classes = np.clip(np.rint(24 + 8 * np.log(sigma / step) / np.log(3)), 0, 255).astype(np.uint8)
    kept = int((classes >= 12).sum()) if rank is None else rank
    rows = directions[:, order[:kept]].T @ inverse
    scale = np.abs(rows).max(axis=1)
    basis = Basis(mean.astype(np.float32), (rows / scale[:, None]).astype(np.float16), scale.astype(np.float32), metric, metric_scale)
    return basis, classes[:kept]


def _weights() -> npt.NDArray[np.uint16]:
    weights = np.zeros((CLASSES, 128), np.uint16)
    for c, row in enumerate(BASE):
        weights[c, : len(row)] = row
    return weights
