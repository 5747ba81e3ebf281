"""Writes `table_data.py`: how likely each quantized value of a scale class is. Run it to make the tables anew.

    python -m kvstore.codecs.make_tables > kvstore/codecs/table_data.py

A class c stands for values of standard deviation 3 ** ((c - 24) / 8) steps: eight classes for a factor of three. Their
density is a generalised Gaussian of exponent 1.6, between the Gaussian that the keys or values of one group resemble and
the heavier tails of other models. Probabilities become 12-bit weights, one to each value and the rest in proportion;
an alphabet ends where a longer one would cost more than the escapes it saves.
"""

from __future__ import annotations

import math
import sys

CLASSES, UNIT_CLASS, PER_THREE, TIERS = 49, 24, 8, 3
EXPONENT, ESCAPE_BITS, LARGEST = 1.6, 26, 127
TOTAL = 4096
STEPS, WIDTH = 400, 8  # grid of the integral: points a standard deviation, standard deviations

Grid = list[float]


def tail_grid() -> Grid:
    """P(X > i / STEPS) for a generalised Gaussian X of variance 1, by Simpson's rule."""
    scale = math.sqrt(math.gamma(1 / EXPONENT) / math.gamma(3 / EXPONENT))
    factor = EXPONENT / (2 * scale * math.gamma(1 / EXPONENT))

    def density(x: float) -> float:
        return factor * math.exp(-((x / scale) ** EXPONENT))

    h, tail, grid = 1 / STEPS, 0.0, [0.0]
    for i in range(WIDTH * STEPS - 1, -1, -1):
        tail += h / 6 * (density(i * h) + 4 * density((i + 0.5) * h) + density((i + 1) * h))
        grid.append(tail)
    return grid[::-1]


def beyond(grid: Grid, x: float) -> float:
    """P(X > x), linear between the points of the grid."""
    at = min(x * STEPS, len(grid) - 1.001)
    low = int(at)
    return grid[low] + (at - low) * (grid[low + 1] - grid[low])


def deviation(scale_class: int) -> float:
    """Standard deviation in steps."""
    return float(3 ** ((scale_class - UNIT_CLASS) / PER_THREE))


def edges_of(grid: Grid, scale_class: int, count: int) -> list[float]:
    """P(value > m) for m = 0, 1 ... count - 1, values being rounded to whole steps."""
    return [beyond(grid, (m + 0.5) / deviation(scale_class)) for m in range(count)]


def weights_up_to(edges: list[float], largest: int) -> list[int]:
    """Weights of |value| = 0 ... largest; they sum to 4,096 with every value but 0 counted twice."""
    free = TOTAL - 2 * largest - 1
    weights = [1 + round(free * (edges[m - 1] - edges[m])) for m in range(1, largest + 1)]
    return [TOTAL - 2 * sum(weights), *weights]


def cost(edges: list[float], weights: list[int]) -> float:
    """Bits a value, escapes included: they are coded as the largest value and corrected elsewhere."""
    chances = [1 - 2 * edges[0]] + [2 * (edges[m - 1] - edges[m]) for m in range(1, len(weights))]
    escapes = 2 * edges[len(weights) - 1]
    return sum(p * math.log2(TOTAL / w) for p, w in zip(chances, weights, strict=True)) + escapes * (math.log2(TOTAL / weights[-1]) + ESCAPE_BITS)


def base_weights(grid: Grid, scale_class: int) -> list[int]:
    """The cheapest of the alphabets."""
    edges = edges_of(grid, scale_class, LARGEST + 1)
    return min((weights_up_to(edges, largest) for largest in range(1, LARGEST + 1)), key=lambda weights: cost(edges, weights))


def mean_magnitude(grid: Grid, scale_class: int) -> int:
    """Mean |value| times 65,536."""
    return round(65536 * 2 * sum(edges_of(grid, scale_class, 1 + int(WIDTH * deviation(scale_class)))))


def thirds(grid: Grid, scale_class: int) -> tuple[int, int, int]:
    """A cell split in three: weight of each outer third of cell zero; of the inner and of the middle third of the others."""
    unit = deviation(scale_class)
    outer = (beyond(grid, 1 / 6 / unit) - beyond(grid, 1 / 2 / unit)) / (1 - 2 * beyond(grid, 1 / 2 / unit))
    cuts = [[beyond(grid, (m - 1 / 2 + k / 3) / unit) for k in range(4)] for m in range(1, LARGEST + 1)]
    parts = [sum(c[k] - c[k + 1] for c in cuts) for k in range(3)]
    inner, middle = (parts[0] / sum(parts), parts[1] / sum(parts)) if sum(parts) > 0 else (1.0, 0.0)
    return 1 + round((TOTAL - 3) * outer), 1 + round((TOTAL - 3) * inner), 1 + round((TOTAL - 3) * middle)


def source() -> str:
    """The text of table_data.py."""
    grid = tail_grid()
    lines = [
        '"""Made by make_tables.py; see there. Never changed: records depend on it."""',
        "",
        "from __future__ import annotations",
        "",
        "# fmt: off",
    ]
    lines += ["# per scale class: 12-bit weights of |value| = 0, 1, 2 ...", "BASE: tuple[tuple[int, ...], ...] = ("]
    for scale_class in range(CLASSES):
        lines += wrapped(base_weights(grid, scale_class))
    lines += [
        ")",
        "# per scale class: outer third of cell zero; inner and middle third of the other cells",
        "THIRDS: tuple[tuple[int, int, int], ...] = (",
    ]
    lines += ["    " + " ".join(f"{thirds(grid, c)}," for c in range(at, min(at + 5, CLASSES))) for at in range(0, CLASSES, 5)]
    lines += [")", "# mean |value| times 65,536 per scale class, and on for finer tiers", "MEANS: tuple[int, ...] = ("]
    means = [mean_magnitude(grid, c) for c in range(CLASSES + PER_THREE * (TIERS - 1))]
    lines += ["    " + " ".join(f"{mean}," for mean in means[at : at + 10]) for at in range(0, len(means), 10)]
    return "\n".join([*lines, ")", ""])


def wrapped(weights: list[int]) -> list[str]:
    """A tuple in source, 24 weights a line."""
    rows = [", ".join(map(str, weights[at : at + 24])) for at in range(0, len(weights), 24)]
    ends = ["," for _ in rows[1:]] + ["),"]
    return [("     " if at else "    (") + row + end for at, (row, end) in enumerate(zip(rows, ends, strict=True))]


if __name__ == "__main__":
    sys.stdout.write(source())
