"""Token sets of a unit of `transform`: tokens that share a step class, and those kept as raw bits. How a record lists them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import Reader, damaged, to_record

STEP_CLASSES = (0, -1, -2, -3, 1, 2, 3)  # bit i of a record's mask of sets; ordinary tokens first
RAW, RAW_BIT = 127, len(STEP_CLASSES)
I8 = npt.NDArray[np.int8]
I64 = npt.NDArray[np.int64]


def mask_of(codes: I8) -> int:
    """The bits of the sets that occur in `codes` [tokens]: step classes, or RAW."""
    return sum(1 << bit for bit, code in enumerate((*STEP_CLASSES, RAW)) if (codes == code).any())


def sets_of(mask: int) -> list[int]:
    """Step classes, RAW last, of the set bits."""
    return [code for bit, code in enumerate((*STEP_CLASSES, RAW)) if mask >> bit & 1]


def pack(codes: I8) -> tuple[bool, bytes]:
    """Which set each token is in, as runs or (True) as numbers of 1, 2 or 4 bits: the shorter. Nothing where there is one set."""
    sets = sets_of(mask_of(codes))
    if len(sets) == 1:
        return False, b""
    numbers = np.zeros(len(codes), np.int64)
    for number, code in enumerate(sets):
        numbers[codes == code] = number
    runs, packed = _pack_runs(numbers), _pack_numbers(numbers, _width(len(sets)))
    return len(packed) < len(runs), min(runs, packed, key=len)  # of equals the runs, as the flag says


def _pack_runs(numbers: I64) -> bytes:
    """u32: how many runs; u16 each: set << 12 | tokens - 1."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    lengths = np.diff(starts, append=len(numbers))
    return to_record(np.array([len(starts)], "<u4"), (numbers[starts] << 12 | (lengths - 1)).astype("<u2"))


def _pack_numbers(numbers: I64, width: int) -> bytes:
    bits = numbers[:, None] >> np.arange(width) & 1
    return to_record(np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little"))


def _width(sets: int) -> int:
    """Bits of a set's number."""
    return 1 if sets <= 2 else 2 if sets <= 4 else 4


def unpack(reader: Reader, mask: int, packed: bool, tokens: int) -> list[tuple[int, I64]]:
    """Step class (or RAW) and tokens, ascending, of each set. Raises IntegrityError where a set is missing or unknown."""
    sets = sets_of(mask)
    if not sets:
        raise damaged("a unit without token sets")
    if len(sets) == 1:
        return [(sets[0], np.arange(tokens))]
    numbers = _read_numbers(reader, _width(len(sets)), tokens) if packed else _read_runs(reader, tokens)
    found = [(code, np.flatnonzero(numbers == number)) for number, code in enumerate(sets)]
    if sum(len(which) for _, which in found) != tokens or not all(len(which) for _, which in found):
        raise damaged("token sets that do not fit the tokens")
    return found


def _read_runs(reader: Reader, tokens: int) -> I64:
    count = int(reader.take(1)[0])
    if count > tokens:
        raise damaged(f"{count} runs of {tokens} tokens")
    runs = reader.take_bytes(2 * count).view("<u2").astype(np.int64)
    if int((runs & 0xFFF).sum()) + count != tokens:
        raise damaged("runs of tokens that do not fit the unit")
    return np.repeat(runs >> 12, (runs & 0xFFF) + 1)


def _read_numbers(reader: Reader, width: int, tokens: int) -> I64:
    bits = np.unpackbits(reader.take_bytes(-(-tokens * width // 8)), count=tokens * width, bitorder="little")
    numbers: I64 = (bits.reshape(tokens, width).astype(np.int64) << np.arange(width)).sum(axis=1)
    return numbers
