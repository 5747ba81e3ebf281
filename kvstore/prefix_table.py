"""The table behind `kvstore.prefixes`: all segments of one model and encoding, by what stood before them and by their token ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.identity import Context
from kvstore.pack import CONTEXT_KINDS, Pack

Ids = npt.NDArray[np.uint32]
WIDTH = 32  # first tokens of each segment that the table holds; longer common beginnings are compared in the packs
_CONTEXT = 9  # bytes that say what stood before: the kind, and the position or the first 8 bytes of the parent's key
_STEP = np.uint64(0x9E3779B97F4A7C15)


def context_bytes(context: Context) -> bytes:
    """_CONTEXT bytes; of an anchor only its length."""
    value = bytes.fromhex(context.value)[:8] if isinstance(context.value, str) else context.tokens.to_bytes(8, "big")
    return bytes([CONTEXT_KINDS.index(context.kind)]) + value


def first_bytes(ids: Ids) -> bytes:
    """The first WIDTH ids, in bytes that sort as they do; 0 is the end, 0xFFFFFFFF is no id."""
    return (ids[:WIDTH] + np.uint32(1)).astype(">u4").tobytes().ljust(4 * WIDTH, b"\0")


@dataclass(frozen=True)
class Part:
    """One pack's segments by row: what the table needs of them."""

    heads: npt.NDArray[np.bytes_]
    hashes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int64]


def part_of(pack: Pack) -> Part:
    rows, ids = pack.rows, pack.token_ids
    starts, tokens = rows["start"].astype(np.int64), rows["tokens"].astype(np.int64)
    at = np.arange(WIDTH)
    inside = at < tokens[:, None]
    first = np.where(inside, ids[np.where(inside, starts[:, None] + at, 0)] + np.uint32(1), np.uint32(0)).astype(">u4")
    value = np.where((rows["context"] == CONTEXT_KINDS.index("parent"))[:, None], rows["parent"][:, :8], _big(rows["position"]))
    heads = np.concatenate([rows["context"].astype(np.uint8)[:, None], value, first.view(np.uint8)], axis=1)
    return Part(np.ascontiguousarray(heads).view(f"S{_CONTEXT + 4 * WIDTH}").ravel(), _mixed(_contents(ids, starts), tokens, value), tokens)


def _big(positions: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 [n, 8], big-endian."""
    return positions.astype(">u8").view(np.uint8).reshape(-1, 8)


def _powers(count: int) -> npt.NDArray[np.uint64]:
    powers = np.full(count, _STEP, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _contents(ids: Ids, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """uint64 [segments]: the sum of (id + 1) * _STEP ** place over each segment; padding counts nothing, since it is 2**32 - 1."""
    order = np.argsort(starts)
    slots = np.arange(len(ids))
    owner = np.maximum(np.searchsorted(starts[order], slots, "right") - 1, 0)
    place = np.maximum(slots - starts[order][owner], 0)
    terms = (ids + np.uint32(1)).astype(np.uint64) * _powers(int(place.max(initial=0)) + 1)[place]
    found = np.empty(len(starts), np.uint64)
    found[order] = np.add.reduceat(terms, starts[order])
    return found


def _mixed(contents: npt.NDArray[np.uint64], tokens: npt.NDArray[np.int64], context: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The content's hash with its length and what stood before it."""
    before = np.ascontiguousarray(context).view(">u8").ravel().astype(np.uint64)
    return contents ^ (tokens.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)) ^ (before * np.uint64(0xA0761D6478BD642F))


class Table:
    """The segments of all packs, in the order of their heads."""

    def __init__(self, parts: dict[str, Part]):
        self.parts, self.names = parts, list(parts)
        every = list(parts.values())
        heads = np.concatenate([p.heads for p in every]) if every else np.empty(0, f"S{_CONTEXT + 4 * WIDTH}")
        order = np.argsort(heads, kind="stable")
        self.heads = heads[order]
        counts = [len(p.heads) for p in every]
        self.pack = np.repeat(np.arange(len(every)), counts)[order]
        self.row = np.concatenate([np.arange(n) for n in counts] or [np.empty(0, np.int64)])[order]
        tokens = np.concatenate([p.tokens for p in every]) if every else np.empty(0, np.int64)
        self.lengths = np.unique(tokens)
        hashes = (np.concatenate([p.hashes for p in every]) if every else np.empty(0, np.uint64))[order]
        self.by_hash = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.by_hash]

    def equal(self, head: bytes) -> tuple[int, int]:
        """The range of places with this very head."""
        key = np.bytes_(head)
        return int(np.searchsorted(self.heads, key)), int(np.searchsorted(self.heads, key, "right"))

    def whole(self, context: bytes, rest: Ids) -> list[int]:
        """Places of segments that `rest` most likely begins with."""
        lengths = self.lengths[: np.searchsorted(self.lengths, len(rest), "right")]
        if not len(lengths):
            return []
        longest = int(lengths[-1])
        sums = np.cumsum((rest[:longest] + np.uint32(1)).astype(np.uint64) * _powers(longest), dtype=np.uint64)
        before = np.broadcast_to(np.frombuffer(context[1:], np.uint8), (len(lengths), 8))
        wanted = _mixed(sums[lengths - 1], lengths, before)
        lows, highs = (np.searchsorted(self.hashes, wanted, side) for side in ("left", "right"))
        return [int(i) for low, high in zip(lows, highs, strict=True) for i in self.by_hash[low:high]]

    def around(self, head: bytes, low: int, high: int, most: int) -> Iterator[tuple[int, int]]:
        """(place, common tokens) of the other segments in this context, going away from `head`, the longest first, none without a token."""
        below, above = low - 1, high
        while True:
            left, right = self._common(below, head), self._common(above, head)
            if max(left, right) <= 0:
                return
            yield (below, min(left, most)) if left >= right else (above, min(right, most))
            below, above = (below - 1, above) if left >= right else (below, above + 1)

    def _common(self, place: int, head: bytes) -> int:
        """Tokens in common; -1 in another context, or beyond the ends."""
        if not 0 <= place < len(self.heads):
            return -1
        ours, theirs = (np.frombuffer(h, np.uint8) for h in (head, self._bytes(place)))
        same = ours == theirs
        bytes_ = len(same) if same.all() else int(same.argmin())
        return -1 if bytes_ < _CONTEXT else (bytes_ - _CONTEXT) // 4

    def _bytes(self, place: int) -> bytes:
        """numpy leaves out zeros at the end."""
        return bytes(self.heads[place]).ljust(_CONTEXT + 4 * WIDTH, b"\0")
