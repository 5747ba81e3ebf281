"""What a method under measurement is: the cache of one document in, what a reader gets back and how many bytes it took out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Geometry:
    """The shape of a model's cache; a token has layers x 2 x channels values."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def values(self) -> int:
        return self.layers * 2 * self.channels


@dataclass(frozen=True)
class Version:
    """One reconstruction [layers, 2, tokens, channels] and its size in bytes, counted in one or more ways.

    Several counts (chunk sizes, tables paid or free) may belong to one reconstruction, which is then scored once.
    """

    values: Floats
    nbytes: dict[str, float]


@dataclass(frozen=True)
class Method(ABC):
    """A codec at some setting. `rotated`: it is defined on keys as the model caches them, after RoPE; else on keys before."""

    rotated: bool = field(default=False, kw_only=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """The method, as tables call it; one curve is drawn a name and way of counting."""

    @property
    @abstractmethod
    def settings(self) -> Sequence[str]:
        """One name a version that `code` returns."""

    @abstractmethod
    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        """Code one document, `kv` float32 [layers, 2, tokens, channels] of the tokens `ids`."""


def half(x: Floats) -> Floats:
    """Rounded to float16, in which scales and zeros are stored."""
    return x.astype(np.float16).astype(np.float32)


def rounded_to_bfloat16(x: Floats) -> Floats:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def rounded_to_e4m3(x: Floats) -> Floats:
    """To the nearest float8 e4m3 (largest 448, least step 2**-9), ties to even."""
    magnitude = np.minimum(np.abs(x), 448).astype(np.float32)
    step = np.exp2(np.clip(np.floor(np.log2(np.maximum(magnitude, 1e-30))), -6, 8) - 3).astype(np.float32)
    return np.copysign(np.minimum(np.rint(magnitude / step) * step, 448), x).astype(np.float32)


def affine(groups: Floats, bits: int) -> Floats:
    """Asymmetric integers along the last axis, the smallest and the largest value exact; scale and zero in float16."""
    low = half(groups.min(-1, keepdims=True))
    scale = half((groups.max(-1, keepdims=True) - low) / (2**bits - 1))
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint((groups - low) / scale), 0, 2**bits - 1) * scale + low
