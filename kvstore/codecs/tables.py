"""Models of quantized values by scale class, the built-in ones or a calibration's, and the tables that `ans` codes them with.

Class c is for values whose standard deviation is 3 ** ((c - 24) / 8) steps. Each tier divides the step by three, so the
classes of a tier k refinements up are 8 k higher. A refinement splits a cell in three: two models a class, for cell zero
and for the others, where the inner third (towards zero) comes first.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.ans import TOTAL, decode_table, encode_table, thirds_table
from kvstore.codecs.table_data import BASE, MEANS, THIRDS
from kvstore.errors import FormatError

CLASSES, UNIT_CLASS, PER_THREE, LARGEST = len(BASE), 24, 8, 127
U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


class Tables(NamedTuple):
    """Read-only; row c is for class c.

    `encode` uint32 [c, 256] and `decode` uint32 [c, 4096] code values as int8; `largest` int64 [c] is the largest |value| of the
    alphabet. `refine` uint32 [c, 256] encodes the thirds 0, 1, 2 of cell zero, and 3, 4, 5 of the others; `thirds`
    uint32 [c, 8] decodes them (`ans.decode_ternary`). `bits` int32 [c, 128]: cost of |value| in 1/256 bit, escapes not counted.
    """

    encode: U32
    decode: U32
    largest: I64
    refine: U32
    thirds: U32
    bits: npt.NDArray[np.int32]


def model(scale_class: int) -> tuple[I64, I64]:
    """12-bit weights and values, from the most negative value up."""
    return _model(np.array(BASE[scale_class], np.int64))


def _model(half: I64) -> tuple[I64, I64]:
    values = np.arange(1 - len(half), len(half))
    return half[np.abs(values)], values


def thirds_model(scale_class: int) -> tuple[I64, I64]:
    """12-bit weights of the three thirds of cell zero, and of the others from the inner to the outer."""
    return _thirds_model(np.array(THIRDS[scale_class]))


def _thirds_model(thirds: npt.NDArray[np.integer]) -> tuple[I64, I64]:
    outer, inner, middle = thirds.tolist()
    zero, other = (outer, TOTAL - 2 * outer, outer), (inner, middle, TOTAL - inner - middle)
    return np.array(zero, np.int64), np.array(other, np.int64)


@cache
def tables() -> Tables:
    """The built-in ones, built on first use, in a few milliseconds."""
    weights = np.zeros((CLASSES, LARGEST + 1), np.uint16)
    for scale_class, half in enumerate(BASE):
        weights[scale_class, : len(half)] = half
    return build(weights, np.array(THIRDS, np.uint16))


def build(weights: U16, thirds: U16) -> Tables:
    """Tables of `weights` [CLASSES, 128] of |value| = 0 ... 127, 0 beyond the alphabet, and of `thirds` [CLASSES, 3] as in `table_data`.

    Of the last few built they are kept. Raises FormatError for weights that are no model.
    """
    if weights.shape != (CLASSES, LARGEST + 1) or thirds.shape != (CLASSES, 3):
        raise FormatError(f"tables of shapes {weights.shape} and {thirds.shape}, expected {(CLASSES, LARGEST + 1)} and {(CLASSES, 3)}")
    return _build(weights.astype("<u2").tobytes(), thirds.astype("<u2").tobytes())


@lru_cache(8)
def _build(weights: bytes, thirds: bytes) -> Tables:
    halves = [_half(row) for row in np.frombuffer(weights, "<u2").reshape(CLASSES, -1)]
    splits = [_split(row) for row in np.frombuffer(thirds, "<u2").reshape(CLASSES, 3)]
    built = Tables(
        encode=np.stack([encode_table(*_model(half)) for half in halves]),
        decode=np.stack([decode_table(*_model(half)) for half in halves]),
        largest=np.array([len(half) - 1 for half in halves]),
        refine=np.stack([_refine_table(*split) for split in splits]),
        thirds=np.stack([np.concatenate([thirds_table(weights) for weights in split]) for split in splits]),
        bits=np.stack([_bits(half) for half in halves]),
    )
    for table in built:
        table.flags.writeable = False
    return built


def _half(row: U16) -> I64:
    """The weights of |value| = 0 ... the largest of the alphabet."""
    half = row[: int(np.count_nonzero(row))].astype(np.int64)
    if len(half) < 2 or half.min() < 1 or half[0] + 2 * half[1:].sum() != TOTAL:
        raise FormatError("a scale class whose weights are no model", remedy="make the calibration anew")
    return half


def _split(row: U16) -> tuple[I64, I64]:
    split = _thirds_model(row)
    if min(int(part.min()) for part in split) < 1:
        raise FormatError("a scale class whose thirds are no model", remedy="make the calibration anew")
    return split


@cache
def class_bounds(refinements: int) -> I64:
    """int64 [CLASSES - 1]: mean |value| times 65,536, values in the finest of `refinements` further tiers, where the next class begins."""
    means = np.array(MEANS[PER_THREE * refinements :][:CLASSES], np.int64)
    bounds: I64 = (means[1:] + means[:-1]) // 2
    bounds.flags.writeable = False
    return bounds


def _refine_table(zero: I64, other: I64) -> U32:
    return encode_table(zero, np.arange(3)) | encode_table(other, np.arange(3, 6))


def _bits(half: I64) -> npt.NDArray[np.int32]:
    clipped = half[np.minimum(np.arange(LARGEST + 1), len(half) - 1)]
    return np.rint(256 * np.log2(TOTAL / clipped)).astype(np.int32)
