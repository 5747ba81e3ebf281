"""What the vLLM connector is set to, and which stored tokens a prompt can take. Needs no vLLM; torch-free."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvstore.artifact import Stored, tier_chain
from kvstore.codecs.masked import drops
from kvstore.errors import IncompatibleError, InputError, KvstoreError
from kvstore.identity import Context
from kvstore.manifest import Encoding
from kvstore.quality import Quality
from kvstore.store import Store

SALT = "kvstore-approx:"  # vLLM keeps blocks under another salt apart, so that approximate KV never answers a request that did not ask for it
Run = list[tuple[Stored, int]]
log = logging.getLogger("kvstore")


class Prefixes(Protocol):
    """What is asked of `kvstore.prefixes.PrefixIndex`."""

    def longest(self, ids: Sequence[int]) -> Run: ...

    def nearest(self, context: Context, ids: Sequence[int]) -> tuple[Stored, int] | None: ...


@dataclass(frozen=True)
class Settings:
    """`kv_connector_extra_config`: the store, at most one wish for its quality, the encoding (the beginning of its id) where it has several, and
    how many threads decode (as many as there are cores)."""

    store: str
    quality: Quality
    encoding: str = ""
    workers: int | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """Raises InputError for a missing store, and for names that are not known."""
        wishes = ("tier", "max_kl", "max_bytes", "deadline")
        if unknown := sorted(set(given) - {"store", "encoding", "workers", *wishes}):
            raise InputError(f"kv_connector_extra_config has {', '.join(unknown)}", remedy=f"known are store, encoding, workers, {', '.join(wishes)}")
        if not given.get("store"):
            raise InputError("kv_connector_extra_config names no store", remedy='add {"store": "/path/to/kv.zarr"}')
        if (workers := given.get("workers")) is not None and (type(workers) is not int or workers < 1):
            raise InputError(f"workers={workers!r} is no number of threads", remedy="leave it out, or give a whole number from 1 on")
        return cls(str(given["store"]), Quality(**{w: given.get(w) for w in wishes}), str(given.get("encoding") or ""), workers)


def choose_encoding(store: Store, model: str, wanted: str = "") -> str:
    """The encoding that is served. Raises InputError where none, or more than one, fits."""
    found = sorted({r.encoding for r in store.rows(model=model)})
    fitting = [e for e in found if e.startswith(wanted)]
    if len(fitting) != 1:
        there = "; ".join(f"{e[:12]} ({', '.join(t.name for t in store.encodings()[e].tiers)})" for e in found) or "nothing"
        raise InputError(
            f"{store.path} holds {there} of this model, {len(fitting)} of which fit {wanted!r}",
            remedy='say which in kv_connector_extra_config: {"encoding": the beginning of its id}' if found else "build a corpus with it",
            code="ambiguous",
        )
    return fitting[0]


def require_tier(encoding: Encoding, quality: Quality) -> None:
    """Refuse at the start a tier that is not there, or that lacks tokens. Raises NotFoundError, IncompatibleError."""
    tier = tier_chain(encoding, quality.tier or encoding.tiers[-1].name)[-1]
    if drops(encoding.codec(tier.codec).params):
        raise _dropping(tier.name)


@dataclass(frozen=True)
class Part:
    """Tokens `first : first + count` of an artifact for the prompt's positions from `at`. Plain values: it travels between processes."""

    key: str
    encoding: str
    tier: str
    first: int
    count: int
    at: int


@dataclass(frozen=True)
class Offer:
    """The first `tokens` tokens of a prompt, a whole number of blocks, from the store. `exact`: all were prefilled after these very tokens."""

    tokens: int
    parts: tuple[Part, ...] = ()
    exact: bool = True


class Matcher:
    """Offers for prompts, from one encoding of one store. `block_size` is vLLM's; `anchors` are what isolated segments were compiled after."""

    def __init__(self, store: Store, prefixes: Prefixes, anchors: Iterable[tuple[int, ...]], quality: Quality, block_size: int):
        self.store, self.prefixes, self.quality, self.block_size = store, prefixes, quality, block_size
        self.anchors = [Context.anchor(ids) for ids in anchors]

    def offer(self, ids: Sequence[int], limit: int, approximate: bool = False) -> Offer:
        """The longest run for `ids`, no longer than `limit`. What cannot be served (or not as finely as wished) is offered no tokens, and logged."""
        try:
            run = self.prefixes.longest(ids)
            exact = len(run)
            if approximate:
                run, exact = self._beside(run, ids)
            tokens = max(0, min(sum(count for _, count in run), limit)) // self.block_size * self.block_size
            run = _cut(run, tokens)
            return Offer(tokens, tuple(self._parts(run)), len(run) <= exact)
        except KvstoreError as error:
            log.warning("vLLM computes a prompt that may be stored: %s", error)
            return Offer(0)

    def _beside(self, run: Run, ids: Sequence[int]) -> tuple[Run, int]:
        """The run and, after its last whole segment, isolated ones side by side as long as they fit; how many of them all are exact.

        A last segment that fits in part only gives way to an isolated one that fits whole: documents begin with the same wrapper.
        """
        whole = [(s, n) for s, n in run if n == s.segment.tokens]
        at, found = sum(n for _, n in whole), list(whole)
        while (stored := self._alone(ids[at:])) is not None:
            found.append((stored, stored.segment.tokens))
            at += stored.segment.tokens
        return (found, len(whole)) if len(found) > len(whole) else (run, len(run))

    def _alone(self, ids: Sequence[int]) -> Stored | None:
        """The isolated segment that shares most tokens with `ids`, if that is all of it."""
        near = [found for anchor in self.anchors if (found := self.prefixes.nearest(anchor, ids)) is not None]
        return max((s for s, count in near if count == s.segment.tokens), key=lambda s: s.segment.tokens, default=None)

    def _parts(self, run: Run) -> list[Part]:
        if not run:
            return []
        stored = [s for s, _ in run]
        tiers = self.quality.choose(stored, self.store.quality, stored[1:])
        parts, at = [], 0
        for s, count in run:
            encoding = s.pack.manifest.encoding_id
            require_whole(s, tiers[encoding])
            parts.append(Part(s.segment.key, encoding, tiers[encoding], 0, count, at))
            at += count
        return parts


def require_whole(stored: Stored, tier: str) -> None:
    """Raises IncompatibleError where tokens may be missing at `tier`: vLLM's attention reads every token."""
    if stored.drops(tier):
        raise _dropping(tier)


def _dropping(tier: str) -> IncompatibleError:
    return IncompatibleError(f"tier {tier!r} lacks dropped tokens, which vLLM cannot mask", remedy="choose a tier without dropped tokens")


def _cut(run: Run, tokens: int) -> Run:
    """The first `tokens` tokens of a run."""
    found, left = [], tokens
    for stored, count in run:
        if left > 0:
            found.append((stored, min(count, left)))
        left -= count
    return found


def clip(parts: Sequence[Part], start: int, end: int) -> tuple[Part, ...]:
    """What lies in positions `start : end`."""
    found = []
    for p in parts:
        first, last = max(p.at, start), min(p.at + p.count, end)
        if first < last:
            found.append(replace(p, first=p.first + first - p.at, count=last - first, at=first))
    return tuple(found)
