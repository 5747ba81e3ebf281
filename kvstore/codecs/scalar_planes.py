"""Records of the codec `scalar`: the planes (layer by layer, keys then values) one after another.

Base record: header; per plane four words (step as float32; class centre, class table, offset table, widths as bytes; offset
centre; number of escapes); lengths of all streams as uint16; their words; escapes. The streams of a plane: scale classes
less their centre, offsets less theirs (keys by channel only), base values. An escape corrects one symbol of these rows laid
end to end: the distance from the escape before, less one, and the excess over the largest of the alphabet, less one.
Refinement record: header; lengths; words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs import ans, scalar_kernels
from kvstore.codecs.base import HEADER_WORDS, Array, Header, Reader, Record, damaged, to_record, words_of
from kvstore.codecs.escapes import EscapeReader, Escapes, pack_escapes
from kvstore.codecs.grouping import HEAD, Floats, Plane, base_runs
from kvstore.codecs.tables import CLASSES, class_bounds, tables

FAR = 1 << 28  # no true offset is as large: levels have 24 bits
I32 = npt.NDArray[np.int32]
NO_THIRDS, NO_OFFSETS = np.empty(0, np.int8), np.empty(0, np.int32)


class Side(NamedTuple):
    """A row of side symbols: integers less their `centre`, coded by the table of class `table`."""

    centre: int
    table: int
    coded: ans.Coded
    escapes: Escapes


class EncodedPlane(NamedTuple):
    head: bytes
    base: list[ans.Coded]
    escapes: bytes
    refinement: ans.Coded


class Head(NamedTuple):
    """The four words of a plane."""

    step: np.float32
    class_centre: int
    class_table: int
    offset_table: int
    widths: int
    offset_centre: int
    escapes: int


def encode(values: Floats, plane: Plane, step: np.float32, typical: npt.NDArray[np.bool_]) -> EncodedPlane:
    """The streams of `values` [tokens, channels]; `typical` [tokens] says which tokens count in the means of keys."""
    built, levels, runs = tables(), np.empty(plane.size, np.int32), ans.cut(plane.size, plane.run)
    scalar_kernels.levels(values, 1 / float(step), plane.channel_major, levels)
    offsets = _offsets(levels.reshape(plane.channels, plane.tokens), typical) if plane.channel_major else NO_OFFSETS
    classes, base, third = np.empty(plane.runs, np.uint8), np.empty(plane.size, np.int8), np.empty(plane.size, np.uint8)
    escaped = scalar_kernels.split(levels, plane.run, offsets, class_bounds(1), built.largest, built.bits, classes, base, third)
    sides = [_encode_side(row) for row in ((classes, offsets) if plane.channel_major else (classes,))]
    found = Escapes.between(levels, base) if escaped else Escapes.none()
    escapes, widths = pack_escapes([*(s.escapes for s in sides), found], [plane.runs, len(offsets)][: len(sides)])
    head = (step, sides[0].centre, sides[0].table, sides[-1].table, widths, sides[-1].centre, sum(len(s.escapes.at) for s in sides) + len(found.at))
    coded = [*(side.coded for side in sides), ans.encode(base.view(np.uint8), runs, classes, built.encode)]
    return EncodedPlane(np.array(head, HEAD).tobytes(), coded, escapes, ans.encode(third, runs, classes, built.refine))


def assemble(header: Header, planes: Sequence[EncodedPlane]) -> list[bytes]:
    """Both records of a unit."""
    base = [coded for plane in planes for coded in plane.base]
    first = to_record(header.bytes(), *(p.head for p in planes), *_joined(base), *(p.escapes for p in planes))
    return [first, to_record(replace(header, level=1).bytes(), *_joined([p.refinement for p in planes]))]


def _joined(rows: Sequence[ans.Coded]) -> list[bytes]:
    """Lengths of all streams, padded to whole words, and their words."""
    return [to_record(*(row.lengths() for row in rows)), *(row.content() for row in rows)]


def _offsets(levels: I32, typical: npt.NDArray[np.bool_]) -> I32:
    """int32 [channels]: mean level of the typical tokens in base steps (three fine levels), rounded."""
    total = (levels if typical.all() else levels[:, typical]).sum(axis=1, dtype=np.int64)
    return np.rint(total / (3 * typical.sum())).astype(np.int32)


def _encode_side(row: npt.NDArray[Any]) -> Side:
    built, values = tables(), row.astype(np.int64)
    centre = int(np.partition(values, len(values) // 2)[len(values) // 2])
    rest = values - centre
    table = int(np.searchsorted(class_bounds(0), np.abs(rest).sum() * 65536 // len(rest)))
    most = int(built.largest[table])
    symbols = np.clip(rest, -most, most).astype(np.int8)
    runs = ans.cut(len(rest), ans.STREAM)
    coded = ans.encode(symbols.view(np.uint8), runs, _one_table(runs), built.encode[table : table + 1])
    return Side(centre, table, coded, Escapes.between(rest, symbols))


def _one_table(runs: ans.Runs) -> npt.NDArray[np.uint8]:
    return np.zeros(-(-runs.symbols // runs.run), np.uint8)


def decode(records: Sequence[Record], kinds: Sequence[Plane], out: Array) -> None:
    """Fill float32 `out` [layers, 2, tokens, channels], whose shape the records' headers have. Raises IntegrityError."""
    readers = [Reader(words_of(record), HEADER_WORDS) for record in records]
    heads = [_read_head(readers[0].take_bytes(HEAD.itemsize)) for _ in range(2 * len(out))]
    planes = [kinds[i % 2] for i in range(len(heads))]
    base = ans.take(readers[0], [runs.streams for plane in planes for runs in base_runs(plane)])
    fine = ans.take(readers[1], [base_runs(plane)[-1].streams for plane in planes]) if len(records) > 1 else None
    escapes = EscapeReader(readers[0], [(head.escapes, head.widths) for head in heads])
    for reader in readers:
        reader.finish()
    for i, (head, plane) in enumerate(zip(heads, planes, strict=True)):
        streams = [next(base) for _ in base_runs(plane)]
        _decode_plane(head, plane, streams, next(fine) if fine else None, escapes.take(head.escapes, head.widths), out[i // 2, i % 2])


def _read_head(raw: npt.NDArray[np.uint8]) -> Head:
    head = Head(*raw.view(HEAD)[0].tolist())
    if not (0 < head.step < np.inf and max(head.class_table, head.offset_table) < CLASSES and abs(head.offset_centre) < FAR):
        raise damaged(f"impossible plane {head}")
    return head._replace(step=np.float32(head.step))


def _decode_plane(head: Head, plane: Plane, base: list[ans.Coded], fine: ans.Coded | None, escapes: Escapes, out: Floats) -> None:
    rows, built = base_runs(plane), tables()
    mine = escapes.split([runs.symbols for runs in rows])
    classes = _decode_side(base[0], rows[0], head.class_table, head.class_centre, mine[0])
    if classes.min() < 0 or classes.max() >= CLASSES:
        raise damaged("a scale class that does not exist")
    offsets = _decode_side(base[1], rows[1], head.offset_table, head.offset_centre, mine[1]) if plane.channel_major else NO_OFFSETS
    if plane.channel_major and np.abs(offsets).max() >= FAR:
        raise damaged("an offset out of range")
    table_of_run = classes.astype(np.uint8)
    values = ans.decode(base[-1], rows[-1], table_of_run, built.decode).view(np.int8)
    thirds = ans.decode_ternary(fine, rows[-1], table_of_run, built.thirds, values) if fine else NO_THIRDS
    offsets = offsets.astype(np.int32)
    target = out if out.flags.c_contiguous else np.empty(out.shape, np.float32)
    scalar_kernels.restore(values, thirds, offsets, head.step, plane.channel_major, target)
    _restore_escapes(plane, values, thirds, offsets, head.step, mine[-1], target)
    if target is not out:
        out[...] = target


def _decode_side(coded: ans.Coded, runs: ans.Runs, table: int, centre: int, escapes: Escapes) -> npt.NDArray[np.int64]:
    symbols = ans.decode(coded, runs, _one_table(runs), tables().decode[table : table + 1]).view(np.int8)
    values = symbols.astype(np.int64)
    values[escapes.at] = escapes.correct(values[escapes.at])
    return values + centre


def _restore_escapes(plane: Plane, base: Array, thirds: Array, offsets: I32, step: np.float32, escapes: Escapes, out: Floats) -> None:
    at = escapes.at
    if not len(at):
        return
    channel, token = np.divmod(at, plane.tokens) if plane.channel_major else np.divmod(at, plane.channels)[::-1]
    levels = 3 * escapes.correct(base[at].astype(np.int64))
    levels += thirds[at] if len(thirds) else 0
    levels += 3 * offsets[channel].astype(np.int64) if plane.channel_major else 0
    with np.errstate(over="ignore"):  # damage only: no true value overflows
        out[token, channel] = levels.astype(np.float32) * step
