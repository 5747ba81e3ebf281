"""Decoded values into a bfloat16 cache on the CPU: rounded, transposed and rotated in one pass that holds neither the GIL nor torch's threads.

The arithmetic is that of `families.rope`, operation for operation, so both give the same bits (a test compares them). Why not torch here:
its threads wait for cores that the decoders hold (with one other busy process on two cores, placing 1,185 tokens took 323 ms), and
single-threaded pieces small enough to avoid them spend their time handing over the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs.jit import compiled, inlined, uint16, uint32

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


@compiled
def place(values: Array, cos: Array, sin: Array, start: int, interleaved: bool, wide: bool, out: Array) -> None:
    """float32 `values` [tokens, heads * head_dim] into uint16 `out` [heads, tokens, head_dim].

    `cos` and `sin`, float32 [tokens, dim / 2] (rounded to bfloat16 unless `wide`), turn channels from `start` on; [tokens, 0] turns none.
    One long function of short loops into temporaries: that is what becomes vector instructions, and a helper given arrays is not.
    """
    heads, tokens, width = out.shape
    half = cos.shape[1]
    x, y, first, second = np.empty(half, np.float32), np.empty(half, np.float32), np.empty(half, np.float32), np.empty(half, np.float32)
    for h in range(heads):
        for t in range(tokens):
            if 2 * half < width:
                for i in range(width):
                    out[h, t, i] = _bits(values[t, h * width + i])
            at = h * width + start
            if interleaved:
                for i in range(half):
                    x[i], y[i] = _rounded(values[t, at + 2 * i]), _rounded(values[t, at + 2 * i + 1])
            else:
                for i in range(half):
                    x[i] = _rounded(values[t, at + i])
                for i in range(half):
                    y[i] = _rounded(values[t, at + half + i])
            if wide:
                for i in range(half):
                    first[i] = x[i] * cos[t, i] - y[i] * sin[t, i]
                for i in range(half):
                    second[i] = y[i] * cos[t, i] + x[i] * sin[t, i]
            else:
                for i in range(half):
                    first[i] = _rounded(x[i] * cos[t, i]) - _rounded(y[i] * sin[t, i])
                for i in range(half):
                    second[i] = _rounded(y[i] * cos[t, i]) + _rounded(x[i] * sin[t, i])
            if interleaved:
                for i in range(half):
                    out[h, t, start + 2 * i], out[h, t, start + 2 * i + 1] = _bits(first[i]), _bits(second[i])
            else:
                for i in range(half):
                    out[h, t, start + i] = _bits(first[i])
                for i in range(half):
                    out[h, t, start + half + i] = _bits(second[i])


def widen(bits: npt.NDArray[np.uint16], out: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """bfloat16 bits as the float32 of the same value, in the memory of `out`."""
    np.copyto(out, bits)
    out <<= np.uint32(16)
    return out.view(np.float32)
