"""The loops of `ans`, compiled. What runs for each symbol takes scalars only: an array argument costs a reference count."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.jit import compiled, helper, inlined, uint32, uint64

Array = npt.NDArray[Any]


@inlined
def _quotient(x: int, entry: int) -> int:
    """The state after encoding a symbol: entry = weights before << 16 | weight."""
    weight, high = uint64(entry & uint32(0xFFFF)), x >> uint64(12)
    part = high // weight
    return (part << uint64(12) | (uint64(entry >> uint32(16)) + high - part * weight)) << uint64(12) | (x & uint64(0xFFF))


@inlined
def _full(x: int, entry: int) -> bool:
    """Whether the low half of the state must be pushed before encoding."""
    return (x >> uint64(52)) >= uint64(entry & uint32(0xFFFF))


@inlined
def quantile(x: int) -> int:
    return (x >> uint64(12)) & uint64(0xFFF)


@inlined
def _after(x: int, entry: int) -> int:
    """The state after decoding a symbol: entry = distance << 20 | weight << 8 | symbol."""
    high = (x >> uint64(24)) * uint64((entry >> uint32(8)) & uint32(0xFFF)) + uint64(entry >> uint32(20))
    return high << uint64(12) | (x & uint64(0xFFF))


@inlined
def short(x: int, at: int, begin: int) -> int:
    """1 where the state wants another word and its stream has one."""
    return uint64((x < uint64(1 << 32)) & (at > begin))


@inlined
def refill(x: int, word: int, wanted: int) -> int:
    return x << uint64(32) | uint64(word) if wanted else x


@helper
def shared_runs(total: int, s: int, size: int, run: int, lanes: int) -> int:
    """Whole runs that each of the four streams from s on has; the last stream may be shorter."""
    return (min(total, (s + 4) * size) - (s + 3) * size) // run if lanes == 4 else 0


@helper
def _encode_lane(symbols: Array, stop: int, last: int, run: int, table_of_run: Array, tables: Array, words: Array) -> tuple[int, int]:
    """A stream's symbols last - 1 down to stop; state and number of words after them."""
    x, used = uint64(0), 0
    while last > stop:
        r = (last - 1) // run
        t, bottom = table_of_run[r], max(stop, r * run)
        for i in range(last - 1, bottom - 1, -1):
            entry = tables[t, symbols[i]]
            if _full(x, entry):
                words[used], used, x = uint32(x & uint64(0xFFFFFFFF)), used + 1, x >> uint64(32)
            x = _quotient(x, entry)
        last = bottom
    return x, used


