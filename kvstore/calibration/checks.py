"""What a calibration must satisfy: its record before anything is read, its arrays before anything is computed, its fit before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from kvstore.calibration.record import CLASSES, U16, Calibration, CalibrationRecord
from kvstore.errors import FormatError, IntegrityError
from kvstore.manifest import CodecSpec, Encoding, Layout

VALUES, TOTAL = 128, 4096  # |values| a class has weights for, what the weights of a class sum to
MAX_CHANNELS = 1 << 20  # as codecs/base.py
SMALLEST, LARGEST = 1e-30, 1e30  # of steps and scales: products with float16 rows stay finite in float32
REMEDY = "restore it from a copy; `kvstore calibrate` makes a new one for new builds"


def group_count(record: CalibrationRecord) -> int:
    return -(-record.layers // record.group_layers)


def group_dims(record: CalibrationRecord) -> list[int]:
    """Values of a token in each group of layers; the last may be shorter."""
    per_layer = 2 * record.kv_heads * record.head_dim
    return [per_layer * min(record.group_layers, record.layers - first) for first in range(0, record.layers, record.group_layers)]


def require_record(record: CalibrationRecord, where: str) -> None:
    """Raises FormatError naming the first thing that no calibration of this version can say."""
    problem = _geometry_problem(record) or next((p for p in _number_problems(record) if p), None)
    if problem:
        raise FormatError(f"{where}: {problem}", remedy=REMEDY)


def _geometry_problem(record: CalibrationRecord) -> str | None:
    if record.kv_heads > 1 << 14 or record.head_dim > 1 << 16 or record.kv_heads * record.head_dim > MAX_CHANNELS:
        return f"{record.kv_heads} heads of {record.head_dim} channels"
    if record.group_layers > record.layers:
        return f"group_layers is {record.group_layers} of {record.layers} layers"
    lengths = {"ranks": group_count(record), "energy": group_count(record), "shrink": record.tiers}
    for name, expected in lengths.items():
        if len(getattr(record, name)) != expected:
            return f"{name} has {len(getattr(record, name))} entries instead of {expected}"
    if len(record.kl) not in (0, record.tiers):
        return f"kl has {len(record.kl)} entries for {record.tiers} tiers"
    dims = group_dims(record)
    return next((f"group {g} keeps {r} coefficients of {d}" for g, (r, d) in enumerate(zip(record.ranks, dims, strict=True)) if r > d), None)


def _number_problems(record: CalibrationRecord) -> Iterator[str | None]:
    yield _outside("step", [record.step], SMALLEST, LARGEST)
    yield _outside("shrink", record.shrink, 0.0, 0.5)
    yield _outside("exempt", [record.exempt], SMALLEST, math.inf)
    yield _outside("energy", record.energy, SMALLEST, math.inf)
    yield _outside("kl", record.kl, 0.0, math.inf)
    if not abs(record.seed) < 1 << 53:
        yield f"seed is {record.seed}"


def _outside(name: str, numbers: Iterable[float], low: float, high: float) -> str | None:
    bad = next((x for x in numbers if not (math.isfinite(x) and low <= x <= high)), None)
    return None if bad is None else f"{name} is {bad}, not a number from {low:g} to {high:g}"


def require_arrays(calibration: Calibration, where: str) -> None:
    """Raises IntegrityError naming the first array whose values no calibration can have. Shapes and types are given by now."""
    for g, (basis, classes) in enumerate(zip(calibration.bases, calibration.classes, strict=True)):
        scales = {f"g{g}/scale": basis.scale, "metric_scale": basis.metric_scale}
        _require(finite(basis.mean), where, f"mean of group {g} is not finite")
        _require(finite(basis.rows), where, f"g{g}/rows is not finite")
        _require(finite(basis.metric), where, f"metric of group {g} is not finite")
        _require(bool((np.diagonal(basis.metric, axis1=1, axis2=2) >= 0).all()), where, f"metric of group {g} has a negative diagonal")
        for name, scale in scales.items():
            _require(bool(((scale >= SMALLEST) & (scale <= LARGEST)).all()), where, f"{name} is not between {SMALLEST:g} and {LARGEST:g}")
        _require(bool((classes[1:] <= classes[:-1]).all()), where, f"g{g}/classes does not descend")
    for c in range(CLASSES):
        _require(usable_weights(calibration.weights[c]), where, f"weights of class {c} are no table of 12-bit weights")
        _require(usable_thirds(calibration.thirds[c]), where, f"thirds of class {c} are no table of 12-bit weights")


def _require(good: bool, where: str, what: str) -> None:
    if not good:
        raise IntegrityError(f"{where}: {what}", remedy=REMEDY)


def finite(values: npt.NDArray[np.floating]) -> bool:
    """Row by row: a whole group of a large model would take a second gigabyte."""
    flat = values.reshape(len(values), -1)
    return all(bool(np.isfinite(flat[i : i + 64]).all()) for i in range(0, len(flat), 64))


def usable_weights(row: U16) -> bool:
    """Weights of |value| = 0, 1 ...: at least two, none left out, 0 beyond the alphabet, 4,096 over both signs."""
    used = int(np.count_nonzero(row))
    return used >= 2 and bool((row[:used] > 0).all()) and int(row[0]) + 2 * int(row[1:].sum(dtype=np.int64)) == TOTAL


def usable_thirds(row: U16) -> bool:
    """Outer third of cell zero; inner and middle third of the others: every third of both has a weight."""
    outer, inner, middle = map(int, row)
    return min(outer, inner, middle) > 0 and 2 * outer < TOTAL and inner + middle < TOTAL


def require_use(calibration: Calibration, spec: CodecSpec, encoding: Encoding, layout: Layout) -> None:
    """Raises FormatError unless `calibration` is for values of `layout`, in the groups of `encoding`, with tiers for all that use `spec`."""
    problem = fit_problem(calibration.record, spec, encoding, layout)
    if problem is not None:
        raise FormatError(f"calibration {calibration.digest[:12]} {problem}", remedy="it is not the one that this was encoded with: rebuild")


def fit_problem(record: CalibrationRecord, spec: CodecSpec, encoding: Encoding, layout: Layout) -> str | None:
    """Why a calibration cannot serve one of an encoding's codecs, or None where it can."""
    mine, theirs = (record.layers, record.kv_heads, record.head_dim), (layout.layers, layout.kv_heads, layout.head_dim)
    if mine != theirs:
        return f"is for layers, KV heads and channels {mine}, not {theirs}"
    if record.group_layers != encoding.group_layers:
        return f"has groups of {record.group_layers} layers, the encoding of {encoding.group_layers}"
    finest = max((t.level for t in encoding.tiers if t.codec == spec.name), default=0)
    return None if finest < record.tiers else f"has {record.tiers} tiers, the encoding level {finest}"
