"""Is what is stored still what the model computes? A sample is prefilled again and compared, value by value and by what the model says next."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from kvstore.artifact import Stored
from kvstore.decode import KV, Decoder, Piece, allocate, stored_states
from kvstore.families.assemble import dynamic_cache
from kvstore.families.latent import cached
from kvstore.families.masking import masks
from kvstore.families.slots import kv_layers
from kvstore.families.states import take_states
from kvstore.manifest import Layout, Regime, Row, TemplateRecord, Tier
from kvstore.prefill import Prefiller
from kvstore.scoring import continued, logits_after

if TYPE_CHECKING:
    from transformers import Cache

    from kvstore.api import OpenStore

CONTINUATION = 32
# Beyond these (nats a token) stored values are not the model's. Rounding on another machine stays far below the first.
EXACT_KL, LOSSY_KL = 0.02, 1.0
NOT_FINITE = sys.float_info.max  # the KL of output that is not finite: no comparison with NaN would ever find it too large


@dataclass(frozen=True)
class TierCheck:
    """One stored segment at one tier. `equal`: its K and V at its place are the live ones bit for bit. `kl`: nats a token, live against
    stored, over tokens that the live model went on with; `agreement`: the share of these with the same likeliest token."""

    source: str
    passage: int
    regime: str
    tier: str
    exact: bool
    equal: bool
    kl: float
    agreement: float

    @property
    def problem(self) -> str | None:
        """What is wrong, if anything is. Exact tiers may differ in rounding where the machine is not the one that built them."""
        limit = EXACT_KL if self.exact else LOSSY_KL
        if self.kl <= limit:
            return None
        return f"{self.source}#{self.passage} ({self.regime}) at tier {self.tier}: KL {self.kl:.3g} nats a token, at most {limit} expected"


@dataclass
class LogitsReport:
    """What was compared: `segments` of `of` that the model has in the newest snapshot."""

    segments: int = 0
    of: int = 0
    checks: list[TierCheck] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return [c.problem for c in self.checks if c.problem]


@dataclass(frozen=True)
class _Place:
    """A stored segment and the regime that it is looked at in."""

    row: Row
    passage: int
    regime: Regime
    key: str


def relogits(store: OpenStore, segments: int = 4, progress: Callable[[str], None] | None = None) -> LogitsReport:
    """Prefill `segments` stored ones again, evenly spread over the newest snapshot, and compare every tier with the live values.

    Raises IncompatibleError where the model is not the one that built them, IntegrityError for damaged bytes.
    """
    model, key = store.model, store.source.identity.key
    places = [p for row in store.rows(model=key) for p in _places(row)]
    for place in {p.row.encoding: p for p in places}.values():
        stored = store.stored(place.key, place.row.encoding)
        if any(stored.drops(t.name) for t in stored.encoding.tiers):
            store.source.require_masking(place.row.source)
    report = LogitsReport(min(segments, len(places)), len(places))
    prefiller, decoder = Prefiller(model, store.model_record(key).layout), Decoder()
    for place in (places[i * len(places) // report.segments] for i in range(report.segments)):
        if progress is not None:
            progress(place.row.source)
        report.checks += _compare(store.stored(place.key, place.row.encoding), place, store.template(place.row.template), prefiller, decoder)
    return report


def _places(row: Row) -> list[_Place]:
    found = []
    for number, p in enumerate(row.passages):
        kinds: tuple[tuple[Regime, str | None], ...] = (("prefix", p.prefix), ("isolated", p.isolated))
        for regime, key in kinds[: 1 if p.prefix == p.isolated else 2]:
            found += [_Place(row, number, regime, key)] if key is not None else []
    return found


def _compare(stored: Stored, place: _Place, template: TemplateRecord, prefiller: Prefiller, decoder: Decoder) -> list[TierCheck]:
    """One check a tier."""
    before = tuple((template.head if place.regime == "prefix" else template.anchor).ids)
    context = prefiller.context((before,)) if before else None
    ids = [int(i) for i in stored.ids]
    ahead = cached(prefiller.layout, prefiller.run(before, ()), 0) if before else []
    live, following = _continued(prefiller.model, context, ids)
    wanted = _distributions(prefiller.model, live, following)
    return [_check(place, tier, stored, ahead, live, (following, wanted), prefiller, decoder) for tier in stored.encoding.tiers]


def _check(
    place: _Place,
    tier: Tier,
    stored: Stored,
    ahead: list[KV],
    live: Cache,
    said: tuple[list[int], torch.Tensor],
    prefiller: Prefiller,
    decoder: Decoder,
) -> TierCheck:
    layers = _replaced(ahead, stored, tier.name, prefiller.layout, decoder, masks(prefiller.model), live)
    states = stored_states(stored, prefiller.model.device)
    loaded = dynamic_cache(prefiller.model.config, layers, states)  # sliding layers keep their window alone, in both
    pairs = zip(kv_layers(loaded), kv_layers(live), strict=True)
    equal = all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in pairs)
    equal = equal and all(torch.equal(x.value, y.value) for x, y in zip(states, take_states(live), strict=True))
    following, wanted = said
    found = _distributions(prefiller.model, loaded, following)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    agreement = float((wanted.argmax(-1) == found.argmax(-1)).float().mean())
    kl = max(0.0, kl) if math.isfinite(kl) else NOT_FINITE
    return TierCheck(place.row.source, place.passage, place.regime, tier.name, tier.exact, equal, kl, agreement)


def _replaced(ahead: list[KV], stored: Stored, tier: str, layout: Layout, decoder: Decoder, masked: bool, live: Cache) -> list[KV]:
    """The tokens `ahead` as they were computed, and after them the segment's as the store has them, [1, kv_heads, tokens, channels] each."""
    tokens, start = stored.segment.tokens, ahead[0][0].shape[-2] if ahead else 0
    layers = allocate(layout, start + tokens, kv_layers(live)[0].keys.device)
    for pair, slots in zip(ahead, layers, strict=False):  # none where nothing stands ahead
        for computed, into in zip(pair, slots, strict=True):
            into[..., :start, :] = computed
    decoder.decode(Piece(stored, tier, tokens, start, start), layers, masked=masked)
    return layers


def _continued(model: Any, context: Cache | None, ids: Sequence[int]) -> tuple[Cache, list[int]]:
    """The live cache of context and `ids`, and the tokens that the model goes on with, sampled with a fixed seed."""
    chance = torch.Generator().manual_seed(0)
    live, logits = _step(model, context, ids)
    cache, following = live, [_drawn(logits, chance)]
    while len(following) < CONTINUATION:
        cache, logits = _step(model, cache, following[-1:])
        following.append(_drawn(logits, chance))
    return live, following


def _step(model: Any, cache: Cache | None, ids: Sequence[int]) -> tuple[Cache, torch.Tensor]:
    """A cache that went on with `ids` (the given one stays as it was), and the last logits [vocabulary]."""
    out = continued(model, cache, ids, logits_to_keep=1)
    return out.past_key_values, out.logits[0, -1]


def _drawn(logits: torch.Tensor, chance: torch.Generator) -> int:
    return int(torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=chance))


def _distributions(model: Any, cache: Cache, following: Sequence[int]) -> torch.Tensor:
    """float32 [tokens, vocabulary]: log-probabilities after each of `following`, in one pass."""
    found: torch.Tensor = logits_after(model, cache, following).float().log_softmax(-1)
    return found
