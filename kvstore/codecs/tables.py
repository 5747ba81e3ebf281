"""The built-in models of quantized values, by scale class, and the tables that `ans` codes them with.

Class c is for values whose standard deviation is 3 ** ((c - 24) / 8) steps. Each tier divides the step by three, so the
classes of a tier k refinements up are 8 k higher. A refinement splits a cell in three: two models a class, for cell zero
and for the others, where the inner third (towards zero) comes first.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.ans import TOTAL, decode_table, encode_table, thirds_table
from kvstore.codecs.table_data import BASE, MEANS, THIRDS

CLASSES, UNIT_CLASS, PER_THREE = len(BASE), 24, 8
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
    half = np.array(BASE[scale_class], np.int64)
    values = np.arange(1 - len(half), len(half))
    return half[np.abs(values)], values


def thirds_model(scale_class: int) -> tuple[I64, I64]:
    """12-bit weights of the three thirds of cell zero, and of the others from the inner to the outer."""
    outer, inner, middle = THIRDS[scale_class]
    zero, other = (outer, TOTAL - 2 * outer, outer), (inner, middle, TOTAL - inner - middle)
    return np.array(zero, np.int64), np.array(other, np.int64)


@cache
def tables() -> Tables:
    """Built on first use, in a few milliseconds."""
    models = [model(c) for c in range(CLASSES)]
    built = Tables(
        encode=np.stack([encode_table(*m) for m in models]),
        decode=np.stack([decode_table(*m) for m in models]),
        largest=np.array([len(half) - 1 for half in BASE]),
        refine=np.stack([_refine_table(c) for c in range(CLASSES)]),
        thirds=np.stack([np.concatenate([thirds_table(weights) for weights in thirds_model(c)]) for c in range(CLASSES)]),
        bits=np.stack([_bits(half) for half in BASE]),
    )
    for table in built:
        table.flags.writeable = False
    return built


@cache
def class_bounds(refinements: int) -> I64:
    """int64 [CLASSES - 1]: mean |value| times 65,536, values in the finest of `refinements` further tiers, where the next class begins."""
    means = np.array(MEANS[PER_THREE * refinements :][:CLASSES], np.int64)
    bounds: I64 = (means[1:] + means[:-1]) // 2
    bounds.flags.writeable = False
    return bounds


def _refine_table(scale_class: int) -> U32:
    zero, other = thirds_model(scale_class)
    return encode_table(zero, np.arange(3)) | encode_table(other, np.arange(3, 6))


def _bits(half: tuple[int, ...]) -> npt.NDArray[np.int32]:
    clipped = np.array(half)[np.minimum(np.arange(128), len(half) - 1)]
    return np.rint(256 * np.log2(TOTAL / clipped)).astype(np.int32)
