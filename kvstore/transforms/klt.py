"""The transform of one group of layers: whitening by the metric, then the Karhunen-Loeve transform, cut after `rank` coefficients.

With the metric F (block-diagonal, one block a layer and kind) and U the leading eigenvectors of the covariance of F^(1/2) (x - mean),
analysis is c = U' F^(1/2) (x - mean), synthesis x = mean + F^(-1/2) U c. Only the synthesis rows B = U' F^(-1/2) and F are kept: the analysis
follows from them as F B'. Coefficients are ordered by importance, so the first rows alone serve a coarse tier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Basis:
    """Vectors x are float32 [D], D = layers of the group x 2 x channels, in the order layer, kind, channel.

    `mean` float32 [D]; `rows` float16 [rank, D] times `scale` float32 [rank] are the synthesis rows; `metric` float16 [blocks, channels, channels]
    times `metric_scale` float32 [blocks] are the blocks of F, blocks = layers of the group x 2. The arrays may be memory maps and are never changed.
    """

    mean: Floats
    rows: Halves
    scale: Floats
    metric: Halves
    metric_scale: Floats
    _cache: dict[str, Floats] = field(default_factory=dict, repr=False, compare=False)  # no lock: a forked child could inherit it held

    @property
    def rank(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        return len(self.mean)

    def synthesis(self, count: int) -> Floats:
        """float32 [count, D]: the first `count` rows. Widened once, and again only where more rows are asked for."""
        known = self._cache.get("synthesis")
        if known is None or len(known) < count:
            known = self.rows[:count].astype(np.float32) * self.scale[:count, None]
            known.flags.writeable = False
            self._cache["synthesis"] = known
        return known[:count]

    def analysis(self) -> Floats:
        """float32 [D, rank], computed once: x - mean times it are the coefficients."""
        if "analysis" not in self._cache:
            self._cache["analysis"] = self._analysis()
        return self._cache["analysis"]

    def _analysis(self) -> Floats:
        channels = self.metric.shape[1]
        out = np.empty((self.dim, self.rank), np.float32)
        rows = self.rows.astype(np.float32) * self.scale[:, None]
        for block, scale in enumerate(self.metric_scale):
            part = slice(block * channels, (block + 1) * channels)
            out[part] = (self.metric[block].astype(np.float32) * scale) @ rows[:, part].T
        out.flags.writeable = False
        return out

    def weights(self) -> Floats:
        """float32 [D]: the diagonal of F, by which a vector's energy is judged where the whole F would cost too much."""
        if "weights" not in self._cache:
            diagonal = np.diagonal(self.metric, axis1=1, axis2=2).astype(np.float32) * self.metric_scale[:, None]
            self._cache["weights"] = np.ascontiguousarray(diagonal.reshape(-1))
        return self._cache["weights"]

    def tiles(self, count: int, width: int) -> Floats:
        """float32 [ceil(D / width), count or more, width]: the columns of `synthesis` side by side, zeros after the last.

        Each tile of a row begins at a cache line. Made once, and again only where more rows are asked for.
        """
        known = self._cache.get(f"tiles {width}")
        if known is None or known.shape[1] < count:
            known = self._tiles(count, width)
            self._cache[f"tiles {width}"] = known
        return known

    def _tiles(self, count: int, width: int) -> Floats:
        shape = (-(-self.dim // width), count, width)
        memory = np.zeros(math.prod(shape) + 16, np.float32)
        skipped = -memory.ctypes.data % 64 // 4
        out = memory[skipped : skipped + math.prod(shape)].reshape(shape)
        for i, tile in enumerate(out):
            part = self.rows[:count, i * width : (i + 1) * width]
            np.multiply(part, self.scale[:count, None], out=tile[:, : part.shape[1]])
        out.flags.writeable = False
        return out

    def gains(self) -> Floats:
        """float32 [rank]: what an error of one in a coefficient weighs, by `weights`."""
        if "gains" not in self._cache:
            rows = self.rows.astype(np.float32) * self.scale[:, None]
            self._cache["gains"] = np.einsum("kd,kd,d->k", rows, rows, self.weights())
        return self._cache["gains"]
