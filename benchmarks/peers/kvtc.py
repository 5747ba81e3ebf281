"""KVTC (arXiv 2511.01815): principal components of all layers, an exact bit plan, fixed-width blocks, DEFLATE.

Keys (before RoPE) and values apart. A block of consecutive components is left out, int2, int4 or float8, and carries a 16-bit shift and a 16-bit
scale a token; dynamic programming finds the blocks with the least squared error within the budget of bits a token. One plan serves all tokens. The
whole document is packed and deflated. As published the first four tokens are float8 and the last 128 plain 16 bit; also measured without.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from .base import Floats, Method, Version, rounded_to_bfloat16, rounded_to_e4m3
from .pca import Components

SIZES = (1, 16, 64, 256, 1024)
WIDTHS = (0, 2, 4, 8)  # bits a component: left out, int2, int4, float8
SIDE = 32  # bits of shift and scale
UNIT = 2  # every cost is a multiple of these bits
SINKS, RECENT = 4, 128
Plan = tuple[tuple[int, int, int], ...]
"""(first component, one past the last, bits) of each block that is not left out."""


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _e4m3(x: float) -> float:
    magnitude = min(abs(x), 448.0)
    if magnitude < 2.0**-10:
        return 0.0
    step = math.ldexp(1.0, max(math.frexp(magnitude)[1] - 1, -6) - 3)
    return np.copysign(min(np.rint(magnitude / step) * step, 448.0), x)


@numba.njit(nogil=True, error_model="numpy", cache=True)
def block_errors(c: npt.NDArray[np.float32], sizes: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Squared error [start, size, width] of coding components start : start + size (cut at the end) of all tokens c [tokens, r]."""
    tokens, r = c.shape
    out = np.zeros((r, len(sizes), len(widths)))
    for start in range(r):
        for s in range(len(sizes)):
            stop = min(start + sizes[s], r)
            for t in range(tokens):
                low, high = c[t, start], c[t, start]
                for k in range(start, stop):
                    low, high = min(low, c[t, k]), max(high, c[t, k])
                for w in range(len(widths)):
                    bits = widths[w]
                    zero = low if bits < 8 else 0.5 * (low + high)
                    scale = (high - low) / (2.0**bits - 1) if bits < 8 else 0.5 * (high - low) / 448.0
                    error = 0.0
                    for k in range(start, stop):
                        x = np.float64(c[t, k])
                        if bits == 0:
                            back = 0.0
                        elif scale <= 0:
                            back = zero
                        elif bits == 8:
                            back = _e4m3((x - zero) / scale) * scale + zero
                        else:
                            back = np.rint((x - zero) / scale) * scale + zero
                        error += (x - back) ** 2
                    out[start, s, w] += error
    return out


@numba.njit(nogil=True, error_model="numpy", cache=True)
def _best(errors: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64], costs: npt.NDArray[np.int64], budget: int) -> npt.NDArray[np.int64]:
    """(first, one past the last, width index) of the blocks of least error, last first; `costs` [width, length] and `budget` in UNITs."""
    r, kinds, widths = errors.shape
    least = np.full((r + 1, budget + 1), np.inf)
    choice = np.full((r + 1, budget + 1), -1, np.int32)
    least[0, 0] = 0.0
    for i in range(r):
        for s in range(kinds):
            stop = min(i + sizes[s], r)
            for w in range(widths):
                cost = costs[w, stop - i]
                for b in range(budget + 1 - cost):
                    total = least[i, b] + errors[i, s, w]
                    if total < least[stop, b + cost]:
                        least[stop, b + cost] = total
                        choice[stop, b + cost] = s * widths + w + kinds * widths * min(sizes[s], r - i)
    least_at = np.argmin(least[r])
    out = np.full((r, 3), -1, np.int64)
    i, b, n = r, least_at, 0
    while i > 0:
        code = choice[i, b]
        length, rest = code // (kinds * widths), code % (kinds * widths)
        w = rest % widths
        out[n, 0], out[n, 1], out[n, 2] = i - length, i, w
        b -= costs[w, length]
        i -= length
        n += 1
    return out[:n]


