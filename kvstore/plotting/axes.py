"""Logarithmic axes: their ends, their ticks, and where a value stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """From `base ** low` to `base ** high`; `ticks` are the whole powers in it."""

    base: int
    low: int
    high: int

    @classmethod
    def around(cls, values: Sequence[float], base: int) -> Axis:
        """The whole powers around positive values, one step wide at least."""
        low, high = (math.log(f(values), base) for f in (min, max))
        first = math.floor(low + 1e-9)
        return cls(base, first, max(math.ceil(high - 1e-9), first + 1))

    @property
    def ticks(self) -> list[float]:
        step = -(-(self.high - self.low) // 8)  # labels stay readable
        return [float(self.base) ** n for n in range(self.low, self.high + 1, step)]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (math.log(value, self.base) - self.low) / (self.high - self.low)
