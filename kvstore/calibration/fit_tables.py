"""Scale classes and integer tables from counts of quantized coefficients; nothing here knows where they come from.

A class shift of 8 is a factor of three in the step, so one set of tables serves all tiers: a coefficient of class c is coded with table c at the
finest tier, c - 8 one tier up. Tables and classes are fitted in turns: pool the counts of each class, make its table, give each coefficient
the class whose tables code all its tiers in the fewest bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from kvstore.codecs.table_data import BASE, THIRDS

CLASSES, UNIT_CLASS, PER_THREE, TOTAL = len(BASE), 24, 8, 4096
LARGEST, ESCAPE_BITS = 127, 26
PATIENCE = 0.25  # of the price that a bit has at high rate: see `least_class`
PRIOR = 32.0  # values that a built-in table counts for; a class that nobody uses keeps the built-in
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Of n tiers (base first) and D coefficients.

    `levels` int64 [n, D, 129]: how often |level| was 0 ... 127, or more (128). `thirds` int64 [n - 1, D, 5]: cells of tier j that tier j + 1 splits:
    zero cells kept in the middle, moved outwards; other cells: inner, middle, outer.
    `energy` and `error` float64 [D]: sums of c^2 and of (c - level x step)^2 at the finest tier, in squared steps.
    """

    levels: I64
    thirds: I64
    energy: F64
    error: F64

    @property
    def tiers(self) -> int:
        return len(self.levels)

    @property
    def tokens(self) -> I64:
        counted: I64 = self.levels[0].sum(-1)
        return counted


@dataclass(frozen=True)
class Fit:
    """`classes` int64 [D] at the finest tier, `weights` uint16 [49, 128], `thirds` uint16 [49, 3], the least class coded,
    and ideal bits a token: `bits[j]` of tier j coded alone, `ladder[j]` of tiers 0 ... j together."""

    classes: I64
    weights: npt.NDArray[np.uint16]
    thirds: npt.NDArray[np.uint16]
    least: int
    bits: tuple[float, ...]
    ladder: tuple[float, ...]


def class_of(sigma: F64, step: float) -> I64:
    """The class whose standard deviation is nearest, in the logarithm."""
    with np.errstate(divide="ignore"):
        exact = UNIT_CLASS + PER_THREE * np.log(sigma / step) / math.log(3)
    return np.rint(np.clip(exact, 0, 255)).astype(np.int64)


def fit(counts: Counts, classes: I64, rounds: int = 3) -> Fit:
    """Tables for `counts`, beginning with `classes` (from standard deviations)."""
    highest = CLASSES - 1 + PER_THREE * (counts.tiers - 1)
    for number in range(rounds):
        weights = fit_weights(pooled(counts, classes))
        if number < rounds - 1:
            classes = reassigned(counts, costs(weights), highest)
    cost = costs(weights)
    least = least_class(counts, classes, cost)
    thirds = fit_thirds(counts, classes)
    bits, ladder = lengths(counts, classes, cost, third_costs(thirds), least)
    return Fit(classes, weights, thirds, least, bits, ladder)


def used(classes: I64, tier: int, tiers: int) -> I64:
    """Classes at a tier, not clamped."""
    shifted: I64 = classes - PER_THREE * (tiers - 1 - tier)
    return shifted


def clamped(classes: I64) -> I64:
    return np.clip(classes, 0, CLASSES - 1)


def pooled(counts: Counts, classes: I64) -> I64:
    """int64 [49, 129]: what each class's table codes, over all tiers."""
    total = np.zeros((CLASSES, LARGEST + 2), np.int64)
    for tier in range(counts.tiers):
        np.add.at(total, clamped(used(classes, tier, counts.tiers)), counts.levels[tier])
    return total


@cache
def _prior() -> F64:
    """[49, 129]: chances of |level| in the built-in tables."""
    chances = np.zeros((CLASSES, LARGEST + 2))
    for c, half in enumerate(BASE):
        chances[c, : len(half)] = np.array(half) * np.where(np.arange(len(half)) > 0, 2, 1) / TOTAL
    return chances


def fit_weights(counts: I64) -> npt.NDArray[np.uint16]:
    """uint16 [49, 128] from counts [49, 129] of |level|: the alphabet that codes them in the fewest bits, escapes included."""
    found = np.zeros((CLASSES, LARGEST + 1), np.uint16)
    for c in range(CLASSES):
        row = _row(counts[c] + PRIOR * _prior()[c]) if counts[c].any() else np.array(BASE[c])
        found[c, : len(row)] = row
    return found


def _row(mass: F64) -> I64:
    last = int(np.flatnonzero(mass[: LARGEST + 1] > 0.5)[-1:].max(initial=1))
    longest = min(LARGEST, last + 1)
    return min((_weights(mass, n) for n in range(1, longest + 1)), key=lambda row: float(mass @ _row_costs(row)))


