"""Which rotation explains how cached keys move with their position: by tables that the model holds, else by a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kvstore.families.rope import residual, unrotate
from kvstore.manifest import RopeRecord

HalfOrInterleaved = Literal["half", "interleaved"]
LAYOUTS: tuple[HalfOrInterleaved, ...] = ("half", "interleaved")
KeysAt = Callable[[int], Tensor]
"""Position -> keys [n, kv_heads, head_dim] of n fixed tokens, each cached alone at that position."""


@dataclass(frozen=True)
class Table:
    """A vector of frequencies in the model: `name` is its path, `values` float32 [dim / 2]."""

    name: str
    values: Tensor


@dataclass(frozen=True)
class Fit:
    """One hypothesis and its residual; `table` None: frequencies were fitted. Scaling and arithmetic are still open."""

    record: RopeRecord
    table: str | None
    residual: float

    def describe(self) -> str:
        r = self.record
        source = self.table or "fitted frequencies"
        return f"channels {r.start}:{r.start + r.dim}, {r.layout}, {source}: residual {self.residual:.2g}"


def tables(model: nn.Module, head_dim: int) -> list[Table]:
    """The model's 1-D float buffers that could be frequencies for heads of `head_dim`, by shape; equal ones once."""
    found: dict[bytes, Table] = {}
    for name, buffer in model.named_buffers():
        values = buffer.detach().squeeze()
        if not values.is_floating_point() or values.ndim != 1 or not 0 < 2 * values.numel() <= head_dim:
            continue
        values = values.float().cpu().clone()
        found.setdefault(values.numpy().tobytes(), Table(name, values))
    return list(found.values())


def moved(a: Tensor, b: Tensor) -> float:
    """How far `b` lies from `a`, relative to `a`: 0 where position changes nothing."""
    return residual(b, a)


def fit_rotation(keys_at: KeysAt, known: list[Table], offsets: list[int], dtype: torch.dtype, limit: float) -> Fit | None:
    """The best rotation for one layer, by the residual of keys turned back from `offsets` against position 0.

    Tables of the model come first; frequencies are fitted only where none explains the keys up to `limit`. None: nothing to try.
    """
    fits = [check(keys_at, offsets, *placed) for placed in _from_tables(known, keys_at(0).shape[-1])]
    best = min(fits, key=_residual, default=None)
    if best is not None and best.residual <= limit:
        return best
    fitted = fit_frequencies(keys_at, offsets, dtype, limit)
    return min((fit for fit in (best, fitted) if fit is not None), key=_residual, default=None)


def _residual(fit: Fit) -> float:
    return fit.residual


def check(keys_at: KeysAt, offsets: list[int], record: RopeRecord, table: str | None) -> Fit:
    """The residual of one hypothesis: the worst of all offsets, relative to the rotated channels."""
    base = keys_at(0).float()
    rotated = base[..., record.start : record.start + record.dim].norm()
    worst = 0.0
    for offset in offsets:
        back = unrotate(keys_at(offset).float(), torch.full((base.shape[-2],), offset), record)
        worst = max(worst, float((back - base).norm() / rotated))
    return Fit(record, table, worst)


def _from_tables(known: list[Table], width: int) -> Iterator[tuple[RopeRecord, str]]:
    for table in known:
        for sign in (1.0, -1.0):  # some models turn the other way: the same rotation with negative frequencies
            for record in _placements(table.values * sign, width):
                yield record, table.name


def _placements(inv_freq: Tensor, width: int) -> Iterator[RopeRecord]:
    """The table at the start and at the end of the head, in both layouts."""
    dim = 2 * inv_freq.numel()
    for start in sorted({0, width - dim}):
        for layout in LAYOUTS:
            yield make_record(start, layout, inv_freq)


def make_record(start: int, layout: HalfOrInterleaved, inv_freq: Tensor) -> RopeRecord:
    data = inv_freq.detach().cpu().numpy().astype("<f4")
    return RopeRecord(start, 2 * data.size, layout, data.tobytes().hex(), 1.0, "float32", "unnamed")


def fit_frequencies(keys_at: KeysAt, offsets: list[int], dtype: torch.dtype, limit: float) -> Fit | None:
    """Frequencies measured from how the keys turn, for every slice at either end that covers the channels that move.

    Each pair's angle per token is read at position 1 and sharpened at positions growing 32-fold, where the value so far
    tells the number of whole turns. All of `offsets` must agree. Of slices that explain the keys, the narrowest.
    """
    steps = growing(offsets[-1])
    fits = []
    for start, dim in _spans(keys_at, steps, dtype):
        for layout in LAYOUTS:
            record = make_record(start, layout, _frequencies(keys_at, steps, start, dim, layout))
            fits.append(check(keys_at, sorted({*steps, *offsets}), record, None))
    good = [fit for fit in fits if fit.residual <= limit]
    if good:
        return min(good, key=lambda fit: (fit.record.dim, fit.residual))
    return min(fits, key=_residual, default=None)


def _spans(keys_at: KeysAt, offsets: list[int], dtype: torch.dtype) -> list[tuple[int, int]]:
    """(start, dim) of the slices at the start and at the end of the head that hold every channel that moves."""
    lowest, highest = _moving_channels(keys_at, offsets, dtype)
    width = keys_at(0).shape[-1]
    spans = [(0, dim) for dim in range(2, width + 1, 2) if dim >= highest]
    return spans + [(width - dim, dim) for dim in range(2, width, 2) if width - dim <= lowest]


def growing(furthest: int) -> list[int]:
    """1, 32, 1024 ... and `furthest`."""
    offsets = [1]
    while offsets[-1] * 32 < furthest:
        offsets.append(offsets[-1] * 32)
    return sorted({*offsets, furthest})


def _moving_channels(keys_at: KeysAt, offsets: list[int], dtype: torch.dtype) -> tuple[int, int]:
    """First and one past the last channel that differs between positions."""
    base = keys_at(0).float()
    change = torch.stack([(keys_at(d).float() - base).norm(dim=(0, 1)) for d in offsets]).amax(0)
    moving = torch.nonzero(change > torch.finfo(dtype).eps * base.norm(dim=(0, 1))).flatten().tolist()
    return (moving[0], moving[-1] + 1) if moving else (0, 0)


def _frequencies(keys_at: KeysAt, offsets: list[int], start: int, dim: int, layout: HalfOrInterleaved) -> Tensor:
    """float32 [dim / 2], radians a token."""
    base = _complex(keys_at(0), start, dim, layout)
    frequency = np.zeros(dim // 2)
    for offset in offsets:
        turned = _complex(keys_at(offset), start, dim, layout)
        angle = np.angle((base.conj() * turned).sum(axis=(0, 1)))
        behind = angle - frequency * offset
        frequency += (behind - 2 * np.pi * np.round(behind / (2 * np.pi))) / offset
    return torch.from_numpy(frequency.astype(np.float32))


def _complex(keys: Tensor, start: int, dim: int, layout: HalfOrInterleaved) -> np.ndarray:
    x = keys[..., start : start + dim].double().numpy()
    a, b = (x[..., : dim // 2], x[..., dim // 2 :]) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    return a + 1j * b
