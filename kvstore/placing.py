"""Decoded values into a bfloat16 cache on the CPU: rounded, transposed and rotated in one pass that holds neither the GIL nor torch's threads.

The arithmetic is that of `families.rope`, operation for operation, so both give the same bits (a test compares them). Why not torch here:
its threads wait for cores that the decoders hold (with one other busy process on two cores, placing 1,185 tokens took 323 ms), and
single-threaded pieces small enough to avoid them spend their time handing over the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.jit import compiled, helper, inlined, uint16, uint32

Array = npt.NDArray[Any]


@inlined
def _bits(x: Any) -> Any:
    """bfloat16 bits of a float32, rounded to nearest even. A NaN that was bfloat16 keeps its payload."""
    u = np.float32(x).view(np.uint32)
    return uint16((u + uint32(0x7FFF) + ((u >> uint32(16)) & uint32(1))) >> uint32(16))


@inlined
def _rounded(x: Any) -> Any:
    """A float32 rounded to bfloat16, as float32."""
    u = np.float32(x).view(np.uint32)
    return np.uint32((u + uint32(0x7FFF) + ((u >> uint32(16)) & uint32(1))) & uint32(0xFFFF0000)).view(np.float32)


@helper
def _turn(values: Array, t: int, first: int, second: int, step: int, cos: Array, sin: Array, wide: bool, h: int, shift: int, out: Array) -> None:
    """Pairs (first + i * step, second + i * step) of row `t`; they lie `shift` further left in head `h` of `out`."""
    half = cos.shape[1]
    if wide:
        for i in range(half):
            x, y = _rounded(values[t, first + i * step]), _rounded(values[t, second + i * step])
            out[h, t, first - shift + i * step] = _bits(x * cos[t, i] - y * sin[t, i])
            out[h, t, second - shift + i * step] = _bits(y * cos[t, i] + x * sin[t, i])
    else:
        for i in range(half):
            x, y = _rounded(values[t, first + i * step]), _rounded(values[t, second + i * step])
            out[h, t, first - shift + i * step] = _bits(_rounded(x * cos[t, i]) - _rounded(y * sin[t, i]))
            out[h, t, second - shift + i * step] = _bits(_rounded(y * cos[t, i]) + _rounded(x * sin[t, i]))


@compiled
def place(values: Array, cos: Array, sin: Array, start: int, interleaved: bool, wide: bool, out: Array) -> None:
    """float32 `values` [tokens, heads * head_dim] into uint16 `out` [heads, tokens, head_dim].

    `cos` and `sin`, float32 [tokens, dim / 2] (rounded to bfloat16 unless `wide`), turn channels from `start` on; [tokens, 0] turns none.
    """
    heads, tokens, width = out.shape
    half = cos.shape[1]
    for h in range(heads):
        base = h * width
        for t in range(tokens):
            if 2 * half < width:
                for i in range(width):
                    out[h, t, i] = _bits(values[t, base + i])
            if half > 0 and interleaved:
                _turn(values, t, base + start, base + start + 1, 2, cos, sin, wide, h, base, out)
            elif half > 0:
                _turn(values, t, base + start, base + start + half, 1, cos, sin, wide, h, base, out)


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 bits as the float32 of the same value."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)
