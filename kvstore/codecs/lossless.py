"""Every bit back: exponents entropy-coded, sign and mantissa as they are. No float arithmetic anywhere.

A value splits into a symbol, its bits below the sign (8 of them: the exponent of bfloat16 and float32, the exponent and three
bits of the mantissa of float16), and the rest as whole bytes, the sign first. Symbols lose a per-channel offset where that
pays (keys, whose channels have means), and are coded with a table of 12-bit weights that the record carries; where coding
does not pay they stay bytes. A byte of the rest that is the same everywhere (float32 that was bfloat16) is stored once.

Record: header; then per layer and kind, each part padded to whole words: four bytes (mode, symbols of the alphabet less one,
lowest offset, mask of constant bytes); offsets above the lowest, a nibble or a byte a channel; alphabet and its weights;
streams or symbols; the rest, byte plane by byte plane from the lowest.

Measured on a small Llama in bfloat16: 10.5 bits a key (10.7 without offsets), 10.7 bits a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import BITS, HEADER_WORDS, Array, Codec, Reader, Record, check_bits, damaged, expect, read_header, to_record, words_of
from kvstore.codecs.runs import STREAM, cut
from kvstore.errors import InputError

CODED, OFFSETS, WIDE = 1, 2, 4
TOTAL = 4096
Bytes = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


class LosslessCodec(Codec):
    """See the module."""

    name: ClassVar[str] = "lossless"
    exact: ClassVar[bool] = True

    def encode(self, bits: Array, dtype: str, group: int = 0) -> list[bytes]:
        header = check_bits(bits, dtype)
        planes = [part for layer in bits for plane in layer for part in encode_plane(np.ascontiguousarray(plane))]
        return [to_record(header.bytes(), *planes)]

    def decode(self, records: Sequence[Record], out: Array) -> None:
        expect(records, out, self.n_tiers)
        if out.dtype.kind != "u" or out.itemsize not in (2, 4):
            raise InputError(f"codec lossless decodes to bit patterns, not to {out.dtype}")
        reader = Reader(words_of(records[0]), HEADER_WORDS)
        for layer in out:
            for plane in layer:
                decode_plane(reader, plane)
        reader.finish()

    @classmethod
    def kind_nbytes(cls, record: Record, params: Mapping[str, int | str], dtype: str) -> tuple[int, int]:
        header, reader = read_header(record), Reader(words_of(record), HEADER_WORDS)
        ends = [reader.at, *(skip_plane(reader, header.tokens, header.channels, BITS[dtype].itemsize) for _ in range(2 * header.layers))]
        reader.finish()
        sizes = 4 * np.diff(ends)
        return int(sizes[0::2].sum()), int(sizes[1::2].sum())


class Alphabet(NamedTuple):
    """The symbols that occur, ascending, and their weights, which sum to 4,096."""

    symbols: I64
    weights: I64


def encode_plane(plane: Array) -> list[bytes]:
    """The parts of the record for bit patterns [tokens, channels]."""
    symbols, rest = split(plane)
    lowest, flags, packed = 0, 0, b""
    offsets, moved = _move(symbols)
    if _saves(symbols, moved, len(offsets)):
        symbols, lowest, flags, packed = moved, int(offsets.min()), *_pack_offsets(offsets)
    counts = np.bincount(symbols.reshape(-1), minlength=256)
    alphabet = alphabet_of(counts)
    constant = [bool((part == part[0]).all()) for part in rest]
    mask = sum(1 << i for i, same in enumerate(constant) if same)
    stored = [to_record(part[:1] if same else part) for part, same in zip(rest, constant, strict=True)]
    if _cost(counts, alphabet) >= symbols.size:
        return [bytes([flags, 0, lowest, mask]), packed, to_record(symbols), *stored]
    head = bytes([flags | CODED, len(alphabet.symbols) - 1, lowest, mask])
    return [head, packed, _pack_alphabet(alphabet), *_encode_symbols(symbols.reshape(-1), alphabet), *stored]


def split(plane: Array) -> tuple[Bytes, list[Bytes]]:
    """Symbols [tokens, channels], and the other bytes [tokens * channels] from the lowest up, the sign in the last's top bit."""
    low = 8 * plane.itemsize - 9
    rest = (plane & plane.dtype.type((1 << low) - 1)) | (plane >> plane.dtype.type(8)) & plane.dtype.type(1 << low)
    bytes_of = rest.astype(plane.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).reshape(-1, plane.itemsize)
    return (plane >> plane.dtype.type(low)).astype(np.uint8), [np.ascontiguousarray(bytes_of[:, i]) for i in range(plane.itemsize - 1)]


def merge(symbols: Bytes, rest: Sequence[Bytes], out: Array) -> None:
    """The reverse of `split`, into `out` [tokens, channels]."""
    kind, low = out.dtype.type, 8 * out.itemsize - 9
    packed = np.zeros((out.size, out.itemsize), np.uint8)
    for i, part in enumerate(rest):
        packed[:, i] = part
    values = packed.reshape(-1).view(out.dtype.newbyteorder("<")).astype(out.dtype, copy=False).reshape(out.shape)
    np.bitwise_or(values & kind((1 << low) - 1), (values & kind(1 << low)) << kind(8), out=out)
    out |= symbols.reshape(out.shape).astype(out.dtype) << kind(low)


