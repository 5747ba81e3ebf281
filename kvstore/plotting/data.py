"""What the pictures of a store show: bytes of a load at each tier against its measured KL; bytes by layers, kind and tier; the largest documents.

Sums are those of `inventory`. A KL comes from the store's quality reports or is None: nothing is estimated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvstore.certificates import Certified, merge, read_reports
from kvstore.codecs import REGISTRY, kind_nbytes
from kvstore.errors import NotFoundError
from kvstore.inventory import EncodingTotal, Listed, Stats, TierTotal, documents, packs_of, stats
from kvstore.manifest import Tier
from kvstore.pack import Pack
from kvstore.store import Store

LARGEST = 10
UNITS = 4096  # units of one encoding that are opened to tell keys from values, at most


@dataclass(frozen=True)
class Measured:
    """KL(live || stored) in nats a token, as the store's quality reports have it: mean, 99th percentile, upper end of the 95 % interval of the mean.

    `agreement`: share of tokens after which both hold the same token for the likeliest. `noise`: KL between two live runs.
    """

    kl: float
    p99: float
    upper: float | None
    agreement: float
    noise: float
    documents: int
    tokens: int


@dataclass(frozen=True)
class TierPoint:
    """One tier. `nbytes` is its own; `load_nbytes`, `bytes_per_token`, `bits` (a value) and `raw_ratio` are of a load at it, lower tiers included.

    `kl` is 0 for exact tiers, and None where nothing was measured.
    """

    name: str
    codec: str
    exact: bool
    nbytes: int
    load_nbytes: int
    bytes_per_token: float
    bits: float
    raw_ratio: float
    kl: float | None
    measured: Measured | None


@dataclass(frozen=True)
class KindBytes:
    """Keys, values, and headers with padding, in bytes of `units` units out of `of`."""

    keys: int
    values: int
    shared: int
    units: int
    of: int


@dataclass
class GroupBytes:
    """A transform group: layers `first` to `last`; bytes and bits a value of each tier's own units. `kinds`: None if K and V are coded together."""

    first: int
    last: int
    nbytes: dict[str, int]
    bits: dict[str, float]
    kinds: dict[str, KindBytes | None]


@dataclass(frozen=True)
class EncodingPlot:
    """All artifacts of one encoding and model, and their largest documents in the newest snapshot. `raw_bits`: a value in the model's dtype."""

    id: str
    model: str
    model_name: str
    codecs: list[str]
    artifacts: int
    tokens: int
    raw_nbytes: int
    raw_bits: int
    tiers: list[TierPoint]
    layers: list[GroupBytes]
    documents: int
    largest: list[Listed] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tiers)


@dataclass(frozen=True)
class PlotData:
    """A store as it is now, with the encodings that were asked for."""

    stats: Stats
    encodings: list[EncodingPlot]


def collect(store: Store, *, model: str | None = None, encoding: str | None = None) -> PlotData:
    """Everything to draw; `model` and `encoding` are keys or their beginnings. Raises NotFoundError where they leave nothing, IntegrityError."""
    found, packs = stats(store), packs_of(store)
    wanted = [e for e in found.encodings if e.model.startswith(model or "") and e.id.startswith(encoding or "")]
    if not wanted:
        about = ", ".join(f"encoding {e.id[:12]} of model {e.model[:12]}" for e in found.encodings)
        remedy = f"there is {about}" if about else "`kvstore build PATH` stores documents"
        raise NotFoundError(f"nothing to plot in {store.path}", remedy=remedy)
    names, listed = dict(found.models), documents(store, model=model, encoding=encoding)
    plots = []
    for total in wanted:
        mine = [p for p in packs if (p.manifest.encoding_id, p.manifest.model) == (total.id, total.model)]
        held = [d for d in listed if (d.encoding, d.model) == (total.id, total.model)]
        plots.append(_encoding(store, total, names.get(total.model, total.model[:12]), mine, held))
    return PlotData(found, plots)


def _encoding(store: Store, total: EncodingTotal, name: str, packs: list[Pack], held: list[Listed]) -> EncodingPlot:
    raw_bits = 32 if packs[0].layout.dtype == "float32" else 16
    certified = merge([r for r in read_reports(store.storage, total.id) if r.model == total.model])
    specs = {t.name: t for t in packs[0].encoding.tiers}
    tiers = [_tier(t, specs[t.name], total, raw_bits, certified) for t in total.tiers]
    largest = sorted(held, key=lambda d: (-d.nbytes, d.source))[:LARGEST]
    return EncodingPlot(
        total.id,
        total.model,
        name,
        total.codecs,
        total.artifacts,
        total.tokens,
        total.raw_nbytes,
        raw_bits,
        tiers,
        _groups(packs),
        len(held),
        largest,
    )


