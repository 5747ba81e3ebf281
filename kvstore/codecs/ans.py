"""Asymmetric numeral systems, bit for bit the streams of constriction's `AnsCoder` (u32 words, u64 state, 24-bit probabilities).

Weights are 12-bit integers, shifted to 24: the low 12 bits of the state then pass through every symbol untouched, and a
table of 4,096 entries decodes. To encode a symbol of weight w and cumulative weight c, where the state x exceeds its range
push its low half; then x = (x / w, c + x mod w). Decoding runs backwards over words and states and must end in state 0 with
no word left, which is how damage shows. Four streams run in lockstep, because each waits for its own multiplications.

A unit has many streams. Symbols are laid out in runs of equal length, each with one table; a stream is a whole number of
runs, at most `STREAM` symbols where a run is not longer. Only the last run and the last stream may be shorter.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import uint32, uint64

from kvstore.codecs.base import Reader, damaged
from kvstore.codecs.jit import compiled, inlined

STREAM = 4096
TOTAL = 4096
Bytes = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]


class Coded(NamedTuple):
    """Streams one after another: uint32 words and the number of words of each stream (uint16)."""

    words: U32
    lengths: npt.NDArray[np.uint16]


def stream_size(run: int) -> int:
    """Symbols a stream, for runs of `run` symbols."""
    return run * max(1, STREAM // run)


def stream_count(symbols: int, run: int) -> int:
    return -(-symbols // stream_size(run))


def encode_table(weights: npt.NDArray[np.int64], symbols: npt.NDArray[np.int64]) -> U32:
    """uint32 [256] by symbol (as a byte): cumulative weight << 16 | weight; 0 where a symbol has no weight.

    `weights` [n] sum to 4,096, each 1 to 4,095; the order of `symbols` [n] is the order of the model.
    """
    table = np.zeros(256, np.uint32)
    table[symbols & 255] = (np.cumsum(weights) - weights) << 16 | weights
    return table


def decode_table(weights: npt.NDArray[np.int64], symbols: npt.NDArray[np.int64]) -> U32:
    """uint32 [4096] by quantile: distance from the symbol's start << 20 | weight << 8 | symbol."""
    start = np.repeat(np.cumsum(weights) - weights, weights)
    packed = (np.arange(TOTAL) - start) << 20 | np.repeat(weights, weights) << 8 | np.repeat(symbols & 255, weights)
    return packed.astype(np.uint32)


