"""The rows of `rate_quality.py`, and curves from them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Curve = list[tuple[float, float]]
"""(KL, bytes a token), by KL."""
KEY = ("stage", "model", "calibration", "method", "setting", "way")


def load(path: Path) -> list[Row]:
    """The newest row of each setting, in the order in which settings first came."""
    found: dict[tuple[object, ...], Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[tuple(row[k] for k in KEY)] = row
    return list(found.values())


def curve(rows: Sequence[Row], method: str, way: str) -> Curve:
    return sorted((max(r["kl"], 1e-12), r["bytes"]) for r in rows if r["method"] == method and r["way"] == way)


def bytes_at(points: Curve, kl: float) -> tuple[float, bool] | None:
    """Bytes a token at a KL, by interpolation in log-log, and whether it lies within the curve; None for fewer than two points."""
    if len(points) < 2:
        return None
    logs = [(math.log(k), math.log(b)) for k, b in points]
    at = math.log(max(kl, 1e-12))
    i = min(max(sum(k < at for k, _ in logs), 1), len(logs) - 1)
    (k0, b0), (k1, b1) = logs[i - 1], logs[i]
    return math.exp(b0 + (b1 - b0) * (at - k0) / (k1 - k0) if k1 > k0 else b0), logs[0][0] <= at <= logs[-1][0]
