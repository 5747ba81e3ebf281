"""Records of many units of the codec `transform`, taken apart together: what `transform_decode.read` does for one unit, in arrays over all of them.

A load of 8,192 tokens of an 8B model reads hundreds of records; taking each apart by itself would cost the host more time than the device has.
Checked is what `transform_decode.read` checks. The words stay where they are: only places in them are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import BITS, HEADER_WORDS, Reader, damaged
from kvstore.codecs.transform_ladder import Rows
from kvstore.codecs.transform_sets import RAW, sets_of, unpack
from kvstore.codecs.transform_units import DTYPES
from kvstore.errors import InputError, IntegrityError

I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]
FIRST = HEADER_WORDS + 2  # words before the sets and the streams
WIDTHS = np.array([1, 2, 4])  # bytes of an escape's gap and excess


class Heads(NamedTuple):
    """int64 [units, tiers]: where each record begins in the words and where it ends, its form and number of escapes. `masks` [units]."""

    begin: I64
    end: I64
    form: I64
    escapes: I64
    masks: I64

    def escape_bytes(self) -> I64:
        """[units, tiers]."""
        return self.escapes * (WIDTHS[self.form >> 4 & 3] + WIDTHS[self.form >> 6])


@dataclass(frozen=True)
class Alike:
    """Units whose token sets have the same sizes, so that their rows are cut alike.

    `units` [J]; `sets`: step class and tokens [J, T]; `raw` [J, R]: tokens kept as they are; `listed` [J]: words that the lists of sets take.
    """

    units: I64
    sets: list[tuple[int, I64]]
    raw: I64
    listed: I64


class StreamPlaces(NamedTuple):
    """Of one tier of units that are alike: stream s of unit j is `words[1 + ends[j, s] : 1 + ends[j, s + 1]]`.

    `raw` and `escapes` [J]: words where these begin.
    """

    ends: I64
    raw: I64
    escapes: I64


def require(good: npt.NDArray[np.bool_], what: str, units: I64 | None = None) -> None:
    """Raises IntegrityError where any of `good` [units, ...] is false. `units`: their numbers, else 0, 1, ..."""
    if not good.all():
        place = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
        raise damaged(f"{what} (unit {place if units is None else int(units[place])})")


def read_heads(words: U32, spans: I64, tokens: I64, group: int, layers: int, channels: int) -> Heads:
    """The heads of records at `spans` [units, tiers, 2] (first word, words) of units of `tokens` [units]. Raises IntegrityError, InputError."""
    begin, size = spans[..., 0], spans[..., 1]
    if spans.ndim != 3 or not spans.size or (begin < 0).any() or (size < 0).any() or int((begin + size).max()) > len(words):
        raise InputError(f"records of shape {spans.shape} that do not lie in {len(words):,} words")
    require(size >= FIRST, "a record too short for its head")
    found = words[begin[..., None] + np.arange(FIRST)].astype(np.int64)
    levels = np.arange(spans.shape[1])
    wanted = np.stack(np.broadcast_arrays(tokens[:, None], layers | levels << 16, channels), axis=-1)
    require(found[..., :HEADER_WORDS] == wanted, "a record of another shape or level")
    masks, form = found[..., 3] >> 16 & 0xFF, found[..., 3] >> 24
    require((found[..., 3] & 0xFFFF) == group, f"a record of another group than {group}")
    require((masks == masks[:, :1]) & (masks != 0), "records of other token sets, or of none")
    require((form & np.where(levels == 0, 0x08, 0x0F) == 0) & ((form >> 1 & 3) < len(DTYPES)), "a form of record that is unknown")
    require(np.maximum(form >> 4 & 3, form >> 6) < len(WIDTHS), "escapes of unknown widths")
    return Heads(begin, begin + size, form, found[..., 4], masks[:, 0])


def alike(words: U32, heads: Heads, tokens: I64) -> list[Alike]:
    """The units in classes, those of the same sizes of sets together. Raises IntegrityError."""
    found: dict[Any, list[tuple[int, int, list[tuple[int, I64]]]]] = {}
    plain: dict[int, list[tuple[int, I64]]] = {}
    for unit, (mask, count) in enumerate(zip(heads.masks.tolist(), tokens.tolist(), strict=True)):
        if mask & (mask - 1):
            listed, sets = _listed(words, heads, unit, mask, count)
        else:
            listed, sets = 0, plain.setdefault(mask << 16 | count, [(sets_of(mask)[0], np.arange(count))])
        found.setdefault(tuple((code, len(which)) for code, which in sets), []).append((unit, listed, sets))
    return [_together(members) for members in found.values()]


def _listed(words: U32, heads: Heads, unit: int, mask: int, count: int) -> tuple[int, list[tuple[int, I64]]]:
    """The sets of one unit, and the words that their list takes."""
    reader = Reader(words[: heads.end[unit, 0]], int(heads.begin[unit, 0]) + FIRST)
    first = reader.at
    try:
        sets = unpack(reader, mask, bool(heads.form[unit, 0] & 1), count)
    except IntegrityError as error:
        raise IntegrityError(f"{error.message} (unit {unit})", remedy=error.remedy) from error
    return reader.at - first, sets


def _together(members: Sequence[tuple[int, int, list[tuple[int, I64]]]]) -> Alike:
    units, listed = (np.array([member[i] for member in members]) for i in (0, 1))
    sets = [(code, np.stack([member[2][n][1] for member in members])) for n, (code, _) in enumerate(members[0][2])]
    raw = sets.pop()[1] if sets[-1][0] == RAW else np.empty((len(members), 0), np.int64)
    return Alike(units, sets, raw, listed)


def streams(words: U32, heads: Heads, these: Alike, tier: int, rows: Sequence[Rows], values: int) -> StreamPlaces:
    """Where the streams of a tier's `rows` lie; `values`: of a raw token. Raises IntegrityError where a record is not as long as it says."""
    units, count = these.units, sum(cut.streams for row in rows for cut in row.cuts())
    end, lengths = heads.end[units, tier], -(-count // 2)
    begin = heads.begin[units, tier] + FIRST + (these.listed if tier == 0 else 0)
    require(begin + lengths <= end, "it ends too early", units)
    ends = np.empty((len(units), count + 1), np.int64)
    ends[:, 0] = begin + lengths - 1  # the guard is the word before
    found = words[begin[:, None] + np.arange(lengths)].astype("<u4", copy=False).view("<u2")
    np.cumsum(found[:, :count], axis=1, out=ends[:, 1:], dtype=np.int64)
    ends[:, 1:] += ends[:, :1]
    raw = ends[:, -1] + 1
    escapes = raw + _raw_words(heads.form[units, 0], these.raw.shape[1] * values if tier == 0 else 0)
    require(escapes + -(-heads.escape_bytes()[units, tier] // 4) == end, "its parts do not add up to its length", units)
    return StreamPlaces(ends, raw, escapes)


def _raw_words(form: I64, values: int) -> I64:
    sizes = np.array([BITS[name].itemsize for name in DTYPES])
    return -(-values * sizes[form >> 1 & 3] // 4)
