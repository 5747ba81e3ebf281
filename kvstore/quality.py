"""Which tier to load: by name, by quality, by size, or by time; the finest stored where nothing is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.arrays import stored_type
from kvstore.artifact import Stored, tier_chain
from kvstore.certificates import Certified, worst
from kvstore.codecs import codec_of
from kvstore.errors import IncompatibleError, InputError, ResourceError
from kvstore.manifest import Encoding, Tier


@dataclass(frozen=True)
class Quality:
    """At most one wish: a tier's name, KL in nats a token, bytes read in all, or seconds until the cache is ready."""

    tier: str | None = None
    max_kl: float | None = None
    max_bytes: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("tier", "max_kl", "max_bytes", "deadline") if getattr(self, n) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other", remedy="give one of them")
        for name in ("max_kl", "max_bytes", "deadline"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value >= 0):
                raise InputError(f"{name}={value!r} is not a number from 0 up")

    def choose(self, stored: Sequence[Stored], certified: Callable[[str, str], Certified], judged: Sequence[Stored] | None = None) -> dict[str, str]:
        """Encoding id -> tier for all artifacts of one load.

        Where a KL is to be kept, `certified` (of an encoding id and a model key) is asked what is known of those `judged`: all by default,
        without the head where documents follow, which were measured after it.

        Raises NotFoundError, IncompatibleError, ResourceError; IntegrityError where a quality report that is needed is damaged.
        """
        found: dict[str, str] = {}
        for id in dict.fromkeys(s.pack.manifest.encoding_id for s in stored):
            mine = [s for s in stored if s.pack.manifest.encoding_id == id]
            if self.max_kl is None:
                found[id] = self._in(mine[0].encoding, mine)
            else:
                counts = [s for s in judged or () if s.pack.manifest.encoding_id == id] or mine
                found[id] = self._by_kl(mine, {t.name: _worst(counts, t, certified) for t in mine[0].encoding.tiers})
        return found

    def _in(self, encoding: Encoding, stored: Sequence[Stored]) -> str:
        if self.tier is not None:
            return tier_chain(encoding, self.tier)[-1].name
        if self.max_bytes is not None:
            limit = self.max_bytes
            inner = sum(s.state_nbytes for s in stored[:-1])  # of a chain, the last state alone is read
            return self._finest(encoding, lambda t: sum(s.nbytes(t.name) for s in stored) - inner <= limit, f"{limit:,} bytes")
        if self.deadline is not None:
            seconds = self.deadline
            return self._finest(encoding, lambda t: estimate(stored, t) <= seconds, f"{seconds:g} s")
        return encoding.tiers[-1].name

    def _by_kl(self, stored: Sequence[Stored], known: Mapping[str, float | None]) -> str:
        """The tier that reads least of those that are `known` to be good enough."""
        limit, measured = self.max_kl or 0.0, {name: kl for name, kl in known.items() if kl is not None}
        good = [name for name, kl in measured.items() if kl <= limit]
        if good:
            return min(good, key=lambda name: sum(s.nbytes(name) for s in stored))
        if not measured:
            raise IncompatibleError(
                f"no tier of this artifact has a measured KL, so max_kl={limit:g} cannot be promised",
                remedy="choose a tier by name, or build with --lossless",
                code="unmeasured",
            )
        raise IncompatibleError(
            f"no stored tier has a KL of at most {limit:g}: {', '.join(f'{name} {kl:.2g}' for name, kl in measured.items())}",
            remedy="allow more, or build with --lossless",
            code="too-coarse",
        )

    def _finest(self, encoding: Encoding, fits: Callable[[Tier], bool], limit: str) -> str:
        for tier in reversed(encoding.tiers):
            if fits(tier):
                return tier.name
        raise ResourceError(f"no stored tier fits {limit}", remedy=f"the smallest is {encoding.tiers[0].name!r}: ask for it by name")


def _worst(stored: Sequence[Stored], tier: Tier, certified: Callable[[str, str], Certified]) -> float | None:
    """The KL that holds for all of them, None where one has none."""
    return worst([certified(s.pack.manifest.encoding_id, s.pack.manifest.model).known(s.id, tier) for s in stored]).kl


def estimate(stored: Sequence[Stored], tier: Tier) -> float:
    """Seconds that one core needs to decode `stored` at `tier`, from the time that one of its units takes now."""
    sample = max(stored, key=lambda s: s.segment.tokens)
    pack, tiers = sample.pack, tier_chain(sample.encoding, tier.name)
    spec = sample.encoding.codec(tier.codec)
    codec = codec_of(spec, sample.encoding, pack.layout)
    records = [pack.units(sample.segment, t.array)[0][0] for t in tiers]
    tokens = codec.peek_tokens(records[0])
    dtype = np.dtype(stored_type(tier, pack.layout.dtype)[0])
    out = np.empty((len(pack.group_layers(0)), 2, tokens, pack.layout.channels), dtype)
    codec.decode(records, out)  # the first call may compile
    started = time.perf_counter()
    codec.decode(records, out)
    per_token = (time.perf_counter() - started) / tokens
    return per_token * pack.groups * sum(s.segment.tokens for s in stored)
