"""The step that meets a target: a divergence or a size of the finest tier, on text that the statistics have not seen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvstore.calibration.fit_tables import Fit
from kvstore.calibration.trial import Trials

DEFAULT_KL = 4e-4
TRIES, CLOSE, MISSED = 7, 0.03, 0.25  # |log| of what was found over what was asked
KL_SLOPE, BITS_SLOPE = 1.7, -0.8  # of log KL and log bits over log step, to begin with
log = logging.getLogger("kvstore")


@dataclass
class Search:
    """The step where `value(step)` is `target`, value going with a power of the step: by secants in logarithms, kept inside the bracket."""

    value: Callable[[float], float]
    target: float
    slope: float
    points: list[tuple[float, float]] = field(default_factory=list)  # (log step, log value - log target)

    def run(self, first: float) -> float:
        at = math.log(first)
        for _ in range(TRIES):
            found = self.value(math.exp(at))
            self.points.append((at, math.log(max(found, 1e-300) / self.target)))
            if abs(self.points[-1][1]) < CLOSE:
                break
            at = self._next()
        return math.exp(self.best[0])

    @property
    def best(self) -> tuple[float, float]:
        return min(self.points, key=lambda p: abs(p[1]))

    def _next(self) -> float:
        """Along the slope of the two closest points; halfway where that leaves the bracket; never further than a factor of 20."""
        rising = math.copysign(1.0, self.slope)
        low = max((p[0] for p in self.points if rising * p[1] < 0), default=-math.inf)
        high = min((p[0] for p in self.points if rising * p[1] >= 0), default=math.inf)
        at, off = self.best
        guess = at - max(-3.0, min(3.0, off / self._slope()))
        if low < guess < high or not (math.isfinite(low) and math.isfinite(high)):
            return guess
        return (low + high) / 2

    def _slope(self) -> float:
        close = sorted(self.points, key=lambda p: abs(p[1]))[:2]
        if len(close) < 2 or close[0][0] == close[1][0]:
            return self.slope
        slope = (close[1][1] - close[0][1]) / (close[1][0] - close[0][0])
        return slope if slope * self.slope > 0 and 0.2 < abs(slope / self.slope) < 5 else self.slope


def first_step(trials: Trials, kl: float) -> float:
    """From the second-order formula: half the whitened error of a prefix, spread over what follows it."""
    variances = np.concatenate([s.sigma for s in trials.solved]) ** 2
    following = sum(len(h.following) for h in trials.held)
    prefix = sum(h.at for h in trials.held)
    wanted = 2 * kl * following / max(prefix, 1)
    low, high = 1e-12, 12 * float(variances.max()) + 1e-12
    for _ in range(100):  # error = sum of min(variance, step^2 / 12), which grows with the step
        middle = math.sqrt(low * high)
        low, high = (middle, high) if np.minimum(variances, middle / 12).sum() < wanted else (low, middle)
    return math.sqrt(low)


def choose_step(trials: Trials, target_kl: float | None, target_ratio: float | None) -> float:
    """Raises nothing where the target cannot be met: the closest step found is taken, with a warning in the log."""
    first = first_step(trials, target_kl or DEFAULT_KL)
    if target_ratio is not None:
        search = Search(lambda step: _bits(trials, step), 16.0 / target_ratio, BITS_SLOPE)
    else:
        search = Search(lambda step: _kl(trials, step), target_kl or DEFAULT_KL, KL_SLOPE)
    step = search.run(first)
    if abs(search.best[1]) > MISSED:
        name = "--target-ratio" if target_ratio is not None else "--target-kl"
        log.warning("%s is not met: the finest tier is off by a factor of %.2f", name, math.exp(search.best[1]))
    return step


def _kl(trials: Trials, step: float) -> float:
    done, classes = trials.fit(step, rounds=2)
    return trials.divergence(step, done, classes, trials.tiers - 1)


def _bits(trials: Trials, step: float) -> float:
    done: Fit = trials.fit(step, rounds=2)[0]
    return done.ladder[-1] / trials.values