def alphabet_of(counts: I64) -> Alphabet:
    """The alphabet of `counts` [256]: each symbol that occurs has one weight for certain, the others go by counts (largest remainder)."""
    symbols = np.flatnonzero(counts)
    if len(symbols) == 1:  # a lone weight would not fit 12 bits
        symbols = np.sort(np.append(symbols, (symbols[0] + 1) % 256))
    free = TOTAL - len(symbols)
    shares, remainders = np.divmod(counts[symbols] * free, counts.sum())
    order = np.argsort(-remainders, kind="stable")
    shares[order[: free - int(shares.sum())]] += 1
    return Alphabet(symbols, shares + 1)


def _move(symbols: Bytes) -> tuple[Bytes, Bytes]:
    """Offsets [channels], the mean symbols, rounded; and the symbols less them, modulo 256."""
    tokens = len(symbols)
    offsets = ((2 * symbols.sum(axis=0, dtype=np.int64) + tokens) // (2 * tokens)).astype(np.uint8)
    return offsets, symbols - offsets


def _saves(symbols: Bytes, moved: Bytes, channels: int) -> bool:
    plain, less = (np.bincount(s.reshape(-1), minlength=256) for s in (symbols, moved))
    return _cost(less, alphabet_of(less)) + channels < _cost(plain, alphabet_of(plain))


def _cost(counts: I64, alphabet: Alphabet) -> float:
    """Bytes of coded symbols, table and streams."""
    bits = counts[alphabet.symbols] * np.log2(TOTAL / alphabet.weights)
    return float(bits.sum()) / 8 + 3 * len(alphabet.symbols) + 7 * (counts.sum() // TOTAL + 1)


def _pack_offsets(offsets: Bytes) -> tuple[int, bytes]:
    """Flags, and offsets above the lowest: two a byte where they fit four bits."""
    above = offsets - offsets.min()
    if above.max() > 15:
        return OFFSETS | WIDE, to_record(above)
    even = np.append(above, np.zeros(len(above) % 2, np.uint8))
    return OFFSETS, to_record(even[0::2] | even[1::2] << 4)


def _pack_alphabet(alphabet: Alphabet) -> bytes:
    return to_record(alphabet.symbols.astype(np.uint8)) + to_record(alphabet.weights.astype("<u2"))


def _encode_symbols(symbols: Bytes, alphabet: Alphabet) -> list[bytes]:
    from kvstore.codecs import ans

    runs = ans.cut(len(symbols), ans.STREAM)
    table = ans.encode_table(alphabet.weights, alphabet.symbols)[None]
    coded = ans.encode(symbols, runs, np.zeros(runs.streams, np.uint8), table)
    return [to_record(coded.lengths()), coded.content()]


def decode_plane(reader: Reader, out: Array) -> None:
    """The next plane of a record into `out` [tokens, channels]. Raises IntegrityError."""
    mode, last, lowest, mask = reader.take_bytes(4).tolist()
    if mode & ~(CODED | OFFSETS | WIDE) or mask >> (out.itemsize - 1):
        raise damaged(f"mode {mode}, mask {mask}")
    offsets = _read_offsets(reader, mode, lowest, out.shape[1])
    symbols = _decode_symbols(reader, last + 1, out.size) if mode & CODED else reader.take_bytes(out.size)
    rest = [reader.take_bytes(1 if mask >> i & 1 else out.size) for i in range(out.itemsize - 1)]
    if offsets is not None:
        symbols = symbols.reshape(out.shape) + offsets
    merge(symbols, rest, out)


def skip_plane(reader: Reader, tokens: int, channels: int, itemsize: int) -> int:
    """Where the next plane ends: the reader's place after it. Raises IntegrityError."""
    (mode, last, _, mask), size = reader.take_bytes(4).tolist(), tokens * channels
    if mode & OFFSETS:
        reader.take_bytes(channels if mode & WIDE else -(-channels // 2))
    if mode & CODED:
        reader.take_bytes(last + 1)
        reader.take_bytes(2 * (last + 1))
        lengths = reader.take_bytes(2 * cut(size, STREAM).streams).view("<u2")
        reader.take(int(lengths.sum(dtype=np.int64)))
    else:
        reader.take_bytes(size)
    for i in range(itemsize - 1):
        reader.take_bytes(1 if mask >> i & 1 else size)
    return reader.at


def _read_offsets(reader: Reader, mode: int, lowest: int, channels: int) -> Bytes | None:
    if not mode & OFFSETS:
        return None
    if mode & WIDE:
        return reader.take_bytes(channels) + np.uint8(lowest)
    pairs = reader.take_bytes(-(-channels // 2))
    return np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:channels] + np.uint8(lowest)


def _decode_symbols(reader: Reader, count: int, size: int) -> Bytes:
    from kvstore.codecs import ans

    symbols = reader.take_bytes(count).astype(np.int64)
    weights = reader.take_bytes(2 * count).view("<u2").astype(np.int64)
    if count < 2 or weights.min() < 1 or weights.sum() != TOTAL or (np.diff(symbols) <= 0).any():
        raise damaged("an impossible table of weights")
    runs = ans.cut(size, ans.STREAM)
    (coded,) = ans.take(reader, [runs.streams])
    return ans.decode(coded, runs, np.zeros(runs.streams, np.uint8), ans.decode_table(weights, symbols)[None])
