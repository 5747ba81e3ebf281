"""Values of the codec `cachegen` to and from the parts of its records."""

from __future__ import annotations

import numpy as np

from kvstore.codecs import cachegen_kernels
from kvstore.codecs.base import Array, Header, Record, damaged, to_record
from kvstore.codecs.cachegen_record import ANCHOR_BINS, GROUP, I64, SUBCHUNK, Bytes, Chunk, Floats, Head, Rows, pack_scales, parse
from kvstore.errors import InputError

ANCHOR_LEVEL = ANCHOR_BINS // 2 - 1
HIGHEST = np.float32(65504)  # of float16: half a step of a delta may lead out of it


def encode(header: Header, head: Head, levels: I64, values: Floats) -> bytes:
    """The record of float32 `values` [layers, 2, tokens, channels] of the head's dtype; `levels` [layers, 2] are those above zero."""
    planes = values.reshape(-1, header.tokens, header.channels)
    of_plane = levels.reshape(-1).astype(np.uint8)
    chunks = [part for t in range(0, header.tokens, head.chunk) for part in _encode_chunk(planes[:, t : t + head.chunk], head, of_plane)]
    return to_record(header.bytes(), head.bytes(), to_record(of_plane), *chunks)


def _encode_chunk(planes: Floats, head: Head, levels: Bytes) -> list[bytes]:
    """The parts for float32 [planes, tokens, channels]."""
    if not head.deltas:
        symbols, scales = quantise(planes, levels)
        return [pack_scales(scales, head.dtype), *_encode_rows(_by_channel(symbols), head.width, SUBCHUNK).parts()]
    anchor, other = _roles(planes.shape[1])
    scales = np.empty(planes.shape[:2], np.float32)
    of_anchors = np.full_like(levels, ANCHOR_LEVEL)
    symbols, scales[:, anchor] = quantise(planes[:, anchor], of_anchors)
    coded = [_encode_rows(symbols.reshape(len(planes), -1), ANCHOR_BINS, symbols[0].size)]
    if len(other):
        near = rounded(restore(symbols, of_anchors, scales[:, anchor]), head.dtype)[:, other // GROUP]
        symbols, scales[:, other] = quantise(_deltas(planes[:, other], near, head.dtype), levels)
        coded.append(_encode_rows(_by_channel(symbols), head.width, SUBCHUNK))
    return [pack_scales(scales, head.dtype), *(part for rows in coded for part in rows.parts())]


def _deltas(values: Floats, near: Floats, dtype: str) -> Floats:
    """Differences to the anchors as they will be decoded, in the model's dtype. Raises InputError where they leave its range."""
    deltas = rounded(values - near, dtype)
    if not np.isfinite(deltas).all():
        raise InputError(f"values of two tokens are too far apart for {dtype}", remedy="set deltas to 0 for the codec cachegen, or use another codec")
    return deltas


def _roles(tokens: int) -> tuple[I64, I64]:
    """The places of anchors and of the others in a chunk."""
    places = np.arange(tokens)
    return places[::GROUP], places[places % GROUP != 0]


def quantise(planes: Floats, levels: Bytes) -> tuple[Bytes, Floats]:
    """Symbols uint8 [planes, tokens, channels] from 0 to twice the plane's level, and scales [planes, tokens]: the largest magnitudes."""
    top = levels.astype(np.float32)[:, None, None]
    scales = np.abs(planes).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exact = np.rint(planes * (top / scales) + top)
    # A token of zeros, or next to them, has no factor: it is the level zero.
    return np.where(np.isfinite(exact), exact, top).astype(np.uint8), scales[..., 0]


def restore(symbols: Bytes, levels: Bytes, scales: Floats) -> Floats:
    """float32 [planes, tokens, channels], not yet rounded to the model's dtype."""
    top = levels.astype(np.float32)[:, None, None]
    restored: Floats = (symbols.astype(np.float32) - top) / top * scales[..., None]
    return restored


def rounded(values: Floats, dtype: str) -> Floats:
    """float32 values rounded to `dtype`, to nearest, ties to even."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def _by_channel(symbols: Bytes) -> Bytes:
    """Rows [planes * channels, tokens] from [planes, tokens, channels]."""
    return np.ascontiguousarray(symbols.transpose(0, 2, 1)).reshape(-1, symbols.shape[1])


def _encode_rows(symbols: Bytes, width: int, longest: int) -> Rows:
    """Streams of at most `longest` of the symbols [rows, n]."""
    rows, count = symbols.shape
    tables = np.empty((rows, width + 1), np.uint16)
    cachegen_kernels.tables(symbols, tables)
    lengths, data = [], []
    for first in range(0, count, longest):
        last, ends = min(count, first + longest), np.zeros(rows + 1, np.int64)
        out = np.zeros(rows * (cachegen_kernels.WORST * (last - first) // 8 + 2), np.uint8)
        cachegen_kernels.encode(symbols, first, last, tables, out, ends)
        lengths.append(np.diff(ends))
        data.append(out[: ends[-1]])
    return Rows(tables.astype("<u2", copy=False), np.stack(lengths).astype("<u4"), np.concatenate(data))


def decode(record: Record, out: Array) -> None:
    """Fill float32 `out` [layers, 2, tokens, channels], whose shape the record's header has. Raises IntegrityError."""
    _, head, levels, chunks = parse(record)
    start, (layers, _, _, channels) = 0, out.shape
    for chunk in chunks:
        values = _decode_chunk(chunk, head, levels, channels)
        count = values.shape[1]
        out[:, :, start : start + count] = values.reshape(layers, 2, count, channels)
        start += count


def _decode_chunk(chunk: Chunk, head: Head, levels: Bytes, channels: int) -> Floats:
    """[planes, tokens, channels], rounded to the model's dtype."""
    planes, tokens = chunk.scales.shape
    if chunk.anchors is None:
        symbols = _symbols(chunk.others, planes, tokens, channels, levels)
        return rounded(restore(symbols, levels, chunk.scales), head.dtype)
    anchor, other = _roles(tokens)
    of_anchors = np.full_like(levels, ANCHOR_LEVEL)
    symbols = _decode_rows(chunk.anchors, len(anchor) * channels, len(anchor) * channels).reshape(planes, -1, channels)
    values = np.empty((planes, tokens, channels), np.float32)
    values[:, anchor] = rounded(restore(_bounded(symbols, of_anchors), of_anchors, chunk.scales[:, anchor]), head.dtype)
    if len(other):
        symbols = _symbols(chunk.others, planes, len(other), channels, levels)
        near = values[:, other // GROUP * GROUP]
        with np.errstate(over="ignore"):  # damage only: no true sum overflows float32
            sums = near + restore(symbols, levels, chunk.scales[:, other])
        values[:, other] = rounded(np.clip(sums, -HIGHEST, HIGHEST) if head.dtype == "float16" else sums, head.dtype)
    return values


def _symbols(rows: Rows | None, planes: int, tokens: int, channels: int, levels: Bytes) -> Bytes:
    """[planes, tokens, channels]."""
    if rows is None:
        raise damaged("no rows")
    decoded = _decode_rows(rows, tokens, SUBCHUNK).reshape(planes, channels, tokens)
    return _bounded(decoded.transpose(0, 2, 1), levels)


def _bounded(symbols: Bytes, levels: Bytes) -> Bytes:
    """`symbols` [planes, ...]. Raises IntegrityError for one that its plane does not have."""
    if (symbols.max(axis=(1, 2)).astype(np.int64) > 2 * levels.astype(np.int64)).any():
        raise damaged("a level that does not exist")
    return symbols


def _decode_rows(rows: Rows, count: int, longest: int) -> Bytes:
    """uint8 [rows, count]."""
    out = np.empty((len(rows.tables), count), np.uint8)
    at = 0
    for i, first in enumerate(range(0, count, longest)):
        ends = np.cumsum(np.concatenate([[at], rows.lengths[i]]), dtype=np.int64)
        at = int(ends[-1])
        if not cachegen_kernels.decode(rows.data, ends, rows.tables, first, min(count, first + longest), out):
            raise damaged("a stream does not decode")
    return out
