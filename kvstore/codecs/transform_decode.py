"""Records of the codec `transform` to values: streams to levels, levels to lists of what is not zero, lists to sums of the transform's rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.calibration.record import Calibration
from kvstore.codecs import ans, transform_kernels
from kvstore.codecs.base import BITS, HEADER_WORDS, Array, Reader, Record, damaged, words_of
from kvstore.codecs.escapes import EscapeReader, Escapes
from kvstore.codecs.scalar import to_float32
from kvstore.codecs.sparse import CHUNK, TILE
from kvstore.codecs.tables import Tables
from kvstore.codecs.transform_ladder import Ladder, Rows, rows_of
from kvstore.codecs.transform_sets import RAW, unpack
from kvstore.codecs.transform_units import Head, Set

I8 = npt.NDArray[np.int8]
I16 = npt.NDArray[np.int16]
I64 = npt.NDArray[np.int64]


class Tier(NamedTuple):
    """One record: per set, how its rows are cut and which of the added levels are escaped; the streams of all rows in order."""

    rows: list[Rows]
    escapes: list[Escapes]
    streams: Iterator[ans.Coded]


class Raw(NamedTuple):
    """Tokens [n] whose `bits` [layers, 2, n, channels] of `dtype` are kept as they are."""

    tokens: I64
    bits: Array
    dtype: str


class Stored(NamedTuple):
    """The records of a unit, taken apart. `sets` are step classes and their tokens."""

    group: int
    sets: list[tuple[int, I64]]
    raw: Raw
    tiers: list[Tier]


def decode(records: Sequence[Record], calibration: Calibration, ladders: Sequence[Ladder], tables: Tables, out: Array) -> None:
    """Fill float32 `out` [layers, 2, tokens, channels], whose shape the records' headers have. Raises IntegrityError."""
    stored = read(records, calibration, ladders, out.shape)
    sets = levels(stored, ladders[stored.group], tables)
    _synthesise(sets, calibration, stored.group, ladders[stored.group], len(records) - 1, out)
    if len(stored.raw.tokens):
        out[:, :, stored.raw.tokens] = to_float32(stored.raw.bits, stored.raw.dtype)


def read(records: Sequence[Record], calibration: Calibration, ladders: Sequence[Ladder], shape: tuple[int, ...]) -> Stored:
    """Take the records of a unit [layers, 2, tokens, channels] apart, every length checked first. Raises IntegrityError."""
    readers = [Reader(words_of(record), HEADER_WORDS) for record in records]
    heads = [Head.read(reader, level) for level, reader in enumerate(readers)]
    group = heads[0].group
    if len({(head.group, head.sets) for head in heads}) > 1 or not _fits(calibration, group, shape):
        raise damaged(f"records of groups {[head.group for head in heads]}, sets {[head.sets for head in heads]} and shape {shape}")
    sets = unpack(readers[0], heads[0].sets, heads[0].packed, shape[2])
    raw_tokens = sets.pop()[1] if sets[-1][0] == RAW else np.empty(0, np.int64)
    rows = [[rows_of(ladders[group], level, code, len(tokens)) for code, tokens in sets] for level in range(len(records))]
    streams = [ans.take(reader, [cut.streams for row in mine for cut in row.cuts()]) for reader, mine in zip(readers, rows, strict=True)]
    raw = _read_raw(readers[0], raw_tokens, heads[0].dtype, shape)
    escapes = [_read_escapes(reader, head, mine) for reader, head, mine in zip(readers, heads, rows, strict=True)]
    for reader in readers:
        reader.finish()
    return Stored(group, sets, raw, [Tier(*parts) for parts in zip(rows, escapes, streams, strict=True)])


def _fits(calibration: Calibration, group: int, shape: tuple[int, ...]) -> bool:
    """Whether a unit of this shape can be of this group."""
    if group >= len(calibration.bases):
        return False
    return shape[0] == len(calibration.group_layers(group)) and 2 * shape[0] * shape[3] == calibration.bases[group].dim


def _read_raw(reader: Reader, tokens: I64, dtype: str, shape: tuple[int, ...]) -> Raw:
    size, kind = (shape[0], 2, len(tokens), shape[3]), BITS[dtype]
    bits = reader.take_bytes(math.prod(size) * kind.itemsize).view(kind.newbyteorder("<"))
    return Raw(tokens, bits.astype(kind, copy=False).reshape(size), dtype)


def _read_escapes(reader: Reader, head: Head, rows: Sequence[Rows]) -> list[Escapes]:
    found = EscapeReader(reader, [(head.escapes, head.widths)]).take(head.escapes, head.widths)
    return found.split([row.added for row in rows])


def levels(stored: Stored, ladder: Ladder, tables: Tables) -> list[Set]:
    """The levels of the finest tier stored. Raises IntegrityError for streams that no encoder writes."""
    wanted = [stored.tiers[-1].rows[number].coded for number in range(len(stored.sets))]
    found = [Set(code, tokens, np.empty((count, len(tokens)), np.int16)) for (code, tokens), count in zip(stored.sets, wanted, strict=True)]
    signs: list[I8] = [np.empty(0, np.int8) for _ in found]
    for level, tier in enumerate(stored.tiers):
        for number, mine in enumerate(found):
            _decode_tier(tier, number, mine, signs[number], ladder, level, tables)
            if level + 1 < len(stored.tiers):
                signs[number] = _signs(mine.levels[: tier.rows[number].coded])
    return found


def _decode_tier(tier: Tier, number: int, mine: Set, signs: I8, ladder: Ladder, level: int, tables: Tables) -> None:
    """The levels of one set at the tier below, in place, become those of this tier."""
    rows = tier.rows[number]
    middle, last = rows.refined * rows.run, rows.coded * rows.run
    flat = mine.levels.reshape(-1)
    if middle:
        used = ladder.tables(level - 1, mine.step_class)[: rows.refined]
        thirds = ans.decode_ternary(next(tier.streams), ans.cut(middle, rows.run), used, tables.thirds, signs)
        transform_kernels.refine(flat[:middle], thirds)
    if last > middle:
        used = ladder.tables(level, mine.step_class)[rows.refined : rows.coded]
        flat[middle:last] = ans.decode(next(tier.streams), ans.cut(last - middle, rows.run), used, tables.decode).view(np.int8)
        _correct(flat[middle:last], tier.escapes[number], ladder.limit(level))


def _correct(added: I16, escapes: Escapes, limit: int) -> None:
    if not len(escapes.at):
        return
    true = escapes.correct(added[escapes.at].astype(np.int64))
    if int(np.abs(true).max()) > limit:
        raise damaged("an escaped level out of range")
    added[escapes.at] = true


def _signs(found: I16) -> I8:
    out = np.empty(found.size, np.int8)
    transform_kernels.signs(found.reshape(-1), out)
    return out


def _synthesise(sets: Sequence[Set], calibration: Calibration, group: int, ladder: Ladder, level: int, out: Array) -> None:
    basis, shrink = calibration.bases[group], calibration.record.shrink[level]
    width, tokens = max((len(mine.levels) for mine in sets), default=0), out.shape[2]
    starts = np.zeros((tokens, 1 + -(-width // CHUNK)), np.int32)
    index, values = np.empty((tokens, width), np.uint16), np.empty((tokens, width), np.float32)
    for mine in sets:
        step = ladder.step_of(level, mine.step_class)
        transform_kernels.gather(mine.levels, mine.tokens, step, np.float32((1 - shrink) * step), starts, index, values)
    transform_kernels.synthesise(starts, index, values, np.array(basis.mean), basis.tiles(width, TILE), out)
