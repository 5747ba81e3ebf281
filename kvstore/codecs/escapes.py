"""Symbols beyond their alphabet: coded as the largest of it, and corrected from a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import Reader, damaged

I64 = npt.NDArray[np.int64]
WIDTHS = (np.dtype("<u1"), np.dtype("<u2"), np.dtype("<u4"))


class Escapes(NamedTuple):
    """Positions in a row of symbols, ascending, and by how much each magnitude exceeds the coded one (1 at least)."""

    at: I64
    excess: I64

    @classmethod
    def none(cls) -> Escapes:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def between(cls, true: npt.NDArray[Any], coded: npt.NDArray[np.int8]) -> Escapes:
        """What turns `coded` symbols into the `true` values they were clipped from."""
        at = np.flatnonzero(true != coded)
        return cls(at, np.abs(true[at].astype(np.int64)) - np.abs(coded[at].astype(np.int64)))

    def correct(self, coded: I64) -> I64:
        """The true values of the symbols at `at`."""
        return np.asarray(coded + np.sign(coded) * self.excess, np.int64)

    def split(self, sizes: Sequence[int]) -> list[Escapes]:
        """One for each of the rows of `sizes` symbols laid end to end. Raises IntegrityError for positions beyond the last."""
        if len(self.at) and self.at[-1] >= sum(sizes):
            raise damaged("an escape beyond the last symbol")
        starts = np.cumsum([0, *sizes])
        cuts = np.searchsorted(self.at, starts)
        return [Escapes(self.at[a:b] - start, self.excess[a:b]) for a, b, start in zip(cuts, cuts[1:], starts, strict=False)]


def pack_escapes(rows: Sequence[Escapes], sizes: Sequence[int]) -> tuple[bytes, int]:
    """The escapes of rows laid end to end, all but the last of `sizes` symbols: bytes, and the widths to read them by."""
    starts = np.cumsum([0, *sizes])
    at = np.concatenate([row.at + start for row, start in zip(rows, starts, strict=True)])
    gaps, excess = np.diff(at, prepend=-1) - 1, np.concatenate([row.excess for row in rows]) - 1
    widths = [_width(gaps), _width(excess)]
    return gaps.astype(WIDTHS[widths[0]]).tobytes() + excess.astype(WIDTHS[widths[1]]).tobytes(), widths[0] | widths[1] << 4


def _width(numbers: I64) -> int:
    most = int(numbers.max(initial=0))
    return 0 if most < 1 << 8 else 1 if most < 1 << 16 else 2


class EscapeReader:
    """The escapes of many planes from one stretch of a record. Raises IntegrityError where the record is too short for them."""

    def __init__(self, reader: Reader, planes: Sequence[tuple[int, int]]):
        sizes = [count * sum(kind.itemsize for kind in _kinds(widths)) for count, widths in planes]
        self.data, self.at = reader.take_bytes(sum(sizes)), 0

    def take(self, count: int, widths: int) -> Escapes:
        """The next plane's escapes."""
        gaps, excess = (self._numbers(count, kind) for kind in _kinds(widths))
        return Escapes(np.cumsum(gaps + 1) - 1, excess + 1)

    def _numbers(self, count: int, kind: np.dtype[Any]) -> I64:
        self.at += count * kind.itemsize
        return self.data[self.at - count * kind.itemsize : self.at].copy().view(kind).astype(np.int64)


def _kinds(widths: int) -> tuple[np.dtype[Any], np.dtype[Any]]:
    first, second = widths & 15, widths >> 4
    if max(first, second) >= len(WIDTHS):
        raise damaged(f"escapes of widths {widths}")
    return WIDTHS[first], WIDTHS[second]
