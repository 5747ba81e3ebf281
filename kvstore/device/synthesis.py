"""Matrices of the synthesis on a device, and the product.

They are float16: integers up to 2,048 are exact in it, where bfloat16 ends at 256, and its ten bits of fraction keep the synthesis rows, which are
stored in float16, as they are but for their scales. Sums are float32. The step is multiplied into the sums, exactly as `Ladder.step_of` says, so that
one matrix serves all tiers and step classes. Models in float32 get float32 matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvstore.calibration.record import Calibration
from kvstore.transforms.klt import Basis

HEADROOM = 10  # powers of two above 1 that the largest entry of float16 rows has: small entries keep their bits, and 2,048 is far from 65,504


class Group(NamedTuple):
    """A group of layers on a device: scale classes int32 [rank], synthesis rows [rank, D] divided by `unit`, a power of two; mean float32 [D]."""

    classes: Tensor
    rows: Tensor
    mean: Tensor
    unit: float

    @classmethod
    def of(cls, calibration: Calibration, group: int, device: torch.device, dtype: torch.dtype) -> Group:
        """Waits until all is there: whichever stream comes next may use it."""
        basis = calibration.bases[group]
        rows, unit = basis.rows.astype(np.float32) * basis.scale[:, None], 1.0
        if dtype == torch.float16:
            unit = float(2.0 ** (np.floor(np.log2(np.abs(rows).max(initial=2.0**-100))) - HEADROOM))
            rows = (rows / np.float32(unit)).astype(np.float16)
        arrays = (calibration.classes[group].astype(np.int32), rows, np.array(basis.mean, np.float32))
        classes, matrix, mean = (torch.from_numpy(array).to(device) for array in arrays)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return cls(classes, matrix, mean, unit)


def group_bytes(basis: Basis, dtype: torch.dtype) -> int:
    """What `Group.of` puts on the device."""
    return basis.rank * (basis.dim * dtype.itemsize + 4) + 4 * basis.dim


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 [n, D] of a [k, n] and b [k, D]; sums are float32 whatever the type."""
    if a.dtype == torch.float32:
        return a.T @ b
    if a.device.type == "cuda":
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T.float() @ b.float()
