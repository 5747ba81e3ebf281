"""The loops of `transform`, compiled. Levels lie coefficient by coefficient: [coefficients, tokens of a set]."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.jit import compiled, float32, helper, int8, int32, uint8, uint16, uint32
from kvstore.codecs.sparse import CHUNK, TILE, accumulate

Array = npt.NDArray[Any]
TOKENS = 64  # tokens listed at a time: their lines of the lists stay in the L1 cache


@helper
def _difference(values: Array, mean: Array, weights: Array, out: Array, energy: Array) -> None:
    for c in range(len(out)):
        out[c] = values[c] - mean[c]
    for c in range(len(out)):
        energy[c] += weights[c] * out[c] * out[c]


@compiled
def centre(values: Array, mean: Array, weights: Array, out: Array, energies: Array) -> None:
    """float32 `out` [tokens, D] = `values` [layers, 2, tokens, channels] less `mean` [D]; `energies` [tokens], their squares by `weights` [D]."""
    layers, kinds, tokens, channels = values.shape
    energy = np.empty(channels, np.float32)
    for t in range(tokens):
        energy[:] = float32(0)
        for plane in range(layers * kinds):
            first, last = plane * channels, (plane + 1) * channels
            row = values[plane // kinds, plane % kinds, t]
            _difference(row, mean[first:last], weights[first:last], out[t, first:last], energy)
        energies[t] = energy.sum()


@helper
def _quantise_row(values: Array, per_step: np.float32, limit: np.float32, out: Array, beyond: Array) -> None:
    for t in range(len(out)):
        level = np.rint(values[t] * per_step)
        fits = abs(level) <= limit  # no NaN does
        out[t] = np.int16(level) if fits else np.int16(0)
        beyond[t] |= uint8(not fits)


@compiled
def quantise(values: Array, per_step: np.float32, limit: np.float32, out: Array, beyond: Array) -> None:
    """int16 `out` [coefficients, tokens]: float32 `values` in steps, rounded. `beyond` uint8 [tokens] becomes 1 where one exceeds `limit`."""
    for k in range(len(out)):
        _quantise_row(values[k], per_step, limit, out[k], beyond)


@helper
def _coarsen_row(levels: Array, cells: Array, thirds: Array) -> None:
    for t in range(len(levels)):
        level = levels[t]
        size = uint16(abs(level))
        cell = uint16((size + uint16(1)) // uint16(3))
        thirds[t] = uint8(size - uint16(3) * cell + uint16(4)) if cell > uint16(0) else uint8(level + np.int16(1))
        cells[t] = -np.int16(cell) if level < 0 else np.int16(cell)


@compiled
def coarsen(levels: Array, cells: Array, thirds: Array) -> None:
    """Levels (int16) of a tier to those of the tier below and to the symbols (uint8) that `Tables.refine` codes; all [coefficients, tokens]."""
    for k in range(len(cells)):
        _coarsen_row(levels[k], cells[k], thirds[k])


@helper
def _clip_row(levels: Array, most: Any, out: Array) -> Any:
    missed = 0
    for t in range(len(levels)):
        out[t] = int8(min(max(levels[t], -most), most))
        missed += int32(abs(levels[t]) > most)
    return missed


@compiled
def clip(levels: Array, largest: Array, out: Array) -> int:
    """int8 `out`: int16 `levels` within the alphabets, `largest` int64 [coefficients]. Returns how many lay outside."""
    missed = 0
    for k in range(len(out)):
        missed += _clip_row(levels[k], np.int16(largest[k]), out[k])
    return missed


@helper
def _refine_row(levels: Array, thirds: Array) -> None:
    for t in range(len(levels)):
        levels[t] = np.int16(3) * levels[t] + np.int16(thirds[t])


@compiled
def refine(levels: Array, thirds: Array) -> None:
    """int16 `levels` [n] of a tier become those of the next."""
    _refine_row(levels, thirds)


@helper
def _sign_row(levels: Array, out: Array) -> None:
    for t in range(len(levels)):
        out[t] = int8(levels[t] > np.int16(0)) - int8(levels[t] < np.int16(0))


@compiled
def signs(levels: Array, out: Array) -> None:
    """int8 [n]: all that the models of thirds want to know of int16 `levels` [n]."""
    _sign_row(levels, out)


@helper
def _collect_row(levels: Array, k: int, index: Array, found: Array, filled: Array) -> None:
    """A branch would be mispredicted at every other level: write always, and move on where there was something to write."""
    for t in range(len(levels)):
        level, at = levels[t], filled[t]
        index[t, at] = k
        found[t, at] = level
        filled[t] = at + uint32(level != np.int16(0))


@helper
def _scale_row(found: Array, step: np.float32, one: np.float32, out: Array) -> None:
    for i in range(len(out)):
        level = found[i]
        size = float32(level) * step
        size = one if level == np.int16(1) else size
        out[i] = -one if level == np.int16(-1) else size


@compiled
def gather(levels: Array, tokens: Array, step: np.float32, one: np.float32, starts: Array, index: Array, values: Array) -> None:
    """Each token's coefficients other than zero, by chunks of `CHUNK` coefficients.

    `levels` int16 [coefficients, set] of the `tokens` int64 [set]; a level is worth `step` times itself, plus or minus one is worth `one`.
    Token t has uint16 `index[t, i]` and float32 `values[t, i]`, those of chunk c at i = starts[t, c] ... starts[t, c + 1] - 1 (int32).
    """
    count, chunks, filled = len(levels), starts.shape[1] - 1, np.empty(TOKENS, np.uint32)
    some_index, found = np.empty((TOKENS, CHUNK), np.uint16), np.empty((TOKENS, CHUNK), np.int16)
    for first in range(0, len(tokens), TOKENS):
        some = min(TOKENS, len(tokens) - first)
        for t in range(some):
            starts[tokens[first + t], 0] = 0
        for chunk in range(chunks):
            filled[:] = 0
            for k in range(chunk * CHUNK, min((chunk + 1) * CHUNK, count)):
                _collect_row(levels[k, first : first + some], k, some_index, found, filled)
            for t in range(some):
                token = tokens[first + t]
                begin = starts[token, chunk]
                end = begin + filled[t]
                index[token, begin:end] = some_index[t, : end - begin]
                _scale_row(found[t], step, one, values[token, begin:end])
                starts[token, chunk + 1] = end


@helper
def _copy(values: Array, out: Array) -> None:
    for i in range(len(out)):
        out[i] = values[i]


@compiled
def synthesise(starts: Array, index: Array, values: Array, mean: Array, tiles: Array, out: Array) -> None:
    """float32 `out` [layers, 2, tokens, channels] = `mean` [D] + the listed values times their rows, of which `tiles` float32
    [tiles, coefficients, TILE] holds the columns side by side. The rows of `out` are contiguous.

    A tile of a chunk of rows stays in the L1 cache while all tokens go over it.
    """
    layers, kinds, tokens, channels = out.shape
    total, sums, middle = layers * kinds * channels, np.empty((tokens, TILE), np.float32), np.zeros(TILE, np.float32)
    for tile in range(len(tiles)):
        first, last = tile * TILE, min((tile + 1) * TILE, total)
        _copy(mean[first:last], middle[: last - first])
        for t in range(tokens):
            _copy(middle, sums[t])
        for chunk in range(starts.shape[1] - 1):
            for t in range(tokens):
                begin, end = starts[t, chunk], starts[t, chunk + 1]
                if end > begin:
                    accumulate(tiles[tile], index[t, begin:end], values[t, begin:end], sums[t])
        while first < last:
            plane = first // channels
            stop, at = min(last, (plane + 1) * channels), first - tile * TILE
            rows = out[plane // kinds, plane % kinds]
            for t in range(tokens):
                _copy(sums[t, at : at + stop - first], rows[t, first - plane * channels : stop - plane * channels])
            first = stop
