"""The bit patterns as they are: the codec to compare with, and the one that needs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from kvstore.codecs.base import BITS, HEADER_WORDS, Array, Codec, Record, check_bits, damaged, expect, read_header, to_record, words_of
from kvstore.errors import InputError


class RawCodec(Codec):
    """Header, then the bits of the valid tokens, little-endian, padded to whole words."""

    name: ClassVar[str] = "raw"
    exact: ClassVar[bool] = True

    def encode(self, bits: Array, dtype: str, group: int = 0) -> list[bytes]:
        header = check_bits(bits, dtype)
        return [to_record(header.bytes(), bits.astype(bits.dtype.newbyteorder("<"), copy=False))]

    def decode(self, records: Sequence[Record], out: Array) -> None:
        expect(records, out, self.n_tiers)
        if out.dtype.kind != "u":
            raise InputError(f"codec raw decodes to bit patterns, not to {out.dtype}")
        body = words_of(records[0])[HEADER_WORDS:].astype("<u4", copy=False).view(out.dtype.newbyteorder("<"))
        if not out.size <= len(body) < out.size + 4 // out.itemsize:
            raise damaged(f"{len(body)} values for shape {out.shape}")
        out[...] = body[: out.size].reshape(out.shape)

    @classmethod
    def kind_nbytes(cls, record: Record, params: Mapping[str, int | str], dtype: str) -> tuple[int, int]:
        header = read_header(record)
        each = header.layers * header.tokens * header.channels * BITS[dtype].itemsize
        if not 0 <= len(record) - 4 * HEADER_WORDS - 2 * each < 4:
            raise damaged(f"{len(record)} bytes for shape {header.shape}")
        return each, each
