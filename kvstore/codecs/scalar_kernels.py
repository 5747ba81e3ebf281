"""The loops of `scalar`, compiled. They run over slices from 0, which lets the compiler use vector instructions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.jit import compiled, float32, helper, int8, int32, uint8, uint32

Array = npt.NDArray[Any]
TILE = 16  # channels transposed at a time: one cache line of float32
ESCAPE_COST = 26 << 8


@helper
def _round(values: Array, per_step: float, out: Array) -> None:
    for i in range(len(values)):
        out[i] = int32(np.rint(values[i] * per_step))


@compiled
def levels(values: Array, per_step: float, channel_major: bool, out: Array) -> None:
    """int32 [tokens * channels]: float32 `values` [tokens, channels] in steps, rounded, in the order of their runs."""
    tokens, channels = values.shape
    if not channel_major:
        _round(values.reshape(-1), per_step, out)
        return
    row = np.empty(TILE, np.int32)
    for first in range(0, channels, TILE):
        wide = min(TILE, channels - first)
        for t in range(tokens):
            _round(values[t, first : first + wide], per_step, row)
            for c in range(wide):
                out[(first + c) * tokens + t] = row[c]


@helper
def _class_of(levels: Array, bounds: Array, largest: Array, bits: Array) -> int:
    """By the mean magnitude of the fine levels; where that class has escapes, the mean may mislead and the costs decide."""
    total, top, found = 0, int32(0), 0
    for i in range(len(levels)):
        total += abs(levels[i])
    for i in range(len(levels)):
        top = max(top, abs(levels[i]))
    mean = (total << 16) // len(levels)
    while found < len(bounds) and mean > bounds[found]:
        found += 1
    return found if (top + 1) // 3 <= largest[found] else _cheapest(levels, largest, bits)


@helper
def _cheapest(levels: Array, largest: Array, bits: Array) -> int:
    least, best = 1 << 62, 0
    for candidate in range(len(largest)):
        cost = 0
        for i in range(len(levels)):
            cell = (abs(levels[i]) + 1) // 3
            cost += bits[candidate, min(cell, 127)] + (ESCAPE_COST if cell > largest[candidate] else 0)
        if cost < least:
            least, best = cost, candidate
    return best


@helper
def _split_run(levels: Array, most: int, base: Array, third: Array) -> int:
    """One run of `split`. The casts keep every step in 32 bits or less: an eighth of the time."""
    escapes = 0
    for i in range(len(levels)):
        level = levels[i]
        size = int32(abs(level))
        cell = int32(uint32(size + int32(1)) // uint32(3))
        third[i] = uint8(size - int32(3) * cell + int32(4)) if cell > int32(0) else uint8(level + int32(1))
        coded = min(cell, most)
        levels[i] = -cell if level < int32(0) else cell
        base[i] = int8(-coded) if level < int32(0) else int8(coded)
        escapes += int32(cell > most)
    return escapes


@compiled
def split(levels: Array, run: int, offsets: Array, bounds: Array, largest: Array, bits: Array, classes: Array, base: Array, third: Array) -> int:
    """Fine levels (int32, replaced by base levels) to classes, base values within their alphabets, and refinements.

    `offsets` [runs] or [0] in base steps are taken off first. `third` is as `Tables.refine` codes it. Returns the number of
    base levels that an alphabet lacks.
    """
    escapes = 0
    for r in range(len(classes)):
        first, last = r * run, min((r + 1) * run, len(levels))
        part = levels[first:last]
        if len(offsets) > 0:
            part -= int32(3) * offsets[r]
        classes[r] = _class_of(part, bounds, largest, bits)
        escapes += _split_run(part, int32(largest[classes[r]]), base[first:last], third[first:last])
    return escapes


@helper
def _restore_row(base: Array, third: Array, step: np.float32, out: Array) -> None:
    if len(third) == 0:
        for c in range(len(out)):
            out[c] = float32(int32(3) * int32(base[c])) * step
    else:
        for c in range(len(out)):
            out[c] = float32(int32(3) * int32(base[c]) + int32(third[c])) * step


@helper
def _levels_of(base: Array, third: Array, offset: int, out: Array) -> None:
    if len(third) == 0:
        for t in range(len(base)):
            out[t] = int32(3) * (int32(base[t]) + offset)
    else:
        for t in range(len(base)):
            out[t] = int32(3) * (int32(base[t]) + offset) + int32(third[t])


@compiled
def restore(base: Array, third: Array, offsets: Array, step: np.float32, channel_major: bool, out: Array) -> None:
    """float32 `out` [tokens, channels] from int8 base values and refinements ([0] for none), in fine steps of `step`."""
    tokens, channels = out.shape
    if not channel_major:
        _restore_row(base, third, step, out.reshape(-1))
        return
    tile = np.empty((TILE, tokens), np.int32)
    for first in range(0, channels, TILE):
        wide = min(TILE, channels - first)
        for c in range(wide):
            at = (first + c) * tokens
            _levels_of(base[at : at + tokens], third[at : at + tokens] if len(third) > 0 else third, offsets[first + c], tile[c])
        for t in range(tokens):
            row = out[t, first : first + wide]
            for c in range(wide):
                row[c] = float32(tile[c, t]) * step
