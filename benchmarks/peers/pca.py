"""Principal components of all layers with ideal entropy coding: what KVTC's transform could reach with a perfect coder.

One step for all coefficients, plain rounding; the length is that of static tables by scale class (8 per factor of 3), fitted on calibration text
and free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .base import Floats, Method, Version

CLASSES, UNIT, LARGEST = 64, 24, 511


@dataclass(frozen=True)
class Components:
    """Principal axes of each part: vectors x [tokens, D] of a part are mean + c @ axes.T. `sample`: coefficients of calibration tokens."""

    means: tuple[Floats, ...]
    axes: tuple[Floats, ...]
    samples: tuple[Floats, ...]
    together: bool

    def analyse(self, kv: Floats) -> list[Floats]:
        return [(x - m) @ a for x, m, a in zip(parts(kv, self.together), self.means, self.axes, strict=True)]

    def synthesise(self, coefficients: Sequence[Floats], shape: tuple[int, ...]) -> Floats:
        made = [m + c @ a.T for c, m, a in zip(coefficients, self.means, self.axes, strict=True)]
        layers, _, tokens, channels = shape
        rows = [x.reshape(tokens, layers, -1, channels).transpose(1, 2, 0, 3) for x in made]
        return np.ascontiguousarray(np.concatenate(rows, 1), np.float32)


def parts(kv: Floats, together: bool) -> list[Floats]:
    """[tokens, D]: keys and values of all layers apart, or as one."""
    kinds = [kv] if together else [kv[:, :1], kv[:, 1:]]
    return [x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1) for x in kinds]


def fit(documents: Sequence[Floats], together: bool, skip: int = 4, sample: int = 4096) -> Components:
    """Of the tokens of `documents` [layers, 2, tokens, channels] after the first `skip` of each."""
    found = [parts(kv[:, :, skip:], together) for kv in documents]
    means, axes, samples = [], [], []
    for rows in zip(*found, strict=True):
        x = np.concatenate(rows)
        mean = x.mean(0, dtype=np.float64)
        centred = (x - mean.astype(np.float32)).astype(np.float64)
        vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1]
        means.append(mean.astype(np.float32))
        axes.append(np.ascontiguousarray(vectors, np.float32))
        samples.append((centred[:: max(1, len(x) // sample)].astype(np.float32)) @ axes[-1])
    return Components(tuple(means), tuple(axes), tuple(samples), together)


@dataclass(frozen=True)
class Pca(Method):
    components: Components
    step: float

    @property
    def name(self) -> str:
        return "PCA, ideal coder, K with V" if self.components.together else "PCA, ideal coder, K and V apart"

    @property
    def settings(self) -> Sequence[str]:
        return [f"step {self.step:g}"]

    @cached_property
    def costs(self) -> tuple[list[Floats], Floats]:
        """Class of each coefficient per part, and bits [CLASSES, LARGEST + 1] of |level| with its sign."""
        counts = np.full((CLASSES, LARGEST + 1), 1e-3)
        classes = []
        for sample in self.components.samples:
            spread = np.sqrt((sample.astype(np.float64) ** 2).mean(0)) / self.step
            chosen = np.clip(np.rint(UNIT + 8 * np.log(np.maximum(spread, 1e-9)) / np.log(3)), 0, CLASSES - 1).astype(np.int64)
            levels = np.minimum(np.abs(np.rint(sample / self.step)), LARGEST).astype(np.int64)
            np.add.at(counts, (np.broadcast_to(chosen, levels.shape), levels), 1)
            classes.append(chosen)
        bits = -np.log2(counts / counts.sum(1, keepdims=True))
        bits[:, 1:] += 1
        return classes, bits

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        classes, bits = self.costs
        levels = [np.rint(c / self.step) for c in self.components.analyse(kv)]
        size = sum(float(bits[c, np.minimum(np.abs(q), LARGEST).astype(np.int64)].sum()) for c, q in zip(classes, levels, strict=True)) / 8
        back = self.components.synthesise([(q * self.step).astype(np.float32) for q in levels], kv.shape)
        return [Version(back, {"all": size})]
