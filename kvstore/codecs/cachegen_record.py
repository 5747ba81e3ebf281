"""Records of the codec `cachegen`, taken apart without decoding: neither numba nor torch is needed.

Header; head; levels; then chunk by chunk the scales, the anchors where there are deltas, the other tokens. Anchors and others are rows of
symbols: their tables, the lengths of their streams, the streams' bytes. The anchors of a plane (a layer of K or of V) are one row with one
table, since a table of 256 bins for each channel would be larger than they are. The others have a row per plane and channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import BITS, HEADER_WORDS, MAX_TOKENS, Array, Header, Reader, Record, damaged, read_header, to_record, words_of

SUBCHUNK = 256  # tokens of a stream
GROUP = 10  # tokens that share an anchor
ANCHOR_BINS = 256
DTYPES = tuple(BITS)
# The pickle around a chunk, as torch 2.13 writes it: bytes, and those for each sub-chunk (one less where there is only one).
CONTAINER = {"bfloat16": (1128, 580), "float16": (1114, 580), "float32": (1116, 580)}
HEAD = np.dtype([("first", "<u2"), ("width", "<u2"), ("chunk", "<u2"), ("dtype", "u1"), ("deltas", "u1")])
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


class Head(NamedTuple):
    """First layer of the unit; bins that tables are wide; tokens a chunk; the values' dtype; whether there are deltas."""

    first: int
    width: int
    chunk: int
    dtype: str
    deltas: bool

    def bytes(self) -> bytes:
        return np.array((*self[:3], DTYPES.index(self.dtype), self.deltas), HEAD).tobytes()


class Rows(NamedTuple):
    """Coded rows: uint16 `tables` [rows, width + 1], uint32 `lengths` [streams a row, rows], the streams' bytes in that order."""

    tables: Array
    lengths: Array
    data: Bytes

    def parts(self) -> list[bytes]:
        return [to_record(self.tables), to_record(self.lengths), to_record(self.data)]

    def nbytes(self) -> I64:
        """int64 [rows]."""
        return self.tables[0].nbytes + 4 * len(self.lengths) + self.lengths.sum(axis=0, dtype=np.int64)


class Chunk(NamedTuple):
    """float32 `scales` [planes, tokens], and the rows; those of anchors or of others may be missing."""

    scales: Floats
    anchors: Rows | None
    others: Rows | None

    @property
    def rows(self) -> list[Rows]:
        return [rows for rows in (self.anchors, self.others) if rows is not None]


class Parsed(NamedTuple):
    """A record: its heads, the levels above zero of its planes (uint8 [2 * layers]), its chunks one by one, each as it is asked for."""

    header: Header
    head: Head
    levels: Bytes
    chunks: Iterator[Chunk]


def parse(record: Record) -> Parsed:
    """A record, taken apart; asking for its chunks to the end makes sure that nothing follows. Raises IntegrityError, then too."""
    header, reader = read_header(record), Reader(words_of(record), HEADER_WORDS)
    first, width, chunk, dtype, deltas = reader.take_bytes(HEAD.itemsize).view(HEAD)[0].tolist()
    levels = reader.take_bytes(2 * header.layers)
    least, top = int(levels.min()), int(levels.max())
    if not (dtype < len(DTYPES) and deltas < 2 and 1 <= chunk <= MAX_TOKENS and least and 2 * top + 2 <= width <= 256):
        raise damaged(f"impossible head: {width} bins, chunks of {chunk}, dtype {dtype}, deltas {deltas}, levels {least} to {top}")
    head = Head(first, width, chunk, DTYPES[dtype], bool(deltas))
    return Parsed(header, head, levels, _chunks(reader, header, head))


def _chunks(reader: Reader, header: Header, head: Head) -> Iterator[Chunk]:
    for start in range(0, header.tokens, head.chunk):
        yield _take_chunk(reader, head, 2 * header.layers, min(head.chunk, header.tokens - start), header.channels)
    reader.finish()


def _take_chunk(reader: Reader, head: Head, planes: int, tokens: int, channels: int) -> Chunk:
    scales = _unpack_scales(reader.take_bytes(BITS[head.dtype].itemsize * planes * tokens), head.dtype).reshape(planes, tokens)
    anchors, others, coded = None, None, tokens
    if head.deltas:
        anchors, coded = _take_rows(reader, planes, ANCHOR_BINS, 1), tokens - -(-tokens // GROUP)
    if coded:
        others = _take_rows(reader, planes * channels, head.width, -(-coded // SUBCHUNK))
    return Chunk(scales, anchors, others)


def _take_rows(reader: Reader, rows: int, width: int, streams: int) -> Rows:
    tables = reader.take_bytes(2 * rows * (width + 1)).view("<u2").astype(np.uint16, copy=False).reshape(rows, width + 1)
    if tables[:, 0].any() or not (tables[:, 1:] > tables[:, :-1]).all():
        raise damaged("a table that does not ascend")
    lengths = reader.take(streams * rows)
    return Rows(tables, lengths.reshape(streams, rows), reader.take_bytes(int(lengths.sum(dtype=np.int64))))


def _unpack_scales(raw: Bytes, dtype: str) -> Floats:
    if dtype == "bfloat16":
        scales = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        scales = raw.view("<f2" if dtype == "float16" else "<f4").astype(np.float32)
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise damaged("a scale that is no magnitude")
    return scales


def pack_scales(scales: Floats, dtype: str) -> bytes:
    """Scales that `dtype` holds exactly, in it."""
    if dtype == "bfloat16":
        return to_record((scales.view(np.uint32) >> 16).astype("<u2"))
    return to_record(scales.astype("<f2" if dtype == "float16" else "<f4"))


def sizes(record: Record) -> Iterator[tuple[int, int, int, int, int]]:
    """Per chunk, as LMCache stores them: bytes of streams, tables, lengths, scales, container. Raises IntegrityError."""
    parsed = parse(record)
    for chunk in parsed.chunks:
        streams, tables, lengths = (
            sum(part.nbytes for part in parts) for parts in zip(*((r.data, r.tables, r.lengths) for r in chunk.rows), strict=True)
        )
        yield streams, tables, lengths, BITS[parsed.head.dtype].itemsize * chunk.scales.size, _container(parsed.head, chunk.scales.shape[1])


def _container(head: Head, tokens: int) -> int:
    fixed, each = CONTAINER[head.dtype]
    streams = -(-tokens // SUBCHUNK)
    return fixed + each * streams - (streams == 1) if head.first == 0 else 0


def kind_nbytes(record: Record) -> tuple[int, int]:
    """Bytes of keys and of values. Raises IntegrityError."""
    parsed, total = parse(record), np.zeros(2, np.int64)
    for chunk in parsed.chunks:
        total += BITS[parsed.head.dtype].itemsize * chunk.scales.size // 2
        for rows in chunk.rows:
            total += rows.nbytes().reshape(parsed.header.layers, 2, -1).sum(axis=(0, 2))
    return int(total[0]), int(total[1])
