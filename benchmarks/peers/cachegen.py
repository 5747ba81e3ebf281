"""CacheGen as LMCache 0.5 ships it (paper: arXiv 2310.07240): keys after RoPE, no anchors, no deltas.

Per layer, kind and token the largest magnitude becomes bins // 2 - 1; symbols are rounded, coded per layer and channel with a 16-bit table made
from the chunk's own histogram and stored with it. All 32 bins where a model has fewer than ten layers, else keys 32 in layers 0-9 and values 32 in
layers 0-1, 16 after. Streams are costed at their ideal length plus two bits, in whole bytes; the rest as the container has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.codecs.cachegen import simulate

from .base import Floats, Geometry, Method, Version, rounded_to_bfloat16

SUBCHUNK = 256  # tokens a stream
CHUNKS = (256, 2048)
CONTAINER, CONTAINER_STREAMS = 1126, 581  # bytes of the pickle beside its tensors: fixed, and per 256 tokens
Symbols = npt.NDArray[np.int64]


def shipped_bins(layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bins of the keys and of the values, per layer."""
    if layers < 10:
        return (32,) * layers, (32,) * layers
    return tuple(32 if i < 10 else 16 for i in range(layers)), tuple(32 if i < 2 else 16 for i in range(layers))


def symbols_of(kv: Floats, largest: Floats) -> tuple[Symbols, Floats]:
    """Symbols 0 ... 2 * largest, and the scales [layers, 2, tokens, 1]; `largest` [layers, 2, 1, 1] is bins // 2 - 1."""
    scale = rounded_to_bfloat16(np.abs(kv).max(-1, keepdims=True))
    symbols = np.rint(kv * (largest / np.maximum(scale, 1e-30)) + largest)
    return np.clip(symbols, 0, 2 * largest).astype(np.int64), scale


def histogram(symbols: Symbols, bins: int) -> Symbols:
    """int64 [layers, 2, channels, bins] over tokens."""
    layers, kinds, _, channels = symbols.shape
    rows = np.arange(layers * kinds * channels).reshape(layers, kinds, 1, channels)
    counts = np.bincount((rows * bins + symbols).ravel(), minlength=rows.size * bins)
    return counts.reshape(layers, kinds, channels, bins)


def stream_bytes(counts: Symbols, tables: Symbols) -> float:
    """Bytes of one stream a row of `counts`, coded with 16-bit tables made from the histograms `tables` as LMCache does."""
    bins, tokens = tables.shape[-1], tables.sum(-1, keepdims=True)
    below = np.concatenate([np.zeros_like(tokens), tables.cumsum(-1)], -1)
    cdf = (65535 - bins) * below // tokens + np.arange(bins + 1)
    cdf[..., -1] = 65536
    bits = -(counts * np.log2(np.diff(cdf) / 65536)).sum(-1)
    return float(np.ceil((bits + 2) / 8).sum())


@dataclass(frozen=True)
class CacheGen(Method):
    """`factor` times the shipped bins. `learnt` are histograms [layers, 2, channels, bins] of calibration text for tables that cost nothing.
    With `streams` the shipped sizes are those of real streams, by kvstore's codec `cachegen`, else ideal lengths, which are 0.1 % longer.

    Counted four ways: chunks of 256 and of 2,048 tokens as shipped; with calibrated tables that are free; and at the document's own empirical
    entropy, a bound that no coder reaches. The free ones pay the ideal length and the scales.
    """

    geometry: Geometry
    factor: float = 1.0
    learnt: Symbols | None = None
    streams: bool = False

    @property
    def name(self) -> str:
        return "CacheGen" if self.rotated else "CacheGen on keys before RoPE"

    @property
    def settings(self) -> Sequence[str]:
        return [f"bins x{self.factor:g}"]

    @property
    def largest(self) -> Floats:
        keys, values = shipped_bins(self.geometry.layers)
        bins = np.array([keys, values], np.float32).T[..., None, None] * self.factor
        return (bins // 2 - 1).astype(np.float32)

    @property
    def bins(self) -> int:
        return 2 * int(self.largest.max()) + 2

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        symbols, scale = symbols_of(kv, self.largest)
        values = (symbols - self.largest) / self.largest * scale
        counts = {f"chunk {chunk}": self._coded(kv, chunk) if self.streams else self._shipped(symbols, chunk) for chunk in CHUNKS}
        whole = histogram(symbols, self.bins)
        counts["own entropy"] = _ideal(whole, whole) + 2 * scale.size
        if self.learnt is not None:
            counts["tables free"] = _ideal(whole, self.learnt * 64 + 1) + 2 * scale.size
        return [Version(values.astype(np.float32), counts)]

    def _coded(self, kv: Floats, chunk: int) -> float:
        table = "lmcache" if self.factor == 1 else f"{self.bins}:{self.bins}"
        return simulate(np.ascontiguousarray(kv.swapaxes(0, 1)), table, chunk, dtype="bfloat16").sizes.shipped

    def _shipped(self, symbols: Symbols, chunk: int) -> float:
        layers, kinds, tokens, channels = symbols.shape
        total = 2.0 * layers * kinds * tokens
        for start in range(0, tokens, chunk):
            part = symbols[:, :, start : start + chunk]
            table = histogram(part, self.bins)
            pieces = [part[:, :, s : s + SUBCHUNK] for s in range(0, part.shape[2], SUBCHUNK)]
            total += sum(stream_bytes(histogram(piece, self.bins), table) for piece in pieces)
            total += layers * kinds * channels * (2 * (self.bins + 1) + 4 * len(pieces)) + CONTAINER + CONTAINER_STREAMS * len(pieces)
        return total


def _ideal(counts: Symbols, tables: Symbols) -> float:
    """Bytes of symbols with histograms `counts` under the frequencies `tables`."""
    p = tables / tables.sum(-1, keepdims=True)
    return float(-(counts * np.log2(np.where(counts > 0, p, 1))).sum() / 8)
