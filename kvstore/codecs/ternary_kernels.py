"""The decoder of refinements: `ans_kernels.decode` for three symbols, whose model depends on what they refine.

Three symbols need no table of 4,096 entries: two comparisons find the symbol, and all models of a unit stay in the L1 cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.ans_kernels import quantile, refill, shared_runs, short, start
from kvstore.codecs.jit import compiled, helper, inlined, int8, uint32, uint64

Array = npt.NDArray[Any]


@inlined
def _third(x: int, limits: int) -> int:
    """Which of three symbols, 0 to 2: limits = first quantile of symbol 2 << 16 | of symbol 1."""
    q = quantile(x)
    return uint64(q >= uint64(limits & uint32(0xFFFF))) + uint64(q >= uint64(limits >> uint32(16)))


@inlined
def _after(x: int, entry: int) -> int:
    """The state after decoding a symbol: entry = weights before << 16 | weight."""
    high = (x >> uint64(24)) * uint64(entry & uint32(0xFFFF)) + quantile(x) - uint64(entry >> uint32(16))
    return high << uint64(12) | (x & uint64(0xFFF))


@inlined
def _context(value: int) -> int:
    """Where the model of a refinement starts in its row."""
    return uint64(4) * uint64(value != 0)


@inlined
def _mirror(symbol: int, value: int) -> int:
    """Symbol 0, 1, 2 as refinement: -1, 0, 1 away from zero, upwards where the value is zero."""
    return (int8(symbol) - int8(1)) * (int8(value >> 7) | int8(1))


@helper
def _decode_lane(
    words: Array, begin: int, at: int, x: int, first: int, last: int, run: int, table_of_run: Array, thirds: Array, base: Array, out: Array
) -> bool:
    p, b = uint64(at), uint64(begin)
    while first < last:
        t, stop = table_of_run[first // run], min(last, (first // run + 1) * run)
        for i in range(first, stop):
            model = _context(base[i])
            symbol = _third(x, thirds[t, model])
            out[i] = _mirror(symbol, base[i])
            x = _after(x, thirds[t, model + symbol + uint64(1)])
            wanted = short(x, p, b)
            x = refill(x, words[p], wanted)
            p -= wanted
        first = stop
    return x == uint64(0) and p == b


@helper
def _decode_four(
    words: Array,
    ends: Array,
    first: int,
    size: int,
    run: int,
    runs: int,
    table_of_run: Array,
    thirds: Array,
    x: Array,
    at: Array,
    base: Array,
    out: Array,
) -> None:
    one = uint64(1)
    x0, x1, x2, x3 = x[0], x[1], x[2], x[3]
    p0, p1, p2, p3 = at[0], at[1], at[2], at[3]
    b0, b1, b2, b3 = uint64(ends[0]), uint64(ends[1]), uint64(ends[2]), uint64(ends[3])
    per, r0 = size // run, first // run
    for r in range(r0, r0 + runs):
        t0, t1, t2, t3 = table_of_run[r], table_of_run[r + per], table_of_run[r + 2 * per], table_of_run[r + 3 * per]
        for i in range(r * run, (r + 1) * run):
            v0, v1, v2, v3 = base[i], base[i + size], base[i + 2 * size], base[i + 3 * size]
            c0, c1, c2, c3 = _context(v0), _context(v1), _context(v2), _context(v3)
            s0, s1, s2, s3 = _third(x0, thirds[t0, c0]), _third(x1, thirds[t1, c1]), _third(x2, thirds[t2, c2]), _third(x3, thirds[t3, c3])
            x0, x1 = _after(x0, thirds[t0, c0 + s0 + one]), _after(x1, thirds[t1, c1 + s1 + one])
            x2, x3 = _after(x2, thirds[t2, c2 + s2 + one]), _after(x3, thirds[t3, c3 + s3 + one])
            m0, m1, m2, m3 = short(x0, p0, b0), short(x1, p1, b1), short(x2, p2, b2), short(x3, p3, b3)
            x0, x1, x2, x3 = refill(x0, words[p0], m0), refill(x1, words[p1], m1), refill(x2, words[p2], m2), refill(x3, words[p3], m3)
            p0, p1, p2, p3 = p0 - m0, p1 - m1, p2 - m2, p3 - m3
            out[i], out[i + size], out[i + 2 * size], out[i + 3 * size] = _mirror(s0, v0), _mirror(s1, v1), _mirror(s2, v2), _mirror(s3, v3)
    x[0], x[1], x[2], x[3] = x0, x1, x2, x3
    at[0], at[1], at[2], at[3] = p0, p1, p2, p3


@compiled
def decode(words: Array, ends: Array, run: int, per: int, table_of_run: Array, thirds: Array, base: Array, out: Array) -> bool:
    """As `ans_kernels.decode`, for three symbols in the context of the int8 `base`; fills the int8 `out`."""
    total, size, good = len(out), run * per, True
    x, at = np.zeros(4, np.uint64), np.zeros(4, np.uint64)
    for s in range(0, len(ends) - 1, 4):
        lanes = min(4, len(ends) - 1 - s)
        for lane in range(lanes):
            start(words, ends[s + lane], ends[s + lane + 1], x, at, lane)
        shared = shared_runs(total, s, size, run, lanes)
        if shared > 0:
            _decode_four(words, ends[s:], s * size, size, run, shared, table_of_run, thirds, x, at, base, out)
        for lane in range(lanes):
            first = (s + lane) * size
            good &= _decode_lane(
                words, ends[s + lane], at[lane], x[lane], first + shared * run, min(total, first + size), run, table_of_run, thirds, base, out
            )
    return good
