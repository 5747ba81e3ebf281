"""Where everything of a group's units lies, for the kernels: all that the host decides before anything is launched. No torch here.

The levels of all tokens of one step class stand in one matrix [coefficients, tokens]. Tokens of units that are alike are interleaved (token 0 of
all of them, token 1 of all of them, ...): neighbouring lanes decode the same stream of neighbouring units, so that they share tables and write side
by side. Everything the kernels look up is one int32 array, the table of the plan, which travels beside the records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.calibration.record import Calibration
from kvstore.codecs.runs import cut
from kvstore.codecs.transform_ladder import PER_THREE, Ladder, Rows, rows_of
from kvstore.codecs.transform_sets import STEP_CLASSES
from kvstore.codecs.transform_units import DTYPES
from kvstore.device.corrections import Corrections, corrections
from kvstore.device.units import I64, U32, Alike, Heads, StreamPlaces, alike, read_heads, streams
from kvstore.errors import InputError

LANES = 32  # streams a program: a warp
TOKEN_BITS = 12  # a row of values is named by unit << 12 | token: a unit has 4,096 tokens at most
EXACT_HALF = 2048  # integers up to this are exact in float16
SYMBOL = 127  # the largest level that tables code
WHOLE = 8  # columns of a matrix are padded to it: 16 bytes of float16, which tensor cores want
PART = 13  # numbers that describe a part, in the order in which `decode_kernels` reads them
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Matrix:
    """Levels of a step class: [coefficients, columns], from element `at` of the group's levels; its tokens are rows `row` and on of the values.

    `wide`: coefficients of which some level may not be exact in float16.
    """

    step_class: int
    coefficients: int
    columns: int
    at: int
    row: int
    wide: I64


@dataclass(frozen=True)
class Launch:
    """What one tier's kernels need: places in the table, and how many programs and escapes there are."""

    programs: int
    programs_at: int
    parts_at: int
    escapes: int
    escapes_at: int


@dataclass(frozen=True)
class RawTokens:
    """Of one unit: `tokens` whose bits [layers, 2, tokens, channels] of `dtype` begin at word `at`; rows `row` and on of the values."""

    at: int
    tokens: int
    dtype: str
    row: int


@dataclass(frozen=True)
class Plan:
    """Units of one group, ready to be decoded. `tokens` int64 [units]; `table` int32, to be put on the device; `rows` rows of values, which
    `table[rows_at : rows_at + rows]` names (-1: none)."""

    group: int
    tokens: I64
    table: I32
    launches: list[Launch]
    matrices: list[Matrix]
    raws: list[RawTokens]
    elements: int
    rows: int
    rows_at: int

    @property
    def level(self) -> int:
        return len(self.launches) - 1

    @property
    def keeps_levels(self) -> bool:
        """Whether integer levels are wanted besides those in float16."""
        return any(len(matrix.wide) for matrix in self.matrices)


class _Tables:
    """The table in the making."""

    def __init__(self) -> None:
        self.arrays: list[I32] = []
        self.size = 0

    def add(self, numbers: npt.ArrayLike) -> int:
        """Where the numbers stand."""
        array = np.asarray(numbers, np.int32).reshape(-1)
        self.arrays.append(array)
        self.size += len(array)
        return self.size - len(array)

    def whole(self) -> I32:
        return np.concatenate(self.arrays) if self.arrays else np.empty(0, np.int32)


def make_plan(words: U32, spans: I64, tokens: I64, calibration: Calibration, ladder: Ladder, group: int, lanes: int = LANES) -> Plan:
    """Plan the records at `spans` [units, tiers, 2] (first word, words) of units of `tokens` [units], of which all tiers given are decoded.

    Raises IntegrityError for what no encoder writes, InputError for records beyond the words or of more tiers than there are.
    """
    layers, channels = len(calibration.group_layers(group)), calibration.record.kv_heads * calibration.record.head_dim
    if spans.shape[1] > ladder.tiers or len(tokens) != len(spans):
        raise InputError(f"records of shape {spans.shape} for {len(tokens)} units of {ladder.tiers} tiers")
    heads = read_heads(words, spans, tokens, group, layers, channels)
    classes, tables = alike(words, heads, tokens), _Tables()
    rows = [[[rows_of(ladder, tier, code, mine.shape[1]) for code, mine in these.sets] for these in classes] for tier in range(spans.shape[1])]
    finder = _Layout(classes, rows[-1])
    launches, raws = [], list[RawTokens]()
    for tier, cuts in enumerate(rows):
        found = [streams(words, heads, these, tier, mine, layers * 2 * channels) for these, mine in zip(classes, cuts, strict=True)]
        launches.append(_launch(tables, finder, found, cuts, ladder, tier, lanes))
        escaped = [corrections(words, heads, these, tier, mine, at) for these, mine, at in zip(classes, cuts, found, strict=True)]
        launches[-1] = _with_escapes(launches[-1], tables, finder, escaped, spans.shape[1] - 1 - tier)
        if tier == 0:
            raws = _raws(heads, classes, found, finder)
    rows_at = tables.add(finder.names())
    return Plan(group, tokens, tables.whole(), launches, finder.matrices(), raws, finder.elements, finder.rows, rows_at)


