"""How the codec `scalar` groups the values of one layer and kind, and what a plane of its base record starts with."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.runs import STREAM, Runs, cut

Floats = npt.NDArray[np.float32]
HEAD = np.dtype([("step", "<f4"), ("class_centre", "u1"), ("class_table", "u1"), ("offset_table", "u1"), ("widths", "u1"),
                 ("offset_centre", "<i4"), ("escapes", "<u4")])  # fmt: skip


class Plane(NamedTuple):
    """How the values [tokens, channels] of one layer and kind are grouped. `channel_major`: by channel, along all tokens."""

    tokens: int
    channels: int
    run: int
    channel_major: bool

    @property
    def size(self) -> int:
        return self.tokens * self.channels

    @property
    def runs(self) -> int:
        return -(-self.size // self.run)


@lru_cache(256)
def base_runs(plane: Plane) -> tuple[Runs, ...]:
    """How the rows of a plane's base record are cut into streams."""
    sides = [plane.runs, plane.channels] if plane.channel_major else [plane.runs]
    return (*(cut(count, STREAM) for count in sides), cut(plane.size, plane.run))