def _tier(tier: TierTotal, spec: Tier, total: EncodingTotal, raw_bits: int, certified: Certified) -> TierPoint:
    score = certified.tiers.get(tier.name)
    measured = None
    if score is not None and not tier.exact:
        measured = Measured(score.kl, score.p99, score.upper, score.agreement, score.noise, score.documents, score.tokens)
    bits = raw_bits * tier.load_nbytes / total.raw_nbytes
    kl = 0.0 if tier.exact else measured.kl if measured else None
    return TierPoint(
        tier.name, spec.codec, tier.exact, tier.nbytes, tier.load_nbytes, tier.load_nbytes / total.tokens, bits, tier.raw_ratio, kl, measured
    )


def _groups(packs: list[Pack]) -> list[GroupBytes]:
    """One entry a group of layers; packs of one encoding and model have the same ones."""
    first, found = packs[0], []
    tokens, kinds = sum(int(p.rows["tokens"].sum(dtype=np.uint64)) for p in packs), _kinds(packs)
    for group in range(first.groups):
        layers = first.group_layers(group)
        values = tokens * len(layers) * 2 * first.layout.channels
        nbytes = {t.name: sum(int(p.index(t.array)[group, :, 1].sum(dtype=np.uint64)) for p in packs) for t in first.encoding.tiers}
        bits = {name: 8 * n / values for name, n in nbytes.items()}
        found.append(GroupBytes(layers[0], layers[-1], nbytes, bits, {t.name: kinds.get((group, t.name)) for t in first.encoding.tiers}))
    return found


def _kinds(packs: list[Pack]) -> dict[tuple[int, str], KindBytes]:
    """(group, tier) -> keys and values, where the tier's codec keeps them apart: from all units, or from evenly spaced ones where they are many."""
    encoding, groups = packs[0].encoding, range(packs[0].groups)
    counts = [p.manifest.slots // encoding.block_tokens for p in packs]
    chosen = list(_spread(packs, counts, max(1, UNITS // (len(groups) * len(encoding.tiers)))))
    found = {}
    for tier in encoding.tiers:
        for group in groups:
            sums = [_unit_kinds(pack, tier, group, block) for pack, block in chosen]
            known = [s for s in sums if s is not None]
            if len(known) == len(sums):
                keys, values, shared = (sum(s[i] for s in known) for i in range(3))
                found[group, tier.name] = KindBytes(keys, values, shared, len(known), sum(counts))
    return found


def _spread(packs: list[Pack], counts: list[int], most: int) -> Iterable[tuple[Pack, int]]:
    """At most so many of the packs' blocks, evenly over all of them."""
    total, starts = sum(counts), np.cumsum([0, *counts])
    for at in sorted({i * total // min(most, total) for i in range(min(most, total))}):
        pack = int(np.searchsorted(starts, at, side="right")) - 1
        yield packs[pack], int(at - starts[pack])


def _unit_kinds(pack: Pack, tier: Tier, group: int, block: int) -> tuple[int, int, int] | None:
    spec = pack.encoding.codec(tier.codec)
    if spec.name not in REGISTRY:  # a newer kvstore's: its bytes can be counted all the same
        return None
    record = pack.unit(tier.array, group, block)
    found = kind_nbytes(spec, tier.level, record, pack.layout.dtype)
    return None if found is None else (*found, len(record) + 4 - sum(found))  # with the unit's crc32c


def kind_totals(plot: EncodingPlot) -> dict[str, KindBytes | None]:
    """Tier -> keys and values over all layers, None where some are coded together."""
    rows: dict[str, list[KindBytes | None]] = defaultdict(list)
    for group in plot.layers:
        for name, kinds in group.kinds.items():
            rows[name].append(kinds)
    return {name: _added([k for k in row if k]) if all(row) else None for name, row in rows.items()}


def _added(rows: list[KindBytes]) -> KindBytes:
    keys, values, shared = (sum(getattr(r, n) for r in rows) for n in ("keys", "values", "shared"))
    return KindBytes(keys, values, shared, sum(r.units for r in rows), sum(r.of for r in rows))
