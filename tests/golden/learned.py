"""Calibrations from integer formulas, and values for them: no model, no random generator, no eigenvectors.

The transform is a Hadamard matrix and the metric F = M'M with M of small integers, so that B F B' = 1 in whole numbers and every sum of an encoder
is exact in float32. In `UNITS`-ths of a step every coefficient is a whole number, and `UNITS` is odd: none lies where rounding could go either way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.calibration.files import seal
from kvstore.calibration.record import CLASSES, Calibration, CalibrationRecord
from kvstore.codecs.base import BITS
from kvstore.codecs.table_data import BASE, THIRDS
from kvstore.manifest import FORMAT, Layout
from kvstore.sources import text_digest
from kvstore.transforms.klt import Basis
from tests.golden.values import Bits, mixed

Ints = npt.NDArray[np.int64]
UNITS = 61
STEP = UNITS / 256
LEAST, HIGHEST, FALL = 12, 54, 84  # scale classes fall from the highest by 84 over all values of a group; few are kept
ROOTS = (1024, 1175, 1348, 1546, 1774, 2035, 2334, 2678)  # 3 ** (i / 8) * 1024
BELL = 148  # the deviation of a sum of four bytes
ONE = UNITS * BELL * 1024 * 27  # a step as `drawn` counts: 3 ** (class / 8) in 1 / 1024, class 24 a step
PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24}
EXEMPT, RAW, ESCAPED = 0, 4, 7  # token t is one of these where t is, up to the 24th, modulo 12


class Group(NamedTuple):
    """A group of layers in whole numbers: mean [D] in 1 / 4; all D synthesis rows [D, D] in 1 / 8, the first `rank` kept; scale classes [D]."""

    mean: Ints
    rows: Ints
    rank: int
    classes: Ints

    @property
    def dim(self) -> int:
        return len(self.mean)

    def analysis(self) -> Ints:
        """[D, D]: values in 1 / 32 times it are coefficients in `UNITS`-ths of a step."""
        turned = hadamard(self.dim)
        turned[1::2] += turned[::2]  # M' of pairs of channels
        return turned * (64 // self.dim)


def hadamard(size: int) -> Ints:
    """Sylvester's, of a power of two."""
    out = np.ones((1, 1), np.int64)
    while len(out) < size:
        out = np.block([[out, out], [out, -out]])
    return out


