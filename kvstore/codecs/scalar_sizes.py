"""How much of a record of the codec `scalar` are keys and how much are values, without decoding it and without compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from kvstore.codecs.base import HEADER_WORDS, Header, Reader, Record, damaged, words_of
from kvstore.codecs.escapes import WIDTHS
from kvstore.codecs.grouping import HEAD, Plane, base_runs


def kind_nbytes(record: Record, header: Header, kinds: Sequence[Plane]) -> tuple[int, int]:
    """Bytes of the planes of keys and of values; what is left of the record is its header and padding. Raises IntegrityError."""
    reader, planes = Reader(words_of(record), HEADER_WORDS), list(kinds) * header.layers
    heads = [reader.take_bytes(HEAD.itemsize).view(HEAD)[0] for _ in planes] if header.level == 0 else []
    counts = [sum(runs.streams for runs in (base_runs(p) if heads else base_runs(p)[-1:])) for p in planes]
    sizes = _stream_nbytes(reader, counts)
    escapes = [int(h["escapes"]) * _width(int(h["widths"])) for h in heads] or [0] * len(planes)
    reader.take_bytes(sum(escapes))
    reader.finish()
    whole = [(HEAD.itemsize if heads else 0) + s + e for s, e in zip(sizes, escapes, strict=True)]
    return sum(whole[0::2]), sum(whole[1::2])


def _stream_nbytes(reader: Reader, counts: Sequence[int]) -> list[int]:
    """Of so many streams each: their lengths and their words."""
    lengths = reader.take_bytes(2 * sum(counts)).view("<u2").astype(np.int64)
    reader.take(int(lengths.sum()))
    return [int(4 * lengths[a:b].sum()) + 2 * (b - a) for a, b in pairwise(accumulate(counts, initial=0))]


def _width(widths: int) -> int:
    """Bytes of one escape: a gap and an excess."""
    if max(widths & 15, widths >> 4) >= len(WIDTHS):
        raise damaged(f"escapes of widths {widths}")
    return WIDTHS[widths & 15].itemsize + WIDTHS[widths >> 4].itemsize
