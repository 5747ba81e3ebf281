"""A calibration: the record of how it was made, and the arrays that code units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvstore.manifest import Digest, FileDigest, Layers, Layout, Positive, Strict
from kvstore.transforms.klt import Basis

Metric = Literal["fisher", "attention", "identity"]
CLASSES = 49  # scale classes, as codecs/tables.py
U16 = npt.NDArray[np.uint16]


class CalibrationRecord(Strict, frozen=True):
    """calibrations/<digest>/zarr.json, attributes.kvstore.

    Tiers are nested: tier j of n has the step `step` * 3 ** (n - 1 - j). `ranks` are the coefficients kept, per group. A coefficient is coded at a
    tier where its scale class there is at least `least`. `shrink[j]` (a share of that tier's step) is how far values in the cells next to zero are
    moved towards zero when tier j is the finest read. Tokens whose energy (sum over channels of diag(F) (x - mean)^2, over that sum's mean on the
    calibration text) exceeds `exempt` in some group get a step of a ninth there. `kl` is the divergence of each tier on the calibration text,
    nats a token; `texts` are the digests of the documents used, which must not score.
    """

    format: int
    kind: Literal["calibration"]
    model: Digest
    layers: Layers
    kv_heads: Positive
    head_dim: Positive
    metric: Metric
    group_layers: Layers
    tiers: Annotated[int, Meta(ge=1, le=3)]
    step: float
    least: Annotated[int, Meta(ge=0, lt=CLASSES)]
    shrink: tuple[float, ...]
    exempt: float
    energy: tuple[float, ...]
    ranks: tuple[Positive, ...]
    tokens: Positive
    seed: int
    kl: tuple[float, ...]
    texts: tuple[Digest, ...]
    provenance: dict[str, str]
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class Calibration:
    """`classes[g]` uint8 [rank] descending: scale class of each coefficient at the finest tier, standard deviation step * 3 ** ((class - 24) / 8).

    Classes above 48 stand for themselves at coarser tiers (a tier up is 8 less) and for 48 where they are used. `weights` uint16 [49, 128]: 12-bit
    weights of |value| = 0 ... 127 per class, 0 beyond its alphabet; `thirds` uint16 [49, 3] as in table_data.THIRDS.
    """

    digest: str
    record: CalibrationRecord
    bases: tuple[Basis, ...]
    classes: tuple[npt.NDArray[np.uint8], ...]
    weights: U16
    thirds: U16

    def fits(self, layout: Layout) -> bool:
        mine = (self.record.layers, self.record.kv_heads, self.record.head_dim)
        return mine == (layout.layers, layout.kv_heads, layout.head_dim)

    def group_layers(self, group: int) -> range:
        """The layers of a group; the last may be shorter."""
        first = group * self.record.group_layers
        return range(first, min(first + self.record.group_layers, self.record.layers))
