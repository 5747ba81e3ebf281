"""What every codec is: records in, values out. And the header that all records share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvstore.errors import FormatError, InputError, IntegrityError

if TYPE_CHECKING:
    from kvstore.calibration.record import Calibration

Record = bytes | memoryview
Array = npt.NDArray[Any]
Words = npt.NDArray[np.uint32]
BITS: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(np.uint16), "float16": np.dtype(np.uint16), "float32": np.dtype(np.uint32)}
MAX_TOKENS, MAX_LAYERS, MAX_CHANNELS = 4096, 65535, 1 << 20
HEADER_WORDS = 3


class Codec(ABC):
    """Turns a unit's values into one record per tier and back.

    `params` are canonical: ints and strings only, every one present. An instance holds no state and may serve many threads.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    exact: ClassVar[bool]
    n_tiers: ClassVar[int] = 1
    needs_calibration: ClassVar[bool] = False
    takes_steps: ClassVar[bool] = False  # whether `encode` takes `steps`, int8 [tokens]: the step class of each token
    takes_kept: ClassVar[bool] = False  # whether `encode` takes `kept`, bool [layers, heads, tokens]: what of the values is not a filler

    def __init__(self, params: Mapping[str, int | str], calibration: Calibration | None = None):
        if (calibration is not None) is not self.needs_calibration:
            wants = "needs a calibration" if self.needs_calibration else "takes no calibration"
            raise FormatError(f"codec {self.name} {wants}", remedy="upgrade kvstore")
        self.params: dict[str, int | str] = self.check_params(dict(params))

    @classmethod
    def default_params(cls, head_dim: int) -> dict[str, int | str]:
        """The parameters that a build uses when nobody says otherwise."""
        return {}

    @classmethod
    def check_params(cls, params: dict[str, int | str]) -> dict[str, int | str]:
        """`params` itself. Raises FormatError where one is missing, unknown or out of range."""
        if params:
            raise FormatError(f"codec {cls.name} takes no parameters, got {sorted(params)}", remedy="upgrade kvstore")
        return params

    @abstractmethod
    def encode(self, bits: Array, dtype: str, group: int = 0) -> list[bytes]:
        """One record per tier, base first, each a multiple of 4 bytes long.

        `bits` [layers, 2, tokens, channels] are the bit patterns of `dtype` (uint16, or uint32 for float32); `group` is the place of these
        layers among the groups of layers, for codecs that treat groups differently: their records say it. Raises InputError.
        """

    @abstractmethod
    def decode(self, records: Sequence[Record], out: Array) -> None:
        """Fill `out` [layers, 2, tokens, channels] from the `len(records)` lowest tiers.

        `out` is float32 for lossy codecs, bit patterns (uint16, uint32) for exact ones; its rows of channels are contiguous.
        Raises IntegrityError for damaged records, having written anything or nothing to `out`.
        """

    @classmethod
    def kind_nbytes(cls, record: Record, params: Mapping[str, int | str], dtype: str) -> tuple[int, int] | None:
        """Bytes of keys and of values in one tier's record of values that were `dtype`, or None where the codec codes them together.

        What both leave of the record is headers and padding. Nothing is decoded. Raises IntegrityError.
        """
        return None

    def peek_tokens(self, record: Record) -> int:
        """How many tokens a record holds."""
        return read_header(record).tokens


@dataclass(frozen=True)
class Header:
    """The first three words of a record: tokens; layers and level (16 bits, 8 bits); channels."""

    tokens: int
    layers: int
    level: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.layers, 2, self.tokens, self.channels)

    def bytes(self) -> bytes:
        return np.array([self.tokens, self.layers | self.level << 16, self.channels], "<u4").tobytes()


def words_of(record: Record) -> Words:
    """A record as native uint32, read-only and aligned (so that compiled code sees one array type)."""
    if len(record) % 4 or len(record) < 4 * HEADER_WORDS:
        raise damaged(f"a record of {len(record)} bytes")
    raw = np.frombuffer(record, "<u4")
    words: Words = np.require(raw, np.uint32, ["C", "A"])
    if words.flags.writeable:
        words = words.view()
        words.flags.writeable = False
    return words


def read_header(record: Record) -> Header:
    """The header of a record, bounds checked. Raises IntegrityError."""
    tokens, packed, channels = (int(word) for word in words_of(record[: 4 * HEADER_WORDS]))
    header = Header(tokens, packed & 0xFFFF, packed >> 16, channels)
    if not (1 <= tokens <= MAX_TOKENS and 1 <= header.layers and 1 <= channels <= MAX_CHANNELS and header.level < 16):
        raise damaged(f"impossible header {header}")
    return header


def expect(records: Sequence[Record], out: Array, tiers: int) -> Header:
    """The common header of `records`, which must be tiers 0, 1, ... of a unit shaped as `out`. Raises IntegrityError, InputError."""
    if not 1 <= len(records) <= tiers:
        raise InputError(f"{len(records)} records for a codec of {tiers} tiers", remedy="pass the tiers base first")
    headers = [read_header(record) for record in records]
    for level, header in enumerate(headers):
        if header.shape != out.shape or header.level != level:
            raise damaged(f"record says shape {header.shape}, level {header.level}; expected {out.shape}, level {level}")
    return headers[0]


def check_bits(bits: Array, dtype: str) -> Header:
    """The level-0 header for `bits`. Raises InputError where shape or dtype cannot be coded."""
    if dtype not in BITS:
        raise InputError(f"unknown value dtype {dtype!r}", remedy=f"use one of {', '.join(BITS)}")
    if bits.dtype != BITS[dtype] or bits.ndim != 4 or bits.shape[1] != 2:
        raise InputError(f"expected {BITS[dtype]} [layers, 2, tokens, channels] for {dtype}, got {bits.dtype} {bits.shape}")
    layers, _, tokens, channels = bits.shape
    if not (1 <= layers <= MAX_LAYERS and 1 <= tokens <= MAX_TOKENS and 1 <= channels <= MAX_CHANNELS):
        raise InputError(f"cannot code a unit of shape {bits.shape}", remedy=f"use blocks of 1 to {MAX_TOKENS} tokens")
    return Header(tokens, layers, 0, channels)


def damaged(what: str) -> IntegrityError:
    """The one way in which a codec reports a broken record."""
    return IntegrityError(f"damaged unit: {what}", remedy="restore the pack from a copy, or rebuild the artifact")


def to_record(*parts: bytes | Array) -> bytes:
    """The parts (arrays already little-endian or of single bytes) joined and padded with zeros to a multiple of 4 bytes."""
    joined = b"".join(part.tobytes() if isinstance(part, np.ndarray) else part for part in parts)
    return joined + bytes(-len(joined) % 4)


class Reader:
    """Takes a record apart from front to back; never past its end."""

    def __init__(self, words: Words, at: int = 0):
        self.words, self.at = words, at

    def take(self, count: int) -> Words:
        """The next `count` words. Raises IntegrityError where the record ends before."""
        if count < 0 or count > len(self.words) - self.at:
            raise damaged("it ends too early")
        self.at += count
        return self.words[self.at - count : self.at]

    def take_bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """The next `count` bytes, and the padding after them."""
        return self.take(-(-count // 4)).astype("<u4", copy=False).view(np.uint8)[:count]

    def finish(self) -> None:
        """Raises IntegrityError where words are left over."""
        if self.at != len(self.words):
            raise damaged(f"{len(self.words) - self.at} words too many")
