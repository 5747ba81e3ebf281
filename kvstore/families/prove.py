"""Proof that keys seen before their rotation become the cached ones, and with which scaling and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from kvstore.families.capture import complete, views
from kvstore.families.probe import Seen
from kvstore.families.rope import residual, rotate, tolerance
from kvstore.manifest import RopeRecord

Arithmetic = Literal["model", "float32", "rounded"]
ARITHMETICS: tuple[Arithmetic, ...] = ("model", "float32", "rounded")


@dataclass(frozen=True)
class Proof:
    """`record` with scaling and arithmetic. `residual`: the worst layer's; `exact`: every layer equal bit for bit."""

    record: RopeRecord
    residual: float
    exact: bool


def prove(record: RopeRecord, samples: Sequence[Seen], scalings: Sequence[float]) -> Proof | None:
    """The scaling and arithmetic that turn tensors seen into the cached keys, over all layers of one rope.

    `scalings`: numbers that may be the measured one exactly. None where rounding does not explain what remains: then
    nothing that the layers gave to functions is their keys before RoPE.
    """
    proofs = [_score(record, samples, scaling, a) for scaling in _scalings(record, samples, scalings) for a in ARITHMETICS]
    best = min(proofs, key=lambda p: (not p.exact, p.residual), default=None)
    if best is None or best.residual > _tolerance(samples):
        return None
    return best


def nearby_floats(model: nn.Module, table: str | None) -> list[float]:
    """Plain float attributes of the module that owns `table`: one of them may be its scaling."""
    if table is None:
        return []
    owner = model.get_submodule(table.rpartition(".")[0])
    return [v for v in vars(owner).values() if isinstance(v, float) and v > 0]


def _tolerance(samples: Sequence[Seen]) -> float:
    return tolerance(samples[0].keys.dtype, max(int(s.positions[-1]) for s in samples))


def _score(record: RopeRecord, samples: Sequence[Seen], scaling: float, arithmetic: Arithmetic) -> Proof:
    record = msgspec.structs.replace(record, scaling=scaling, arithmetic=arithmetic)
    found = [_best(record, sample) for sample in samples]
    return Proof(record, max(r for r, _ in found), all(exact for _, exact in found))


def _best(record: RopeRecord, sample: Seen) -> tuple[float, bool]:
    """Residual, and whether it is bit for bit, of the tensor that does best in one layer."""
    best = (float("inf"), False)
    for whole in _wholes(record, sample):
        got, want = rotate(whole, sample.positions, record), sample.keys[0]
        if torch.equal(got, want):
            return 0.0, True
        best = min(best, (residual(got, want), False))
    return best


def _wholes(record: RopeRecord, sample: Seen) -> Iterator[Tensor]:
    keys = sample.keys[0]
    return (complete(view, keys, record) for view in views(sample.candidates, keys, record))


def _scalings(record: RopeRecord, samples: Sequence[Seen], known: Sequence[float]) -> list[float]:
    """Those of `known` and 1.0 that lie within 0.1 % of the measured scaling; else the measured one itself, and those that rounding may hide."""
    measured = [m for m in (_measured(record, sample) for sample in samples) if m is not None]
    if not measured:
        return []
    middle = median(measured)
    off = {s: abs(s - middle) / middle for s in (1.0, *known)}
    near = [s for s, share in off.items() if share < 1e-3]
    hidden = [s for s, share in off.items() if share < torch.finfo(samples[0].keys.dtype).eps]
    return near or [*hidden, float(torch.tensor(middle, dtype=torch.float32))]


def _measured(record: RopeRecord, sample: Seen) -> float | None:
    """Norm of the cached keys' rotated channels over that of the best tensor seen: the scaling of cos and sin."""
    span, closest, scaling = slice(record.start, record.start + record.dim), float("inf"), None
    for whole in _wholes(record, sample):
        norm = float(whole[..., span].float().norm())
        ratio = float(sample.keys[0][..., span].float().norm()) / norm if norm else 0.0
        wide = msgspec.structs.replace(record, scaling=ratio, arithmetic="float32")
        error = residual(rotate(whole.float(), sample.positions, wide), sample.keys[0])
        if error < closest:
            closest, scaling = error, ratio
    return scaling