def group_of(dim: int) -> Group:
    """Nine sixteenths of the coefficients are kept, the last ones too rare to be coded for ordinary tokens."""
    rows = hadamard(dim).T.copy()
    rows[:, ::2] -= rows[:, 1::2]  # the inverse of M
    place = np.arange(dim)
    return Group((7 * place) % 9 - 4, rows, 9 * dim // 16, np.maximum(HIGHEST - place * FALL // dim, 0))


def groups_of(layout: Layout, group_layers: int) -> list[Group]:
    sizes = [min(group_layers, layout.layers - first) for first in range(0, layout.layers, group_layers)]
    return [group_of(size * 2 * layout.channels) for size in sizes]


@lru_cache(8)
def calibration(model: str, layout: Layout, group_layers: int, tiers: int) -> Calibration:
    """Groups of 16, 32 or 64 values a token."""
    groups = groups_of(layout, group_layers)
    record = CalibrationRecord(
        format=FORMAT, kind="calibration", model=model, layers=layout.layers, kv_heads=layout.kv_heads, head_dim=layout.head_dim, metric="fisher",
        group_layers=group_layers, tiers=tiers, step=STEP, least=LEAST, shrink=(0.125, 0.0625, 0.03125)[-tiers:], exempt=8.0,
        energy=tuple(map(_energy, groups)), ranks=tuple(g.rank for g in groups), tokens=1000, seed=0, kl=(0.045, 0.015, 0.005)[-tiers:],
        texts=(text_digest("a text to calibrate with"),), provenance={"kvstore": "golden", "machine": "none"}, files={},
    )  # fmt: skip
    weights = np.array([[*row, *[0] * (128 - len(row))] for row in BASE], np.uint16)
    classes = tuple(g.classes[: g.rank].astype(np.uint8) for g in groups)
    bases = tuple(_basis(g, layout.channels) for g in groups)
    return seal(Calibration("", record, bases, classes, weights, np.array(THIRDS[:CLASSES], np.uint16)))


def _basis(group: Group, channels: int) -> Basis:
    block, blocks = np.kron(np.eye(channels // 2, dtype=np.int64), np.array([[1, 1], [1, 2]])), group.dim // channels
    scale, metric_scale = np.full(group.rank, 1 / 4, np.float32), np.full(blocks, 64 / group.dim, np.float32)
    rows = (group.rows[: group.rank] / 2).astype(np.float16)
    return Basis((group.mean / 4).astype(np.float32), rows, scale, np.stack([block] * blocks).astype(np.float16), metric_scale)


def _energy(group: Group) -> float:
    """What values as `drawn` have on average, cut to whole numbers."""
    gains = (group.rows**2 * np.tile([1, 2], group.dim // 2)).sum(axis=1) * (64 // group.dim)  # in 1 / 64
    kept = zip(deviations(group)[: group.rank].tolist(), gains.tolist(), strict=False)
    return float(sum(d * d * gain for d, gain in kept) * UNITS**2 // (64 * 256**2 * (1024 * 27) ** 2))


def deviations(group: Group) -> Ints:
    """[D]: of coefficients in steps, times 1024 * 27."""
    return np.array([ROOTS[c % 8] * 3 ** (c // 8) for c in group.classes.tolist()])


def drawn(group: Group, number: int, token_ids: Ints) -> Ints:
    """Coefficients [D, tokens], a step being `ONE`: bell-shaped as their classes say; some tokens out of scale (see EXEMPT)."""
    place, tokens = np.arange(group.dim, dtype=np.uint64)[:, None] + np.uint64(1000 * number), len(token_ids)
    h = mixed(mixed(place * np.uint64(65537) + token_ids.astype(np.uint64)) + np.arange(tokens, dtype=np.uint32))
    bell = sum((h >> np.uint32(s) & np.uint32(255)).astype(np.int64) for s in (0, 8, 16, 24)) - 510
    out = bell * deviations(group)[:, None] * UNITS
    out[group.rank :] = 0
    at = {kind: [t for t in range(min(tokens, 24)) if t % 12 == kind] for kind in (EXEMPT, RAW, ESCAPED)}
    loud = at[EXEMPT] + at[RAW]
    out[0, loud] = 10 * BELL * deviations(group)[0] * UNITS + np.abs(out[0, loud])
    out[group.rank : group.rank + 4, at[RAW]] = 300 * ONE  # where the transform has no coefficient
    out[group.rank // 2, at[ESCAPED]] += 40 * ONE
    out[3 * group.rank // 4, at[ESCAPED]] -= 11 * ONE
    return out


def whole(layout: Layout, group_layers: int, token_ids: tuple[int, ...]) -> Ints:
    """Values in 1 / 32 [layers, 2, tokens, channels], as precise as the dtype is."""
    parts = []
    for number, group in enumerate(groups_of(layout, group_layers)):
        sums = group.rows.T @ drawn(group, number, np.array(token_ids))
        unit = ONE * 256 // (4 * UNITS)
        values = (2 * sums + unit) // (2 * unit) + 8 * group.mean[:, None]
        parts.append(values.reshape(-1, 2, layout.channels, len(token_ids)).transpose(0, 1, 3, 2))
    return _cut(np.concatenate(parts), PRECISION[layout.dtype])


def _cut(values: Ints, bits: int) -> Ints:
    """Towards zero, to so many significant bits."""
    size = np.abs(values)
    spare = np.maximum(np.frexp(size.astype(np.float64))[1] - bits, 0)
    return np.sign(values) * (size >> spare << spare)


def bits_of(values: Ints, dtype: str) -> Bits:
    """Bit patterns of what `whole` gives."""
    floats: Any = (values / 32).astype(np.float32)
    if dtype == "bfloat16":
        return (floats.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return floats.astype(np.float16 if dtype == "float16" else np.float32).view(BITS[dtype])


def levels(group: Group, values: Ints, step_class: int) -> Ints:
    """Levels [tokens, rank] of the finest tier for values [layers, 2, tokens, channels] of the group in 1 / 32: the whole of rounding."""
    x = values.transpose(2, 0, 1, 3).reshape(values.shape[2], -1) - 8 * group.mean
    exact = x @ group.analysis()[:, : group.rank]
    up, down = 3 ** max(-step_class, 0), UNITS * 3 ** max(step_class, 0)
    return (2 * exact * up + down) // (2 * down)