@helper
def _encode_four(
    symbols: Array, first: int, size: int, run: int, runs: int, table_of_run: Array, tables: Array, x: Array, words: Array, used: Array
) -> None:
    """The first `runs` runs of four streams that start `size` apart, from their ends."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    n0, n1, n2, n3 = uint64(used[0]), uint64(used[1]), uint64(used[2]), uint64(used[3])
    per, r0 = size // run, first // run
    for r in range(r0 + runs - 1, r0 - 1, -1):
        t0, t1, t2, t3 = table_of_run[r], table_of_run[r + per], table_of_run[r + 2 * per], table_of_run[r + 3 * per]
        for i in range((r + 1) * run - 1, r * run - 1, -1):
            e0, e1, e2, e3 = (
                tables[t0, symbols[i]],
                tables[t1, symbols[i + size]],
                tables[t2, symbols[i + 2 * size]],
                tables[t3, symbols[i + 3 * size]],
            )
            if _full(x0, e0):
                words[0, n0], n0, x0 = uint32(x0 & uint64(0xFFFFFFFF)), n0 + uint64(1), x0 >> uint64(32)
            if _full(x1, e1):
                words[1, n1], n1, x1 = uint32(x1 & uint64(0xFFFFFFFF)), n1 + uint64(1), x1 >> uint64(32)
            if _full(x2, e2):
                words[2, n2], n2, x2 = uint32(x2 & uint64(0xFFFFFFFF)), n2 + uint64(1), x2 >> uint64(32)
            if _full(x3, e3):
                words[3, n3], n3, x3 = uint32(x3 & uint64(0xFFFFFFFF)), n3 + uint64(1), x3 >> uint64(32)
            x0, x1, x2, x3 = _quotient(x0, e0), _quotient(x1, e1), _quotient(x2, e2), _quotient(x3, e3)
    x[0], x[1], x[2], x[3] = x0, x1, x2, x3
    used[0], used[1], used[2], used[3] = n0, n1, n2, n3


@compiled
def encode(symbols: Array, run: int, per: int, table_of_run: Array, tables: Array, words: Array, ends: Array, out: Array) -> None:
    """Fills `ends` and `out` (from its second word on). `words` [4, n] is scratch."""
    total, size, streams = len(symbols), run * per, len(ends) - 1
    x, used = np.zeros(4, np.uint64), np.zeros(4, np.int64)
    for s in range(0, streams, 4):
        lanes = min(4, streams - s)
        shared = shared_runs(total, s, size, run, lanes)
        for lane in range(lanes):
            first = (s + lane) * size
            x[lane], used[lane] = _encode_lane(symbols, first + shared * run, min(total, first + size), run, table_of_run, tables, words[lane])
        _encode_four(symbols, s * size, size, run, shared, table_of_run, tables, x, words, used)
        for lane in range(lanes):
            ends[s + lane + 1] = _append(x[lane], words[lane], used[lane], out, ends[s + lane] + 1) - 1


@helper
def _append(x: int, words: Array, used: int, out: Array, filled: int) -> int:
    """A stream and its final state, whose zero halves are left out, into `out`."""
    for i in range(used):
        out[filled + i] = words[i]
    filled += used
    while x > uint64(0):
        out[filled] = uint32(x & uint64(0xFFFFFFFF))
        filled += 1
        x >>= uint64(32)
    return filled


@helper
def start(words: Array, begin: int, end: int, x: Array, at: Array, lane: int) -> None:
    """The first two words of a stream, which is read from its end, are its state."""
    x[lane] = uint64(0)
    for _ in range(min(2, end - begin)):
        x[lane] = x[lane] << uint64(32) | uint64(words[end])
        end -= 1
    at[lane] = end


@helper
def _decode_lane(words: Array, begin: int, at: int, x: int, first: int, last: int, run: int, table_of_run: Array, tables: Array, out: Array) -> bool:
    """Symbols first to last - 1, which end their stream; whether the stream ends as it must."""
    p, b = uint64(at), uint64(begin)
    while first < last:
        t, stop = table_of_run[first // run], min(last, (first // run + 1) * run)
        for i in range(first, stop):
            entry = tables[t, quantile(x)]
            out[i] = entry & uint32(0xFF)
            x = _after(x, entry)
            wanted = short(x, p, b)
            x = refill(x, words[p], wanted)
            p -= wanted
        first = stop
    return x == uint64(0) and p == b


@helper
def _decode_four(
    words: Array, ends: Array, first: int, size: int, run: int, runs: int, table_of_run: Array, tables: Array, x: Array, at: Array, out: Array
) -> None:
    """The first `runs` runs of four streams that start `size` symbols apart."""
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    p0, p1, p2, p3 = at[0], at[1], at[2], at[3]
    b0, b1, b2, b3 = uint64(ends[0]), uint64(ends[1]), uint64(ends[2]), uint64(ends[3])
    per, r0 = size // run, first // run
    for r in range(r0, r0 + runs):
        t0, t1, t2, t3 = table_of_run[r], table_of_run[r + per], table_of_run[r + 2 * per], table_of_run[r + 3 * per]
        for i in range(r * run, (r + 1) * run):
            e0, e1, e2, e3 = tables[t0, quantile(x0)], tables[t1, quantile(x1)], tables[t2, quantile(x2)], tables[t3, quantile(x3)]
            x0, x1, x2, x3 = _after(x0, e0), _after(x1, e1), _after(x2, e2), _after(x3, e3)
            m0, m1, m2, m3 = short(x0, p0, b0), short(x1, p1, b1), short(x2, p2, b2), short(x3, p3, b3)
            x0, x1, x2, x3 = refill(x0, words[p0], m0), refill(x1, words[p1], m1), refill(x2, words[p2], m2), refill(x3, words[p3], m3)
            p0, p1, p2, p3 = p0 - m0, p1 - m1, p2 - m2, p3 - m3
            out[i], out[i + size], out[i + 2 * size], out[i + 3 * size] = e0 & uint32(0xFF), e1 & uint32(0xFF), e2 & uint32(0xFF), e3 & uint32(0xFF)
    x[0], x[1], x[2], x[3] = x0, x1, x2, x3
    at[0], at[1], at[2], at[3] = p0, p1, p2, p3


@compiled
def decode(words: Array, ends: Array, run: int, per: int, table_of_run: Array, tables: Array, out: Array) -> bool:
    """Fills `out`; whether every stream ends in state 0 with no word left. Reads words[0 : ends[-1] + 1] only."""
    total, size, good = len(out), run * per, True
    x, at = np.zeros(4, np.uint64), np.zeros(4, np.uint64)
    for s in range(0, len(ends) - 1, 4):
        lanes = min(4, len(ends) - 1 - s)
        for lane in range(lanes):
            start(words, ends[s + lane], ends[s + lane + 1], x, at, lane)
        shared = shared_runs(total, s, size, run, lanes)
        if shared > 0:
            _decode_four(words, ends[s:], s * size, size, run, shared, table_of_run, tables, x, at, out)
        for lane in range(lanes):
            first = (s + lane) * size
            good &= _decode_lane(
                words, ends[s + lane], at[lane], x[lane], first + shared * run, min(total, first + size), run, table_of_run, tables, out
            )
    return good
