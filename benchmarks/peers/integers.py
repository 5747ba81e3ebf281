"""Integers with a scale and zero a group: int8 a token, and KIVI (arXiv 2402.02750): keys per channel, values per token.

KIVI works on keys after RoPE. Its residual (R = 128: values of the last R tokens and keys beyond the last multiple of R stay in 16 bits) is
measured as published and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import Floats, Geometry, Method, Version, affine, half, rounded_to_bfloat16

RESIDUAL = 128


@dataclass(frozen=True)
class Int8(Method):
    """Symmetric, one float16 scale a token, layer, kind and head."""

    geometry: Geometry

    @property
    def name(self) -> str:
        return "int8"

    @property
    def settings(self) -> Sequence[str]:
        return ["a scale a token and head"]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        heads = kv.reshape(*kv.shape[:3], self.geometry.kv_heads, self.geometry.head_dim)
        scale = np.maximum(half(np.abs(heads).max(-1, keepdims=True) / 127), 1e-7)
        back = np.clip(np.rint(heads / scale), -127, 127) * scale
        return [Version(back.reshape(kv.shape).astype(np.float32), {"all": kv.size + 2 * scale.size})]


@dataclass(frozen=True)
class Kivi(Method):
    """`bits` a value; groups of `group` tokens for keys and of `group` channels for values."""

    bits: int
    group: int = 32
    residual: bool = False

    @property
    def name(self) -> str:
        return "KIVI, 128 recent in 16 bit" if self.residual else "KIVI"

    @property
    def settings(self) -> Sequence[str]:
        return [f"int{self.bits}, groups of {self.group}"]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        tokens = kv.shape[2]
        plain_keys, plain_values = (tokens % RESIDUAL, min(tokens, RESIDUAL)) if self.residual else (0, 0)
        out = rounded_to_bfloat16(kv)
        size = 2 * kv[:, 0, tokens - plain_keys :].size + 2 * kv[:, 1, tokens - plain_values :].size
        size += self._keys(kv[:, 0, : tokens - plain_keys], out[:, 0]) + self._values(kv[:, 1, : tokens - plain_values], out[:, 1])
        return [Version(out, {"all": size})]

    def _keys(self, keys: Floats, out: Floats) -> float:
        """Per channel over groups of tokens; a last group may be shorter. Bytes."""
        layers, tokens, channels = keys.shape
        for start in range(0, tokens, self.group):
            part = keys[:, start : start + self.group].swapaxes(1, 2)
            out[:, start : start + part.shape[-1]] = affine(part, self.bits).swapaxes(1, 2)
        return keys.size * self.bits / 8 + 4 * layers * channels * -(-tokens // self.group)

    def _values(self, values: Floats, out: Floats) -> float:
        grouped = values.reshape(*values.shape[:2], -1, self.group)
        out[:, : values.shape[1]] = affine(grouped, self.bits).reshape(values.shape)
        return values.size * self.bits / 8 + 4 * values.size / self.group
