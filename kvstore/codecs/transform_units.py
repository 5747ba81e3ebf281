"""Records of the codec `transform`.

Every tier: header; two words (group; token sets; form; escapes); tier 0 only: which token is in which set; lengths of all streams as uint16, their
words; tier 0 only: bits of raw tokens; escapes. The rows of a tier, set by set: refinements of the coefficients that the tier below codes, then the
levels of those that it adds, coefficient by coefficient in runs of the set's tokens. An escape corrects one added level; places count over all
added levels of the record laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs import ans, transform_kernels
from kvstore.codecs.base import BITS, Array, Header, Reader, damaged, to_record
from kvstore.codecs.escapes import Escapes, pack_escapes
from kvstore.codecs.tables import Tables
from kvstore.codecs.transform_ladder import Ladder, rows_of
from kvstore.codecs.transform_sets import mask_of, pack

I8 = npt.NDArray[np.int8]
I16 = npt.NDArray[np.int16]
I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
HEAD = np.dtype([("group", "<u2"), ("sets", "u1"), ("form", "u1"), ("escapes", "<u4")])
DTYPES = tuple(BITS)


class Head(NamedTuple):
    """The two words after the header. `sets`: the mask of `transform_sets`. `form`: bit 0, sets as numbers; bits 1-2, dtype of raw tokens;
    bits 4-5 and 6-7, widths of the escapes' gaps and excesses."""

    group: int
    sets: int
    form: int
    escapes: int

    @classmethod
    def read(cls, reader: Reader, level: int) -> Head:
        """Raises IntegrityError."""
        head = cls(*reader.take_bytes(HEAD.itemsize).view(HEAD)[0].tolist())
        if head.form & (0x08 if level == 0 else 0x0F) or (head.form >> 1 & 3) >= len(DTYPES):
            raise damaged(f"form {head.form:#x} of level {level}")
        return head

    @classmethod
    def of(cls, unit: Unit, level: int, packed: bool, escapes: int, widths: int) -> Head:
        own = packed | (DTYPES.index(unit.dtype) << 1 if unit.raw.size else 0) if level == 0 else 0
        return cls(unit.group, mask_of(unit.codes), own | (widths & 3) << 4 | (widths >> 4) << 6, escapes)

    def bytes(self) -> bytes:
        return np.array(tuple(self), HEAD).tobytes()

    @property
    def packed(self) -> bool:
        return bool(self.form & 1)

    @property
    def dtype(self) -> str:
        return DTYPES[self.form >> 1 & 3]

    @property
    def widths(self) -> int:
        """As `pack_escapes` returns them."""
        return (self.form >> 4 & 3) | (self.form >> 6) << 4


class Set(NamedTuple):
    """Levels int16 [coefficients, tokens of the set] of one step class."""

    step_class: int
    tokens: I64
    levels: I16


@dataclass(frozen=True)
class Unit:
    """What the records of a unit hold: levels by set, and the bits [layers, 2, raw tokens, channels] of those kept raw."""

    group: int
    codes: I8
    sets: list[Set]
    raw: Array
    dtype: str


def encode(header: Header, unit: Unit, ladder: Ladder, tables: Tables) -> list[bytes]:
    """The records of all tiers. Levels are those of the finest tier."""
    parts = [list(_encode_set(found, ladder, tables)) for found in unit.sets]
    return [_record(header, unit, tier, [mine[tier] for mine in parts]) for tier in range(ladder.tiers)]


class Part(NamedTuple):
    """What one set adds to one record."""

    coded: list[ans.Coded]
    added: int
    escapes: Escapes


def _encode_set(found: Set, ladder: Ladder, tables: Tables) -> list[Part]:
    """By tier."""
    parts, levels, step_class = [], found.levels, found.step_class
    for tier in range(ladder.finest, -1, -1):
        rows = rows_of(ladder, tier, step_class, len(found.tokens))
        cells, thirds = np.empty((rows.refined, rows.run), np.int16), np.empty((rows.refined, rows.run), np.uint8)
        transform_kernels.coarsen(levels[: rows.refined], cells, thirds)
        coded = _encode_rows(thirds, ladder.tables(tier - 1, step_class), tables.refine)
        used = ladder.tables(tier, step_class)[rows.refined : rows.coded]
        symbols, escapes = _clip(levels[rows.refined : rows.coded], tables.largest[used])
        parts.append(Part(coded + _encode_rows(symbols.view(np.uint8), used, tables.encode), rows.added, escapes))
        levels = cells
    return parts[::-1]


def _encode_rows(symbols: Bytes, used: Bytes, tables: npt.NDArray[np.uint32]) -> list[ans.Coded]:
    """One row of `symbols` [coefficients, tokens], or none where there are no symbols."""
    return [ans.encode(symbols.reshape(-1), ans.cut(symbols.size, symbols.shape[1]), used[: len(symbols)], tables)] if symbols.size else []


def _clip(levels: I16, largest: I64) -> tuple[I8, Escapes]:
    symbols = np.empty(levels.shape, np.int8)
    missed = transform_kernels.clip(levels, largest, symbols)
    return symbols, Escapes.between(levels.reshape(-1), symbols.reshape(-1)) if missed else Escapes.none()


def _record(header: Header, unit: Unit, level: int, parts: Sequence[Part]) -> bytes:
    coded = [row for part in parts for row in part.coded]
    lists = [part.escapes for part in parts] or [Escapes.none()]
    escapes, widths = pack_escapes(lists, [part.added for part in parts[:-1]])
    packed, sets = pack(unit.codes) if level == 0 else (False, b"")
    head = Head.of(unit, level, packed, sum(len(found.at) for found in lists), widths)
    raw = to_record(unit.raw.astype(unit.raw.dtype.newbyteorder("<"), copy=False)) if level == 0 else b""
    lengths = to_record(*(row.lengths() for row in coded))
    return to_record(replace(header, level=level).bytes(), head.bytes(), sets, lengths, *(row.content() for row in coded), raw, escapes)