class _Layout:
    """Where the levels of each set of each class of units stand."""

    def __init__(self, classes: Sequence[Alike], rows: Sequence[Sequence[Rows]]):
        self.classes, self.wide = classes, dict[int, I64]()
        self.columns: dict[int, int] = {}
        self.first: dict[tuple[int, int], int] = {}  # (class of units, number of the set): its first column
        self.coefficients: dict[int, int] = {}
        for c, (these, mine) in enumerate(zip(classes, rows, strict=True)):
            for n, ((code, tokens), row) in enumerate(zip(these.sets, mine, strict=True)):
                self.first[c, n] = self.columns.get(code, 0)
                self.columns[code] = self.first[c, n] + tokens.size
                self.coefficients[code] = row.coded
        self.codes = [code for code in STEP_CLASSES if code in self.columns]
        self.columns = {code: -(-self.columns[code] // WHOLE) * WHOLE for code in self.codes}
        sizes = [self.columns[code] * self.coefficients[code] for code in self.codes]
        self.at = dict(zip(self.codes, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.row = dict(zip(self.codes, np.cumsum([0, *self.columns.values()]).tolist(), strict=False))
        self.elements, self.raw_row = sum(sizes), sum(self.columns.values())
        self.rows = self.raw_row + sum(these.raw.size for these in classes)
        if self.elements >= 1 << 31:
            raise InputError(f"{self.elements:,} levels at once", remedy="decode fewer units at a time")

    def place(self, c: int, n: int, coefficient: int) -> int:
        """Of a coefficient of the first token of the first unit of a class, among the group's levels."""
        code = self.classes[c].sets[n][0]
        return self.at[code] + coefficient * self.columns[code] + self.first[c, n]

    def names(self) -> I64:
        """int64 [rows]: unit << 12 | token of each row of values, -1 where there is none."""
        names = np.full(self.rows, -1, np.int64)
        raw = self.raw_row
        for c, these in enumerate(self.classes):
            for n, (code, tokens) in enumerate(these.sets):
                start = self.row[code] + self.first[c, n]
                names[start : start + tokens.size] = (these.units[:, None] << TOKEN_BITS | tokens).T.reshape(-1)
            names[raw : raw + these.raw.size] = (these.units[:, None] << TOKEN_BITS | these.raw).reshape(-1)
            raw += these.raw.size
        return names

    def matrices(self) -> list[Matrix]:
        none = np.empty(0, np.int64)
        return [
            Matrix(code, self.coefficients[code], self.columns[code], self.at[code], self.row[code], self.wide.get(code, none)) for code in self.codes
        ]


def _launch(
    tables: _Tables, layout: _Layout, found: Sequence[StreamPlaces], rows: Sequence[Sequence[Rows]], ladder: Ladder, tier: int, lanes: int
) -> Launch:
    """One part for each row of each set of each class of units; a program takes `lanes` streams of one part."""
    parts, programs = list[list[int]](), list[int]()
    for c, (these, places, mine) in enumerate(zip(layout.classes, found, rows, strict=True)):
        units_at, taken = tables.add(these.units), 0
        for n, ((code, _), row) in enumerate(zip(these.sets, mine, strict=True)):
            for first, count in ((0, row.refined), (row.refined, row.coded - row.refined)):
                if not count:
                    continue
                runs = cut(count * row.run, row.run)
                ends = places.ends[:, taken : taken + runs.streams + 1].T
                taken += runs.streams
                refines = first < row.refined
                shift = PER_THREE * (ladder.finest - tier + code + refines)
                streams_here = runs.streams * len(these.units)
                parts.append([len(programs), len(these.units), streams_here, runs.per, count, row.run, first, shift, tables.add(ends), units_at,
                              layout.place(c, n, first), layout.columns[code], int(refines)])  # fmt: skip
                programs += [len(parts) - 1] * -(-streams_here // lanes)
    return Launch(len(programs), tables.add(programs), tables.add(parts), 0, 0)


def _with_escapes(launch: Launch, tables: _Tables, layout: _Layout, found: Sequence[Corrections | None], above: int) -> Launch:
    """`launch` with the escapes: element, excess and unit of each. `above`: how many tiers refine this one."""
    lists = []
    for c, mine in enumerate(found):
        if mine is None:
            continue
        these = layout.classes[c]
        jobs = len(these.units)
        for n, (code, _) in enumerate(these.sets):
            chosen = mine.set == n
            coefficient, column = mine.coefficient[chosen], mine.token[chosen] * jobs + mine.member[chosen]
            element = layout.place(c, n, 0) + coefficient * layout.columns[code] + column
            lists.append(np.stack([element, mine.excess[chosen], these.units[mine.member[chosen]]], axis=1))
            _note_wide(layout.wide, code, coefficient, mine.excess[chosen], above)
    numbers = np.concatenate(lists) if lists else np.empty((0, 3), np.int64)
    return Launch(launch.programs, launch.programs_at, launch.parts_at, len(numbers), tables.add(numbers.T))


def _note_wide(wide: dict[int, I64], code: int, coefficient: I64, excess: I64, above: int) -> None:
    """Coefficients of which a corrected level may exceed what float16 holds exactly, once refined `above` times."""
    most = (SYMBOL + excess) * 3**above + (3**above - 1) // 2
    if (most > EXACT_HALF).any():
        wide[code] = np.union1d(wide.get(code, np.empty(0, np.int64)), coefficient[most > EXACT_HALF])


def _raws(heads: Heads, classes: Sequence[Alike], found: Sequence[StreamPlaces], layout: _Layout) -> list[RawTokens]:
    raws, row = [], layout.raw_row
    for these, places in zip(classes, found, strict=True):
        count = these.raw.shape[1]
        for unit, at in zip(these.units.tolist(), places.raw.tolist(), strict=True):
            if count:
                raws.append(RawTokens(at, count, DTYPES[int(heads.form[unit, 0]) >> 1 & 3], row))
                row += count
    return raws
