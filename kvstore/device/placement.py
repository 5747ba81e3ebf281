"""Where decoded rows go: the tokens of which units to which rows of which layers, and how their keys are turned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.errors import InputError
from kvstore.families.rope import Angles
from kvstore.manifest import RopeRecord

KV = tuple[Tensor, Tensor]
ROWS = 8  # rows of one head that a program places
KINDS = (torch.bfloat16, torch.float16, torch.float32)  # as `place_kernels` numbers them
I64 = npt.NDArray[np.int64]


class Target(NamedTuple):
    """int64 [units] each: token t of unit u, first[u] <= t < end[u], goes to cache row row[u] + t, and its key is turned to position[u] + t."""

    row: I64
    position: I64
    first: I64
    end: I64


@dataclass(frozen=True)
class Run:
    """Layers one after another whose tensors lie evenly in memory and whose keys are turned alike: one launch. `first` of the group's layers."""

    first: int
    layers: int
    keys: Tensor
    values: Tensor
    steps: tuple[int, int]
    rope: RopeRecord | None
    angles: Angles | None


class Place:
    """A target, checked, on the device. Raises InputError for rows or positions that caches or angles do not have."""

    def __init__(
        self,
        target: Target,
        tokens: I64,
        caches: Sequence[KV],
        ropes: Sequence[RopeRecord | None],
        angles: Sequence[Angles | None],
        device: torch.device,
    ):
        self.units, self.kind = len(tokens), KINDS.index(caches[0][0].dtype)
        _check(target, tokens, min(int(t.shape[2]) for kv in caches for t in kv), [len(a.cos) for a in angles if a is not None])
        numbers = torch.from_numpy(np.stack(target).astype(np.int32))
        self.targets = (numbers.pin_memory() if device.type == "cuda" else numbers).to(device, non_blocking=True)
        self.runs = _runs(caches, ropes, angles)


def _check(target: Target, tokens: I64, rows: int, positions: Sequence[int]) -> None:
    used = target.end > target.first
    row, position, first, end = (numbers[used] for numbers in target)
    good = [len(used) == len(tokens) and (first >= 0).all() and (end <= tokens[used]).all(), (row + first >= 0).all(), (row + end <= rows).all()]
    good += [(position + first >= 0).all(), *((position + end <= count).all() for count in positions)]
    if not all(good):
        raise InputError(f"units that do not fit a cache of {rows:,} rows and angles of {list(positions)} positions")


def _runs(caches: Sequence[KV], ropes: Sequence[RopeRecord | None], angles: Sequence[Angles | None]) -> list[Run]:
    """One launch for as many layers as can share it: a slab of all layers needs one a group."""
    runs: list[Run] = []
    for layer, (kv, rope, angle) in enumerate(zip(caches, ropes, angles, strict=True)):
        last = runs[-1] if runs else None
        if last is not None and (joined := _joined(last, kv, rope, angle)) is not None:
            runs[-1] = joined
        else:
            runs.append(Run(layer, 1, _as_integers(kv[0]), _as_integers(kv[1]), (0, 0), rope, angle))
    return runs


def _as_integers(tensor: Tensor) -> Tensor:
    if tensor.stride(-1) != 1 or tensor.shape[0] != 1:
        raise InputError(f"a cache of strides {tensor.stride()} and shape {tuple(tensor.shape)}", remedy="allocate [1, heads, tokens, head_dim]")
    return tensor.view(torch.int32 if tensor.dtype.itemsize == 4 else torch.int16)


def _joined(run: Run, kv: KV, rope: RopeRecord | None, angles: Angles | None) -> Run | None:
    """`run` with one more layer, None where that does not lie as far from the last as that from the one before, or is turned otherwise."""
    if rope != run.rope or angles is not run.angles:
        return None
    steps = []
    for known, tensor, step in zip((run.keys, run.values), kv, run.steps, strict=True):
        distance, rest = divmod(tensor.data_ptr() - known.data_ptr(), tensor.dtype.itemsize * run.layers)
        if rest or tensor.stride() != known.stride() or tensor.untyped_storage().data_ptr() != known.untyped_storage().data_ptr():
            return None
        if run.layers > 1 and distance != step:
            return None
        steps.append(distance)
    return Run(run.first, run.layers + 1, run.keys, run.values, (steps[0], steps[1]), rope, angles)


def place_rows(sums: Tensor, mean: Tensor, factor: float, names: Tensor, place: Place) -> None:
    """Launch the placing of `sums` float32 [rows, D], times `factor` plus `mean`; `names` int32 [rows]: unit << 12 | token, or -1."""
    from kvstore.device import place_kernels

    count, size = sums.shape
    for run in place.runs:
        _, heads, _, width = run.keys.shape
        half = 0 if run.rope is None or run.angles is None else run.rope.dim // 2
        cos, sin = (names, names) if run.angles is None else (_bits(run.angles.cos), _bits(run.angles.sin))
        product = place.kind if run.angles is None else KINDS.index(run.angles.cos.dtype)
        place_kernels.place[(-(-count // ROWS), 2 * run.layers * heads)](
            sums, mean, names, place.targets, run.keys, run.values, cos, sin, 0, count, place.units, factor, 2 * run.first, heads, width, size,
            0 if run.rope is None else run.rope.start, half, run.steps[0], run.keys.stride(1), run.keys.stride(2), run.steps[1],
            run.values.stride(1), run.values.stride(2), KIND=place.kind, PRODUCT=product,
            INTERLEAVED=run.rope is not None and run.rope.layout == "interleaved", ROWS=ROWS, WIDTH=1 << (width - 1).bit_length(),
            enable_fp_fusion=False,
        )  # fmt: skip


def _bits(angles: Tensor) -> Tensor:
    return angles.contiguous().view(torch.int32 if angles.dtype.itemsize == 4 else torch.int16)
