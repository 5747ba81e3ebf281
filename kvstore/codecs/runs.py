"""How rows of symbols are cut into streams: plain arithmetic, so that sizes can be read from a record without compiled code."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

STREAM = 4096


class Runs(NamedTuple):
    """How `symbols` symbols are cut: `run` symbols share a table, `per` runs a stream."""

    symbols: int
    run: int
    per: int

    @property
    def streams(self) -> int:
        return -(-self.symbols // (self.run * self.per))


@lru_cache(1024)
def cut(symbols: int, run: int) -> Runs:
    """Streams of at most 4,096 symbols (one run, where that is longer), as equal as whole runs allow."""
    runs = -(-symbols // run)
    streams = -(-runs // max(1, STREAM // run))
    return Runs(symbols, run, -(-runs // max(1, streams)))