def plan(errors: npt.NDArray[np.float64], budget: int, sizes: Sequence[int] = SIZES, widths: Sequence[int] = WIDTHS) -> Plan:
    """The blocks of least error within `budget` bits a token, exactly. `errors` as `block_errors` returns them."""
    r = len(errors)
    costs = np.array([[(0 if w == 0 else (SIDE + w * n)) // UNIT for n in range(r + 1)] for w in widths])
    found = _best(errors, np.array(sizes), costs, budget // UNIT)
    return tuple((int(first), int(stop), widths[w]) for first, stop, w in found[::-1] if widths[w])


@dataclass(frozen=True)
class Trained:
    """The components and their tables of errors, keys and values."""

    components: Components
    errors: tuple[npt.NDArray[np.float64], ...]


def train(components: Components, tokens: int = 256) -> Trained:
    chosen = [s[:: max(1, len(s) // tokens)] for s in components.samples]
    return Trained(components, tuple(block_errors(np.ascontiguousarray(s), np.array(SIZES), np.array(WIDTHS)) for s in chosen))


@dataclass(frozen=True)
class Kvtc(Method):
    """`ratio`: 16-bit values over the planned bits, before DEFLATE; keys and values get the same."""

    trained: Trained
    ratio: int
    plans: tuple[Plan, ...]

    @staticmethod
    def at(trained: Trained, ratio: int) -> Kvtc:
        return Kvtc(trained, ratio, tuple(plan(e, 16 * len(e) // ratio) for e in trained.errors))

    @property
    def name(self) -> str:
        return "KVTC"

    @property
    def settings(self) -> Sequence[str]:
        return [f"{self.ratio}x, {what}" for what in ("sinks and window", "sinks, no window", "no sinks, no window")]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        return [self._version(kv, *exempt) for exempt in ((SINKS, RECENT), (SINKS, 0), (0, 0))]

    def _version(self, kv: Floats, sinks: int, recent: int) -> Version:
        """`all`: as published, deflated; `packed`: before DEFLATE."""
        out, tokens = kv.copy(), kv.shape[2]
        end = max(sinks, tokens - recent)
        first, last = kv[:, :, :sinks], kv[:, :, end:]
        out[:, :, :sinks], out[:, :, end:] = rounded_to_e4m3(first), rounded_to_bfloat16(last)
        out[:, :, sinks:end], packed = self.transformed(kv[:, :, sinks:end])
        plain = first.size + 2 * last.size
        return Version(out, {"all": plain + min(map(deflated, packed)), "packed": plain + len(packed[0])})

    def transformed(self, kv: Floats) -> tuple[Floats, tuple[bytes, bytes]]:
        """Back from the components, and the packed bytes token by token and byte column by byte column: the better order is counted."""
        coefficients = self.trained.components.analyse(kv)
        coded = [apply(plan, c) for plan, c in zip(self.plans, coefficients, strict=True)]
        rows = np.concatenate([row for _, row in coded], 1)
        return self.trained.components.synthesise([c for c, _ in coded], kv.shape), (rows.tobytes(), rows.T.tobytes())


def deflated(data: bytes) -> int:
    """Bytes of the stream with zlib's default strategy or Huffman codes alone, whichever is shorter."""
    coders = (zlib.compressobj(6, zlib.DEFLATED, -15, 8, strategy) for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY))
    return min(len(c.compress(data) + c.flush()) for c in coders)


def apply(blocks: Plan, c: Floats) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Coefficients [tokens, r] as decoded, and the bytes of each token: shifts and scales, then the codes of each width packed."""
    back, sides = np.zeros_like(c), [np.empty((len(c), 0), np.uint8)]
    codes: dict[int, list[npt.NDArray[np.uint8]]] = {2: [], 4: [], 8: []}
    for first, stop, bits in blocks:
        back[:, first:stop], shift, scale, found = _block(c[:, first:stop], bits)
        sides.append(np.concatenate([shift, scale], 1).astype("<f2").view(np.uint8))
        codes[bits].append(found)
    packed = [_packed(np.concatenate(found, 1), bits) for bits, found in codes.items() if found]
    return back, np.concatenate([*sides, *packed], 1)


def _block(x: Floats, bits: int) -> tuple[Floats, Floats, Floats, npt.NDArray[np.uint8]]:
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    shift = (low if bits < 8 else (low + high) / 2).astype(np.float16).astype(np.float32)
    span = np.maximum(high - shift, shift - low if bits == 8 else 0) / (2**bits - 1 if bits < 8 else 448)
    scale = span.astype(np.float16).astype(np.float32)
    divisor = np.where(scale > 0, scale, np.float32(1))
    if bits == 8:
        found = rounded_to_e4m3((x - shift) / divisor)
        return found * scale + shift, shift, scale, _e4m3_codes(found)
    levels = np.clip(np.rint((x - shift) / divisor), 0, 2**bits - 1)
    return levels * scale + shift, shift, scale, levels.astype(np.uint8)


def _e4m3_codes(x: Floats) -> npt.NDArray[np.uint8]:
    """The 8 bits of values that float8 e4m3 holds."""
    magnitude = np.abs(x)
    exponent = np.clip(np.floor(np.log2(np.maximum(magnitude, 1e-30))), -6, 8)
    mantissa = np.rint(magnitude / np.exp2(exponent - 3))  # 8 ... 15, below 8 for subnormals
    code = np.where(mantissa >= 8, (exponent + 7) * 8 + mantissa - 8, mantissa)
    return (code.astype(np.uint8) | (np.signbit(x).astype(np.uint8) << 7)).astype(np.uint8)


def _packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes [tokens, n] of `bits` each in whole bytes a token and block."""
    each = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each))).reshape(len(codes), -1, each)
    return np.bitwise_or.reduce(padded << (bits * np.arange(each, dtype=np.uint8)), 2).astype(np.uint8)
