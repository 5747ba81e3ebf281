"""How the codec `scalar` groups the values of one layer and kind."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


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
