"""Bit patterns from integer formulas: the same on every machine and in every version, without a random generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.manifest import Layout

Bits = npt.NDArray[Any]


def mixed(values: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """A fixed scramble of whole numbers; arithmetic modulo 2**32."""
    h = values.astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    return h ^ (h >> np.uint32(16))


def bits_for(layout: Layout, token_ids: Sequence[int], *, plain: bool) -> Bits:
    """Bit patterns [layers, 2, tokens, channels]: bell-shaped, with loud channels and a loud first token; odd values unless
    `plain`."""
    tokens, channels = len(token_ids), layout.channels
    place = np.arange(layout.layers * 2 * channels, dtype=np.uint64).reshape(layout.layers, 2, 1, channels)
    ids = np.asarray(token_ids, np.uint64).reshape(1, 1, tokens, 1)
    h = mixed(mixed(place * np.uint64(65537) + ids) + np.arange(tokens, dtype=np.uint32).reshape(1, 1, tokens, 1))
    bell = sum((h >> np.uint32(s) & np.uint32(255)).astype(np.int64) for s in (0, 8, 16, 24)) - 510
    scale = 2.0 ** -(8.0 + np.arange(channels) % 4)
    values = (bell * scale + (np.arange(channels) % 5 - 2) * 0.25).astype(np.float32)
    values[:, 0, :, 3] *= np.float32(16)
    values[:, :, 0] *= np.float32(8)
    bits = _patterns(values, h, layout.dtype)
    if not plain:
        _spoil(bits, layout.dtype)
    return bits


def _patterns(values: npt.NDArray[np.float32], noise: npt.NDArray[np.uint32], dtype: str) -> Bits:
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    return (wide >> np.uint32(16)).astype(np.uint16) if dtype == "bfloat16" else wide ^ (noise & np.uint32(0x3FF))


def _spoil(bits: Bits, dtype: str) -> None:
    """NaN with a payload, both infinities, minus zero, the smallest subnormal: a few of each."""
    odd = {"bfloat16": (0x7FA1, 0x7F80, 0xFF80, 0x8000, 0x0001), "float16": (0x7E23, 0x7C00, 0xFC00, 0x8000, 0x0001),
           "float32": (0x7FA00001, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001)}[dtype]  # fmt: skip
    flat = bits.reshape(-1)
    flat[11 :: max(13, len(flat) // 20)][: len(odd)] = np.array(odd, bits.dtype)


def ids(first: int, count: int) -> tuple[int, ...]:
    """Token ids below 32,000."""
    return tuple(int(i) for i in mixed(np.arange(first, first + count)) % np.uint32(32000))
