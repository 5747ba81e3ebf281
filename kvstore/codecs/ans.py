"""Asymmetric numeral systems, bit for bit the streams of constriction's `AnsCoder` (u32 words, u64 state, 24-bit probabilities).

Weights are 12-bit integers, shifted to 24: the low 12 bits of the state then pass through every symbol untouched, and a
table of 4,096 entries decodes. To encode a symbol of weight w after weights that sum to c, push the low half of the state x
where x would leave its range, then x = (x / w, c + x mod w). Decoding reads words and states backwards and must end in
state 0 with no word left; damage mostly breaks this (checksums find the rest).

Symbols are laid out in runs of equal length (the last may be shorter), each with one table. A stream is a whole number of
runs, the same for all but the last, about `STREAM` symbols or fewer. Four streams run in lockstep: each alone waits for its
own multiplications. Word arrays start with a guard word, so that the load of the next word needs no test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs import ans_kernels, ternary_kernels
from kvstore.codecs.base import Reader, damaged
from kvstore.codecs.runs import STREAM, Runs, cut

__all__ = ["STREAM", "Runs", "cut", "decode", "decode_table", "decode_ternary", "encode", "encode_table", "take", "thirds_table"]

TOTAL = 4096
Bytes = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]


class Coded(NamedTuple):
    """Streams side by side: stream s is the uint32 `words[1 + ends[s] : 1 + ends[s + 1]]`; `ends` is int64 [streams + 1]."""

    words: U32
    ends: I64

    def lengths(self) -> bytes:
        """Words of each stream, as little-endian uint16."""
        return np.diff(self.ends).astype("<u2").tobytes()

    def content(self) -> bytes:
        """The words of all streams, little-endian."""
        return self.words[1 + self.ends[0] : 1 + self.ends[-1]].astype("<u4", copy=False).tobytes()


def encode_table(weights: I64, symbols: I64) -> U32:
    """uint32 [256] by symbol (as a byte): sum of the weights before << 16 | weight; 0 where a symbol has no weight.

    `weights` [n], each 1 to 4,095, sum to 4,096; the order of `symbols` [n] is the order of the model.
    """
    table = np.zeros(256, np.uint32)
    table[symbols & 255] = (np.cumsum(weights) - weights) << 16 | weights
    return table


def decode_table(weights: I64, symbols: I64) -> U32:
    """uint32 [4096] by quantile: distance from the symbol's first quantile << 20 | weight << 8 | symbol."""
    first = np.repeat(np.cumsum(weights) - weights, weights)
    packed = (np.arange(TOTAL) - first) << 20 | np.repeat(weights, weights) << 8 | np.repeat(symbols & 255, weights)
    return packed.astype(np.uint32)


def thirds_table(weights: I64) -> U32:
    """uint32 [4] for the three symbols of `weights` [3]: first quantile of symbol 2 << 16 | of symbol 1; then as `encode_table`."""
    entries = encode_table(weights, np.arange(3))[:3]
    return np.concatenate([entries[2:] & 0xFFFF0000 | entries[1:2] >> 16, entries])


def encode(symbols: Bytes, runs: Runs, table_of_run: Bytes, tables: U32) -> Coded:
    """Streams of `symbols`, run r by row `table_of_run[r]` of `tables` [k, 256]. Every symbol must have a weight there."""
    ends = np.zeros(runs.streams + 1, np.int64)
    words = np.empty((4, runs.run * runs.per * 12 // 32 + 4), np.uint32)
    out = np.empty(1 + runs.streams * words.shape[1], np.uint32)
    ans_kernels.encode(symbols, runs.run, runs.per, table_of_run, _frozen(tables), words, ends, out)
    return Coded(out, ends)


def decode(coded: Coded, runs: Runs, table_of_run: Bytes, tables: U32) -> Bytes:
    """uint8 [symbols] by `tables` [k, 4096]. Raises IntegrityError for streams that no encoder writes."""
    out = np.empty(runs.symbols, np.uint8)
    _check(coded, runs)
    if not ans_kernels.decode(_frozen(coded.words), coded.ends, runs.run, runs.per, table_of_run, _frozen(tables), out):
        raise damaged("a stream does not decode")
    return out


def decode_ternary(coded: Coded, runs: Runs, table_of_run: Bytes, thirds: U32, base: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """int8 [symbols]: refinements -1, 0, 1 of the values `base`, in two contexts.

    `thirds` [k, 8] are the `thirds_table`s for base zero and for the others; where base is negative the symbol is mirrored.
    Raises IntegrityError.
    """
    out = np.empty(runs.symbols, np.int8)
    _check(coded, runs)
    if not ternary_kernels.decode(_frozen(coded.words), coded.ends, runs.run, runs.per, table_of_run, _frozen(thirds), base, out):
        raise damaged("a stream does not decode")
    return out


def _frozen(array: U32) -> U32:
    """Read-only, so that each function is compiled for one type only."""
    view = array.view()
    view.flags.writeable = False
    return view


def _check(coded: Coded, runs: Runs) -> None:
    if len(coded.ends) != runs.streams + 1 or not 0 <= coded.ends[0] <= coded.ends[-1] < len(coded.words):
        raise damaged("streams that do not fit their words")


def take(reader: Reader, counts: Sequence[int]) -> Iterator[Coded]:
    """Rows of `counts` streams from a record: their lengths, padded to a whole word, then their words. Raises IntegrityError."""
    lengths = reader.take_bytes(2 * sum(counts)).view("<u2")
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    ends += reader.at - 1  # the guard is the word before
    reader.take(int(ends[-1] - ends[0]))
    row_ends = list(accumulate(counts, initial=0))
    return iter([Coded(reader.words, ends[first : last + 1]) for first, last in pairwise(row_ends)])
