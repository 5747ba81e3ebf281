"""One stored artifact, and a document's artifacts together. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvstore.certificates import Known, worst
from kvstore.codecs.masked import drops
from kvstore.errors import NotFoundError
from kvstore.identity import artifact_id
from kvstore.manifest import Encoding, Layout, Model, Passage, Row, Tier
from kvstore.pack import Pack, Segment
from kvstore.pack_files import STATE

if TYPE_CHECKING:
    from kvstore.store import Store


@dataclass(frozen=True)
class Stored:
    """One stored artifact: a segment in one encoding, ready to be planned."""

    pack: Pack
    segment: Segment

    @property
    def encoding(self) -> Encoding:
        return self.pack.encoding

    @property
    def id(self) -> str:
        return artifact_id(self.segment.key, self.pack.manifest.encoding_id)

    @property
    def ids(self) -> npt.NDArray[np.uint32]:
        """uint32 [tokens]."""
        return self.pack.ids(self.segment)

    def drops(self, tier: str) -> bool:
        """Whether tokens may be missing at `tier`. Raises NotFoundError, FormatError for a policy that this version does not know."""
        return drops(self.encoding.codec(tier_chain(self.encoding, tier)[-1].codec).params)

    def nbytes(self, tier: str | None = None) -> int:
        """Stored bytes that a load at `tier` reads; of all tiers together by default. A recurrent state is read at each."""
        tiers = self.encoding.tiers if tier is None else tier_chain(self.encoding, tier)
        return self.segment.nbytes([t.array for t in tiers]) + self.state_nbytes

    @property
    def state_nbytes(self) -> int:
        """Stored bytes of the recurrent state at the segment's end; a chain of segments reads that of the last one alone."""
        return self.segment.nbytes([STATE]) if self.pack.layout.state else 0


def policy_of(encoding: Encoding, tier: str) -> str:
    """The token policy that a tier was encoded under."""
    return str(encoding.codec(tier_chain(encoding, tier)[-1].codec).params.get("policy", "uniform"))


def tier_chain(encoding: Encoding, name: str) -> tuple[Tier, ...]:
    """The tiers that a load at `name` reads, base first. Raises NotFoundError listing what there is."""
    tier = encoding.tier(name)
    if tier is None:
        there = ", ".join(t.name for t in encoding.tiers)
        raise NotFoundError(f"no tier {name!r}; stored are {there}", remedy="choose one of them, or build another encoding")
    wanted = {*tier.requires, tier.name}
    return tuple(t for t in encoding.tiers if t.name in wanted)


class Artifact:
    """A stored document, or some passages of it, in one model, template and encoding."""

    def __init__(self, store: Store, row: Row, passages: Sequence[Passage]):
        self.store, self.row, self.passages = store, row, tuple(passages)

    @property
    def source(self) -> str:
        return self.row.source

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.passages)

    @cached_property
    def stored(self) -> list[Stored]:
        """One a passage, in the regime that is exact in its place where there is one."""
        return [self.store.stored(p.prefix or p.isolated or "", self.row.encoding) for p in self.passages]

    @property
    def encoding(self) -> Encoding:
        return self.stored[0].encoding

    @property
    def layout(self) -> Layout:
        return self.stored[0].pack.layout

    @property
    def model(self) -> Model:
        return self.store.model_record(self.row.model).model

    @property
    def tiers(self) -> list[str]:
        return [t.name for t in self.encoding.tiers]

    @property
    def quality(self) -> dict[str, float | None]:
        """KL divergence per tier, nats a token: 0 where the tier restores every bit, None where it was not measured.

        Measured on the artifact itself where it was sampled, else the upper 95 % bound of the reports; of several passages the worst.
        """
        return {name: known.kl for name, known in self.known.items()}

    @property
    def known(self) -> dict[str, Known]:
        """The same with where each figure is from: `exact`, the `artifact` itself, the `report`, or nowhere."""
        return {t.name: worst([self.store.known(s, t) for s in self.stored]) for t in self.encoding.tiers}

    def nbytes(self, tier: str | None = None) -> int:
        return sum(s.nbytes(tier) for s in self.stored)

    @property
    def token_ids(self) -> list[int]:
        return [int(i) for s in self.stored for i in s.ids]
