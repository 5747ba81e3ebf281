"""What to put in place of dropped values before the transform: what the values that stay make likely, so that it costs next to nothing.

The mean would not do: where one head of a token is dropped and the others stay, it breaks what ties heads and layers together, and a token that is
improbable as a whole costs more bits than the dropped values did (tests/test_policies.py). Minimised is the sum over coefficients of
c^2 / (variance + step^2), over the dropped values alone, by conjugate gradients.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.transforms.klt import Basis

Floats = npt.NDArray[np.float32]
ROUNDS = 8  # 16 save another percent of the bytes; from 30 on float32 goes astray


def fill(values: Floats, gone: npt.NDArray[np.bool_], basis: Basis, deviations: Floats, step: float) -> Floats:
    """`values` float32 [layers, 2, tokens, channels] with those `gone` (bool [layers, heads, tokens]) replaced.

    `deviations` float32 [rank] of the coefficients; `step` is that of the finest tier.
    """
    layers, kinds, tokens, channels = values.shape
    x = values.transpose(2, 0, 1, 3).reshape(tokens, -1) - basis.mean
    wide = np.broadcast_to(gone.transpose(2, 0, 1)[:, :, None, :, None], (tokens, layers, kinds, gone.shape[1], channels // gone.shape[1]))
    free = wide.reshape(tokens, -1)
    some = free.any(axis=1)
    x[some] = _likeliest(x[some] * ~free[some], free[some], basis, (1 / (deviations**2 + step**2)).astype(np.float32))
    return np.ascontiguousarray((x + basis.mean).reshape(tokens, layers, kinds, channels).transpose(1, 2, 0, 3))


def _likeliest(x: Floats, free: npt.NDArray[np.bool_], basis: Basis, weights: Floats) -> Floats:
    """`x` [tokens, D], its `free` places moved from 0 to where the weighted energy of the coefficients is least; every token by itself."""
    analysis, root = basis.analysis(), np.sqrt(weights)

    def uphill(v: Floats) -> Floats:
        return np.where(free, ((v @ analysis) * weights) @ analysis.T, 0).astype(np.float32)

    rest = -uphill(x)
    way, size = rest, _dot(rest, rest)
    enough = 1e-8 * size
    for _ in range(ROUNDS):
        bent = (way @ analysis) * root
        along = _ratio(size, _dot(bent, bent), size > enough)
        x = x + along * way
        rest = rest - along * uphill(way)
        new = _dot(rest, rest)
        way = rest + _ratio(new, size, size > enough) * way
        size = new
    return x


def _ratio(a: Floats, b: Floats, where: npt.NDArray[np.bool_]) -> Floats:
    """a / b, 0 elsewhere and where b is 0."""
    return np.divide(a, b, out=np.zeros_like(a), where=where & (b > 0))


def _dot(a: Floats, b: Floats) -> Floats:
    """float32 [tokens, 1]."""
    return np.einsum("td,td->t", a, b)[:, None]
