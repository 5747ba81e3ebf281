"""Values to levels: which tokens the codec `transform` codes in which steps, and which it keeps raw. The encoder's own business."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs import transform_kernels
from kvstore.codecs.grouping import Floats
from kvstore.codecs.transform_ladder import PER_THREE, Ladder
from kvstore.codecs.transform_sets import RAW, STEP_CLASSES
from kvstore.codecs.transform_units import Set
from kvstore.transforms.klt import Basis

EXEMPT_CLASS = -2
TOLERANCE = 16.0  # an exempt token's error over the one expected of ordinary tokens, from where on it is kept raw
UNIT_CLASS = 24
I8 = npt.NDArray[np.int8]
Flags = npt.NDArray[np.bool_]


class Limits(NamedTuple):
    """Energies (see CalibrationRecord.exempt): above `exempt` a token gets fine steps, an error above `error` makes it raw."""

    exempt: float
    error: float


def limits_of(basis: Basis, ladder: Ladder, exempt: float, energy: float) -> Limits:
    """`energy`: the mean on the calibration text."""
    return Limits(exempt * energy, TOLERANCE * expected_error(basis, ladder))


def expected_error(basis: Basis, ladder: Ladder) -> float:
    """What coding an ordinary token costs, by the diagonal of the metric: step^2 / 12 for coefficients that are coded, the variance of the others."""
    gains = basis.gains().astype(np.float64)
    variances = np.minimum(3.0 ** ((ladder.classes - UNIT_CLASS) / (PER_THREE / 2)), 1 / 12)
    beyond = 3.0 ** ((ladder.least - UNIT_CLASS) / (PER_THREE / 2)) * (basis.dim - basis.rank) * gains.mean()
    return float(ladder.step**2 * ((variances * gains).sum() + beyond))


def centred(values: Floats, basis: Basis) -> tuple[Floats, Floats]:
    """float32 [tokens, D] less the mean, and the energy [tokens] of each, from [layers, 2, tokens, channels]."""
    x, energies = np.empty((values.shape[2], basis.dim), np.float32), np.empty(values.shape[2], np.float32)
    transform_kernels.centre(values, np.array(basis.mean), basis.weights(), x, energies)
    return x, energies


def encode(x: Floats, energies: Floats, steps: I8, basis: Basis, ladder: Ladder, limits: Limits) -> tuple[I8, list[Set]]:
    """Step class or RAW of each token, and the levels of each set. `steps` int8 [tokens] are the classes asked for."""
    exempt = ~(energies <= limits.exempt)  # NaN too: squares may overflow
    codes = np.where(exempt, np.minimum(steps, EXEMPT_CLASS), steps).astype(np.int8)
    sets = []
    for step_class in STEP_CLASSES:
        tokens = np.flatnonzero(codes == step_class)
        if not len(tokens):
            continue
        levels, bad = _levels(x if len(tokens) == len(x) else x[tokens], basis, ladder, step_class)
        if exempt[tokens].any():
            bad |= exempt[tokens] & _spoilt(x[tokens], levels, basis, ladder, step_class, limits.error)
        codes[tokens[bad]] = RAW
        if not bad.all():
            sets.append(Set(step_class, tokens[~bad], levels if not bad.any() else np.ascontiguousarray(levels[:, ~bad])))
    return codes, sets


def _levels(x: Floats, basis: Basis, ladder: Ladder, step_class: int) -> tuple[npt.NDArray[np.int16], Flags]:
    """int16 [coefficients coded, tokens], and which tokens have levels beyond the limit."""
    count = ladder.count(ladder.finest, step_class)
    with np.errstate(over="ignore", invalid="ignore"):  # such tokens are kept raw
        coefficients = basis.analysis()[:, :count].T @ x.T
    levels, beyond = np.empty(coefficients.shape, np.int16), np.zeros(len(x), np.uint8)
    per_step = np.float32(1 / float(ladder.step_of(ladder.finest, step_class)))
    transform_kernels.quantise(coefficients, per_step, np.float32(ladder.limit(ladder.finest)), levels, beyond)
    return levels, beyond.view(np.bool_)


def _spoilt(x: Floats, levels: npt.NDArray[np.int16], basis: Basis, ladder: Ladder, step_class: int, limit: float) -> Flags:
    """Tokens whose error, weighted as energies are, exceeds `limit`."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = x - (levels.T * ladder.step_of(ladder.finest, step_class)) @ basis.synthesis(len(levels))
        return ~(np.einsum("td,td,d->t", error, error, basis.weights()) <= limit)
