"""transformers' QuantizedCache with its defaults: backend quanto, axis 0 for keys and values, groups of 64, residual length 128.

quanto on axis 0 cuts the contiguous tensor [batch, heads, tokens, head_dim] into runs of 64 values (a token of a head of 64, two of heads of 32),
each with scale (largest - smallest) / (2**bits - 1) and a float zero. Backends are optional installs, so the arithmetic is repeated here; HQQ on
axis 1 has the same groups. The residual of 128 holds tokens appended one by one: what is prefilled in one piece is quantized whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Floats, Geometry, Method, Version, affine

GROUP = 64


@dataclass(frozen=True)
class QuantizedCache(Method):
    geometry: Geometry
    bits: int

    @property
    def name(self) -> str:
        return "HF QuantizedCache"

    @property
    def settings(self) -> Sequence[str]:
        return [f"int{self.bits}, groups of {GROUP}"]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        g = self.geometry
        by_head = kv.reshape(g.layers, 2, -1, g.kv_heads, g.head_dim).swapaxes(2, 3)
        back = affine(by_head.reshape(-1, GROUP), self.bits).reshape(by_head.shape).swapaxes(2, 3).reshape(kv.shape)
        return [Version(back, {"all": kv.size * self.bits / 8 + 4 * kv.size / GROUP})]
