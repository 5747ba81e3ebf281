"""Floating-point formats: bfloat16, and float8 (e4m3) with one scale a tensor or one a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import Floats, Method, Version, rounded_to_bfloat16, rounded_to_e4m3


@dataclass(frozen=True)
class Bfloat16(Method):
    @property
    def name(self) -> str:
        return "bf16"

    @property
    def settings(self) -> Sequence[str]:
        return ["as is"]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        return [Version(rounded_to_bfloat16(kv), {"all": kv.size * 2})]


@dataclass(frozen=True)
class Float8(Method):
    """Scaled so that the largest magnitude of a layer's keys or values (or of a token's) becomes 448; scales in float32."""

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def settings(self) -> Sequence[str]:
        return ["a scale a tensor", "a scale a token"]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        versions = []
        for axes in ((2, 3), (3,)):
            scale = np.maximum(np.abs(kv).max(axes, keepdims=True), 1e-20) / 448
            versions.append(Version(rounded_to_e4m3(kv / scale) * scale, {"all": kv.size + 4 * scale.size}))
        return versions
