"""The loops of `cachegen`, compiled: tables, and the arithmetic coder of LMCache (32-bit range, 16-bit frequencies), bit for bit.

A table of a row has one entry more than symbols: the frequency below each, and 65,535, which the coder takes for 65,536. All numbers are
below 2**49 in int64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.jit import compiled, helper, int64, uint8, uint16

Array = npt.NDArray[Any]
TOP, HALF, QUARTER, THREE = (1 << 32) - 1, 1 << 31, 1 << 30, 3 << 30
WORST = 18  # bits that a symbol can take: a range above 2**30 is cut to 2**14 or more


@compiled
def tables(symbols: Array, out: Array) -> None:
    """uint16 `out` [rows, width + 1] from uint8 `symbols` [rows, n]: every symbol has a share of at least one."""
    rows, count = symbols.shape
    width = out.shape[1] - 1
    counts = np.empty(width, np.int64)
    for r in range(rows):
        counts[:] = 0
        for i in range(count):
            counts[symbols[r, i]] += 1
        below = 0
        for s in range(width + 1):
            out[r, s] = uint16((65535 - width) * below // count + s)
            if s < width:
                below += counts[s]


@helper
def _emit(out: Array, at: int, bit: int, pending: int) -> int:
    """The bit and `pending` of its opposite, from bit `at` on; `out` holds zeros there."""
    for i in range(pending + 1):
        if (bit == 1) == (i == 0):
            out[at >> 3] |= uint8(128 >> (at & 7))
        at += 1
    return at


@helper
def _encode_row(symbols: Array, row: int, first: int, last: int, table: Array, out: Array, at: int) -> int:
    """The stream of symbols first to last - 1 from bit `at` on; the bit after it."""
    low, high, pending, top = int64(0), int64(TOP), 0, len(table) - 2
    for i in range(first, last):
        s = symbols[row, i]
        span = high - low + 1
        above = int64(65536) if s == top else int64(table[s + 1])
        high = low - 1 + ((span * above) >> 16)
        low = low + ((span * int64(table[s])) >> 16)
        while True:
            if high < HALF or low >= HALF:
                at = _emit(out, at, 1 if low >= HALF else 0, pending)
                pending = 0
                low, high = (low << 1) & TOP, ((high << 1) | 1) & TOP
            elif low >= QUARTER and high < THREE:
                pending += 1
                low, high = (low - QUARTER) << 1, ((high - QUARTER) << 1) | 1
            else:
                break
    return _emit(out, at, 0 if low < QUARTER else 1, pending + 1)


@compiled
def encode(symbols: Array, first: int, last: int, cdf: Array, out: Array, ends: Array) -> None:
    """A stream for symbols first to last - 1 of each row of `symbols` [rows, n] by its row of `cdf`, whole bytes one after another.

    `out` uint8 holds zeros, with room for the worst case; `ends` int64 [rows + 1] are the streams' ends in it.
    """
    for r in range(len(symbols)):
        ends[r + 1] = (_encode_row(symbols, r, first, last, cdf[r], out, 8 * ends[r]) + 7) >> 3


@helper
def _bit(data: Array, at: int, end: int) -> int:
    """Bit `at`; zeros follow the last one."""
    return (int64(data[at >> 3]) >> (7 - (at & 7))) & 1 if at < end else int64(0)


@helper
def _symbol(table: Array, frequency: int) -> int:
    """The last symbol whose entry is at most `frequency`."""
    low, high = 0, len(table) - 2
    while low < high:
        middle = (low + high + 1) >> 1
        if int64(table[middle]) <= frequency:
            low = middle
        else:
            high = middle - 1
    return low


@helper
def _decode_row(data: Array, begin: int, end: int, table: Array, out: Array, row: int, first: int, last: int) -> bool:
    """Symbols first to last - 1; whether they take just the bytes begin to end - 1."""
    start, stop, top = 8 * begin, 8 * end, len(table) - 2
    low, high, value, at = int64(0), int64(TOP), int64(0), start
    for _ in range(32):
        value = value << 1 | _bit(data, at, stop)
        at += 1
    for i in range(first, last):
        span = high - low + 1
        s = _symbol(table, ((value - low + 1) * 65536 - 1) // span)
        out[row, i] = uint8(s)
        above = int64(65536) if s == top else int64(table[s + 1])
        high = low - 1 + ((span * above) >> 16)
        low = low + ((span * int64(table[s])) >> 16)
        while True:
            if high < HALF or low >= HALF:
                low, high, value = (low << 1) & TOP, ((high << 1) | 1) & TOP, (value << 1) & TOP
            elif low >= QUARTER and high < THREE:
                low, high, value = (low - QUARTER) << 1, ((high - QUARTER) << 1) | 1, (value - QUARTER) << 1
            else:
                break
            value |= _bit(data, at, stop)
            at += 1
    return (at - 32 - start + 2 + 7) >> 3 == end - begin  # each shift is a bit of the stream, and two end it


@compiled
def decode(data: Array, ends: Array, cdf: Array, first: int, last: int, out: Array) -> bool:
    """The reverse of `encode` into uint8 `out` [rows, n]; whether every stream has the length of what it holds.

    Rows of `cdf` start with 0 and ascend strictly. Any bytes decode to symbols that the table has.
    """
    good = True
    for r in range(len(out)):
        good &= _decode_row(data, ends[r], ends[r + 1], cdf[r], out, r, first, last)
    return good
