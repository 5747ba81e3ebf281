"""The escapes of many units at once: which levels to correct, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvstore.codecs.transform_ladder import Rows
from kvstore.device.units import I64, U32, WIDTHS, Alike, Heads, StreamPlaces, require

MOST = 1 << 20  # an excess beyond it is out of range whatever it corrects: levels are below 29,525


class Corrections(NamedTuple):
    """int64 [n] each: the unit's place among its like, number of the set, coefficient, the token's place in the set; what the magnitude grows by."""

    member: I64
    set: I64
    coefficient: I64
    token: I64
    excess: I64


def corrections(words: U32, heads: Heads, these: Alike, tier: int, rows: Sequence[Rows], found: StreamPlaces) -> Corrections | None:
    """Of one tier of units that are alike. Raises IntegrityError for places beyond the last level."""
    counts, form = heads.escapes[these.units, tier], heads.form[these.units, tier]
    if not counts.any():
        return None
    gap, more = WIDTHS[form >> 4 & 3], WIDTHS[form >> 6]
    member = np.repeat(np.arange(len(counts)), counts)
    each = np.arange(len(member)) - np.repeat(np.cumsum(counts) - counts, counts)
    gaps = _numbers(words, (4 * found.escapes)[member] + each * gap[member], gap[member])
    excess = _numbers(words, (4 * found.escapes + counts * gap)[member] + each * more[member], more[member])
    ends = np.cumsum(gaps + 1)
    firsts = np.cumsum(counts) - counts
    at = ends - 1 - np.repeat(np.concatenate(([0], ends))[firsts], counts)
    starts = np.cumsum([0, *(row.added for row in rows)])
    require(at < starts[-1], "an escape beyond the last symbol", these.units[member])
    number = np.searchsorted(starts, at, side="right") - 1
    refined, run = (np.array([getattr(row, name) for row in rows])[number] for name in ("refined", "run"))
    within = at - starts[number]
    return Corrections(member, number, refined + within // run, within % run, np.minimum(excess + 1, MOST))


def _numbers(words: U32, at: I64, width: I64) -> I64:
    """Little-endian numbers of `width` bytes each from the byte `at` on."""
    data, out = words.astype("<u4", copy=False).view(np.uint8), np.zeros(len(at), np.int64)
    for i in range(int(width.max(initial=0))):
        out |= np.where(i < width, data[np.minimum(at + i, len(data) - 1)], 0).astype(np.int64) << 8 * i
    return out
