"""The longest stored chain from the prompt's beginning; what follows is left to the first forward pass."""

from __future__ import annotations

from typing import ClassVar

from kvstore.reuse.base import NONE, Mode, Rows, Scene


class Prefix(Mode):
    """Exact: every cached token saw precisely what stands before it."""

    name: ClassVar[str] = "prefix"
    moves: ClassVar[bool] = False

    def choose(self, scene: Scene) -> Rows:
        return NONE