def encode(symbols: Bytes, run: int, table_of_run: Bytes, tables: U32) -> Coded:
    """Streams of `symbols` [n], run r by `tables` [k, 256] row `table_of_run[r]`. Every symbol must have a weight there."""
    size = stream_size(run)
    lengths = np.zeros(stream_count(len(symbols), run), np.uint16)
    words = np.empty((len(lengths), size * 12 // 32 + 4), np.uint32)
    out = np.empty(words.size, np.uint32)
    used = _encode(symbols, run, size, table_of_run, tables, words, lengths, out)
    return Coded(out[:used], lengths)


def decode(coded: Coded, symbols: int, run: int, table_of_run: Bytes, tables: U32) -> Bytes:
    """uint8 [symbols]. `tables` is uint32 [k, 4096]. Raises IntegrityError for streams that no encoder writes."""
    out = np.empty(symbols, np.uint8)
    if not _decode(coded.words, ends_of(coded), run, stream_size(run), table_of_run, tables, out):
        raise damaged("a stream does not decode")
    return out


def ends_of(coded: Coded) -> I64:
    """int64 [streams + 1]: where each stream starts in `words`, and where the last one ends."""
    ends = np.zeros(len(coded.lengths) + 1, np.int64)
    np.cumsum(coded.lengths, out=ends[1:])
    if ends[-1] != len(coded.words):
        raise damaged("lengths of streams do not add up")
    return ends


def take(reader: Reader, lengths: npt.NDArray[np.uint16]) -> Coded:
    """The words of streams of `lengths` from a record."""
    return Coded(reader.take(int(lengths.sum(dtype=np.int64))), lengths)


@inlined
def _push(x: int, entry: int, words: U32, used: int) -> tuple[int, int]:
    """State and number of words after one symbol; x < weight << 52 where it is divided."""
    weight = uint64(entry & uint32(0xFFFF))
    if (x >> uint64(52)) >= weight:
        words[used] = uint32(x & uint64(0xFFFFFFFF))
        used += 1
        x >>= uint64(32)
    high = x >> uint64(12)
    quotient = high // weight
    high = quotient << uint64(12) | (uint64(entry >> uint32(16)) + high - quotient * weight)
    return high << uint64(12) | (x & uint64(0xFFF)), used


@inlined
def _flush(x: int, words: U32, used: int) -> int:
    """Number of words after the final state, its zero halves left out."""
    while x:
        words[used] = uint32(x & uint64(0xFFFFFFFF))
        used += 1
        x >>= uint64(32)
    return used


@inlined
def _encode_one(symbols: Bytes, first: int, last: int, run: int, table_of_run: Bytes, tables: U32, words: U32) -> int:
    x, used, left = uint64(0), 0, (last - 1) % run + 1
    at = last
    while at > first:
        table = tables[table_of_run[(at - 1) // run]]
        for _ in range(left):
            at -= 1
            x, used = _push(x, table[symbols[at]], words, used)
        left = run
    return _flush(x, words, used)


@inlined
def _encode_four(symbols: Bytes, s: int, run: int, size: int, table_of_run: Bytes, tables: U32, words: U32, lengths: Bytes) -> None:
    """Streams s to s + 3, all full."""
    x0 = x1 = x2 = x3 = uint64(0)
    n0 = n1 = n2 = n3 = 0
    w0, w1, w2, w3 = words[s], words[s + 1], words[s + 2], words[s + 3]
    per = size // run
    for r in range(per - 1, -1, -1):
        t0, t1 = tables[table_of_run[s * per + r]], tables[table_of_run[(s + 1) * per + r]]
        t2, t3 = tables[table_of_run[(s + 2) * per + r]], tables[table_of_run[(s + 3) * per + r]]
        at = s * size + r * run
        for i in range(at + run - 1, at - 1, -1):
            x0, n0 = _push(x0, t0[symbols[i]], w0, n0)
            x1, n1 = _push(x1, t1[symbols[i + size]], w1, n1)
            x2, n2 = _push(x2, t2[symbols[i + 2 * size]], w2, n2)
            x3, n3 = _push(x3, t3[symbols[i + 3 * size]], w3, n3)
    lengths[s], lengths[s + 1] = _flush(x0, w0, n0), _flush(x1, w1, n1)
    lengths[s + 2], lengths[s + 3] = _flush(x2, w2, n2), _flush(x3, w3, n3)


@inlined
def _join(words: U32, lengths: Bytes, out: U32) -> int:
    """The used heads of the rows of `words`, one after another; returns how many words."""
    used = 0
    for s in range(len(lengths)):
        count = int(lengths[s])
        out[used : used + count] = words[s, :count]
        used += count
    return used


@compiled
def _encode(symbols: Bytes, run: int, size: int, table_of_run: Bytes, tables: U32, words: U32, lengths: Bytes, out: U32) -> int:
    s, full = 0, len(symbols) // size
    while s + 4 <= full:
        _encode_four(symbols, s, run, size, table_of_run, tables, words, lengths)
        s += 4
    while s < len(lengths):
        last = min(len(symbols), (s + 1) * size)
        lengths[s] = _encode_one(symbols, s * size, last, run, table_of_run, tables, words[s])
        s += 1
    return _join(words, lengths, out)


@inlined
def _start(words: U32, begin: int, end: int) -> tuple[int, int]:
    """State and read position of a stream in words[begin:end], which is read from its end."""
    x = uint64(0)
    if end > begin:
        end -= 1
        x = uint64(words[end])
    if end > begin:
        end -= 1
        x = x << uint64(32) | uint64(words[end])
    return x, end


@inlined
def _pop(x: int, entry: int, words: U32, begin: int, at: int) -> tuple[int, int]:
    """State and read position after one symbol."""
    high = (x >> uint64(24)) * uint64((entry >> uint32(8)) & uint32(0xFFF)) + uint64(entry >> uint32(20))
    x = high << uint64(12) | (x & uint64(0xFFF))
    if x < uint64(1 << 32) and at > begin:
        at -= 1
        x = x << uint64(32) | uint64(words[at])
    return x, at


@inlined
def _quantile(x: int) -> int:
    return (x >> uint64(12)) & uint64(0xFFF)


@inlined
def _decode_one(words: U32, begin: int, end: int, first: int, last: int, run: int, table_of_run: Bytes, tables: U32, out: Bytes) -> bool:
    x, at = _start(words, begin, end)
    i = first
    while i < last:
        table = tables[table_of_run[i // run]]
        for _ in range(min(run, last - i)):
            entry = table[_quantile(x)]
            x, at = _pop(x, entry, words, begin, at)
            out[i] = entry & uint32(0xFF)
            i += 1
    return x == uint64(0) and at == begin


@inlined
def _decode_four(words: U32, ends: I64, s: int, run: int, size: int, table_of_run: Bytes, tables: U32, out: Bytes) -> bool:
    """Streams s to s + 3, all full."""
    b0, b1, b2, b3 = ends[s], ends[s + 1], ends[s + 2], ends[s + 3]
    x0, p0 = _start(words, b0, b1)
    x1, p1 = _start(words, b1, b2)
    x2, p2 = _start(words, b2, b3)
    x3, p3 = _start(words, b3, ends[s + 4])
    per = size // run
    for r in range(per):
        t0, t1 = tables[table_of_run[s * per + r]], tables[table_of_run[(s + 1) * per + r]]
        t2, t3 = tables[table_of_run[(s + 2) * per + r]], tables[table_of_run[(s + 3) * per + r]]
        at = s * size + r * run
        for i in range(at, at + run):
            e0, e1, e2, e3 = t0[_quantile(x0)], t1[_quantile(x1)], t2[_quantile(x2)], t3[_quantile(x3)]
            x0, p0 = _pop(x0, e0, words, b0, p0)
            x1, p1 = _pop(x1, e1, words, b1, p1)
            x2, p2 = _pop(x2, e2, words, b2, p2)
            x3, p3 = _pop(x3, e3, words, b3, p3)
            out[i], out[i + size] = e0 & uint32(0xFF), e1 & uint32(0xFF)
            out[i + 2 * size], out[i + 3 * size] = e2 & uint32(0xFF), e3 & uint32(0xFF)
    return (x0 | x1 | x2 | x3) == uint64(0) and p0 == b0 and p1 == b1 and p2 == b2 and p3 == b3


@compiled
def _decode(words: U32, ends: I64, run: int, size: int, table_of_run: Bytes, tables: U32, out: Bytes) -> bool:
    s, full, good = 0, len(out) // size, True
    while s + 4 <= full:
        good &= _decode_four(words, ends, s, run, size, table_of_run, tables, out)
        s += 4
    while s < len(ends) - 1:
        last = min(len(out), (s + 1) * size)
        good &= _decode_one(words, ends[s], ends[s + 1], s * size, last, run, table_of_run, tables, out)
        s += 1
    return good
