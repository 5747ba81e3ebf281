"""What one load wants of a pack's units: which of them, where their bytes lie, and to which rows of the cache their tokens go. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvstore.artifact import tier_chain
from kvstore.codecs.base import damaged
from kvstore.pack import Pack

if TYPE_CHECKING:
    from kvstore.decode import Piece

I64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """A byte range of units in one tier: `entries` int64 [groups, units, 2] (offset and length, crc32c included) in the shard's `data`."""

    data: Bytes
    entries: I64

    def copy(self, group: int, out: Bytes) -> I64:
        """One group's units side by side to the front of `out`; where each begins there."""
        offsets, sizes = self.entries[group].T
        ends = np.cumsum(sizes)
        if (offsets[1:] == offsets[:-1] + sizes[:-1]).all():  # as every writer lays them
            out[: ends[-1]] = self.data[offsets[0] : offsets[0] + ends[-1]]
        else:
            for offset, size, end in zip(offsets.tolist(), sizes.tolist(), ends.tolist(), strict=True):
                out[end - size : end] = self.data[offset : offset + size]
        return ends - sizes


class Wanted:
    """Pieces of segments in one encoding, at one tier. Units stand piece by piece, then block by block.

    `tokens`, `row`, `position`, `first`, `end` int64 [units]: the tokens of a unit; token t of `first <= t < end` belongs in cache row `row + t`,
    turned to position `position + t`. `names`: what to call the units in errors. Raises IntegrityError where units lie outside their segment.
    """

    def __init__(self, pieces: Sequence[Piece]):
        some = pieces[0].stored
        self.encoding, self.layout = some.encoding, some.pack.layout
        self.tiers = tier_chain(self.encoding, pieces[0].tier)
        self.pack: Pack = some.pack
        columns: list[list[I64]] = [[] for _ in range(5)]
        self.names: list[str] = []
        self.sources: list[list[Source]] = [[] for _ in self.tiers]
        for piece in pieces:
            self._add(piece, columns)
        self.tokens, self.row, self.position, self.first, self.end = (np.concatenate(parts) for parts in columns)

    def _add(self, piece: Piece, columns: list[list[I64]]) -> None:
        size, segment, pack = self.encoding.block_tokens, piece.stored.segment, piece.stored.pack
        blocks = np.arange(piece.first // size, -(-(piece.first + piece.count) // size))
        starts = blocks * size
        tokens = np.minimum(size, segment.tokens - starts)
        moved = starts - piece.first
        first, end = np.maximum(-moved, 0), np.minimum(tokens, piece.count - moved)
        for column, part in zip(columns, (tokens, piece.at + moved, piece.position + moved, first, end), strict=True):
            column.append(part)
        self.names += [f"{pack.folder}: segment {segment.key[:12]}, block {block}" for block in blocks.tolist()]
        for sources, tier in zip(self.sources, self.tiers, strict=True):
            entries = pack.entries(segment, tier.array)[:, blocks[0] : blocks[-1] + 1].astype(np.int64)
            if (entries[..., 1] % 4).any():
                raise damaged(f"a record of no whole words in {pack.folder}/{tier.array}")
            sources.append(Source(np.frombuffer(pack.shard(tier.array), np.uint8), entries))

    def count(self, group: int) -> int:
        """Words that one group's records take."""
        return sum(int(source.entries[group, :, 1].sum()) for sources in self.sources for source in sources) // 4

    def stage(self, group: int, out: npt.NDArray[np.uint32]) -> I64:
        """Copy one group's records to `out`; int64 [units, tiers, 2], the first word of each and its number of words (without crc32c)."""
        spans, room, at = np.empty((len(self.tokens), len(self.tiers), 2), np.int64), out.view(np.uint8), 0
        for tier, sources in enumerate(self.sources):
            unit = 0
            for source in sources:
                sizes = source.entries[group, :, 1]
                mine = spans[unit : unit + len(sizes), tier]
                mine[:, 0] = (at + source.copy(group, room[at:])) // 4
                mine[:, 1] = (sizes - 4) // 4
                at, unit = at + int(sizes.sum()), unit + len(sizes)
        return spans