def _weights(mass: F64, largest: int) -> I64:
    """12-bit weights of |level| = 0 ... largest, the last one's with all beyond; 1 each at least, the rest in proportion."""
    clipped = np.append(mass[:largest], mass[largest:].sum())
    ideal = (TOTAL - 2 * largest - 1) * clipped[1:] / clipped.sum() / 2
    whole = np.floor(ideal).astype(np.int64)
    more = round(float(ideal.sum())) - int(whole.sum())
    whole[np.argsort(whole - ideal, kind="stable")[:more]] += 1
    weights = 1 + whole
    return np.concatenate(([TOTAL - 2 * weights.sum()], weights))


def _row_costs(row: npt.NDArray[np.integer]) -> F64:
    """[129]: bits of |level|, sign included; beyond the alphabet those of its largest and an escape."""
    alphabet = row[row > 0]
    at = np.minimum(np.arange(LARGEST + 2), len(alphabet) - 1)
    bits: F64 = np.log2(TOTAL / alphabet[at].astype(np.float64)) + ESCAPE_BITS * (np.arange(LARGEST + 2) >= len(alphabet))
    return bits


def costs(weights: npt.NDArray[np.uint16]) -> F64:
    """[49, 129]."""
    return np.stack([_row_costs(row) for row in weights])


def reassigned(counts: Counts, cost: F64, highest: int) -> I64:
    """The class, 0 ... highest, that codes each coefficient in the fewest bits, summed over the tiers coded alone."""
    every = np.arange(highest + 1)
    total = np.zeros((counts.levels.shape[1], highest + 1))
    for tier in range(counts.tiers):
        total += counts.levels[tier].astype(np.float64) @ cost[clamped(used(every, tier, counts.tiers))].T
    return total.argmin(1)


def least_class(counts: Counts, classes: I64, cost: F64) -> int:
    """Below which class coding costs more bits than it saves error, at the finest tier.

    At high rate the error of a coefficient is D = step^2 / 12 = k 2^(-2 R), so one more bit saves -dD/dR = 2 ln 2 D = (ln 2 / 6) step^2: a class that
    saves less a bit would be better spent elsewhere, if the square of an error were all that counts. What small coefficients lose is their rare large
    values; at a quarter of that price the divergence is 6 % (standard 8 to 15 %) fewer bytes lower, and less still changes nothing.
    """
    saved = counts.energy - counts.error
    bits = (counts.levels[-1] * cost[clamped(classes)]).sum(1)
    gains = np.bincount(clamped(classes), saved - PATIENCE * math.log(2) / 6 * bits, CLASSES)
    above = np.cumsum(gains[::-1])[::-1]
    return int(above.argmax())


def fit_thirds(counts: Counts, classes: I64) -> npt.NDArray[np.uint16]:
    """uint16 [49, 3] as table_data.THIRDS: outer third of cell zero, each; inner and middle third of the others."""
    total = np.zeros((CLASSES, 5))
    for tier in range(counts.tiers - 1):
        np.add.at(total, clamped(used(classes, tier, counts.tiers)), counts.thirds[tier])
    outer, inner, middle = np.array(THIRDS, np.float64).T / TOTAL
    total += PRIOR * np.stack([1 - 2 * outer, 2 * outer, inner, middle, 1 - inner - middle], 1)
    zero, other = total[:, :2].sum(1), total[:, 2:].sum(1)
    half = np.minimum(1 + np.rint((TOTAL - 3) * total[:, 1] / zero / 2), TOTAL // 2 - 1)
    found = np.stack([half, *(1 + np.floor((TOTAL - 3) * total[:, i] / other) for i in (2, 3))], 1)
    return found.astype(np.uint16)


def third_costs(thirds: npt.NDArray[np.uint16]) -> F64:
    """[49, 5]: bits, in the order of Counts.thirds."""
    outer, inner, middle = thirds.astype(np.float64).T
    return np.log2(TOTAL / np.stack([TOTAL - 2 * outer, outer, inner, middle, TOTAL - inner - middle], 1))


def lengths(counts: Counts, classes: I64, cost: F64, third_cost: F64, least: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ideal bits a token of each tier coded alone, and of the tiers up to each in the ladder."""
    tokens, alone, ladder = np.maximum(counts.tokens, 1), [], [0.0]
    before = np.zeros(len(classes), bool)
    for tier in range(counts.tiers):
        now = used(classes, tier, counts.tiers)
        coded, values = now >= least, (counts.levels[tier] * cost[clamped(now)]).sum(1) / tokens
        split = (counts.thirds[tier - 1] * third_cost[clamped(now - PER_THREE)]).sum(1) / tokens if tier else np.zeros(len(classes))
        alone.append(float(values[coded].sum()))
        ladder.append(ladder[-1] + float(values[coded & ~before].sum() + split[before].sum()))
        before = coded
    return tuple(alone), tuple(ladder[1:])
