"""One stored document in full: what its units take layer by layer, what it is, and where it comes from. Torch-free; decodes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.artifact import Artifact, Stored, tier_chain
from kvstore.certificates import Source
from kvstore.chain_rows import before
from kvstore.inventory import CalibrationTotal, calibrations_in, raw_token_nbytes, regimes_of
from kvstore.manifest import Row
from kvstore.store import Store


@dataclass(frozen=True)
class LayerBytes:
    """A transform group's layers, and bytes of its units by tier (each tier's own)."""

    first: int
    last: int
    nbytes: dict[str, int]
    bits: dict[str, float]


@dataclass(frozen=True)
class TierDetail:
    """`nbytes` is the tier's own; `load_nbytes` and `bits` (a value) what a load at it reads, lower tiers included.

    `kl` is nats a token where known; `kl_from` as in receipts.
    """

    name: str
    codec: str
    requires: tuple[str, ...]
    exact: bool
    nbytes: int
    load_nbytes: int
    bits: float
    kl: float | None
    kl_from: Source | None


@dataclass(frozen=True)
class SegmentDetail:
    """One stored segment: `regime` is prefix, isolated, both where it is stored once for both, or chain: `after` these passages (and the head)."""

    passage: int
    regime: str
    key: str
    artifact: str
    pack: str
    tokens: int
    position: int
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detail:
    """A document, or passage, in one model, template and encoding. Sizes are of one artifact a passage, in the regime that loads prefer."""

    source: str
    row: Row
    regimes: tuple[str, ...]
    tokens: int
    raw_nbytes: int
    tiers: list[TierDetail]
    layers: list[LayerBytes]
    segments: list[SegmentDetail]
    model: dict[str, Any]
    template: str
    provenance: dict[str, str]
    calibrations: list[CalibrationTotal]


def show(store: Store, source: str, *, model: str | None = None, template: str | None = None, encoding: str | None = None) -> Detail:
    """All that the store knows of `a.md`, or of its passage `a.md#3`. Raises NotFoundError; InputError where several versions are stored."""
    artifact = store.artifact(source, model=model, template=template, encoding=encoding)
    record = store.model_record(artifact.row.model)
    about = {
        "key": record.model.key,
        "name": record.model.name,
        "dtype": record.model.dtype,
        "layers": record.layout.layers,
        "kv_heads": record.layout.kv_heads,
        "head_dim": record.layout.head_dim,
    }
    return Detail(
        artifact.source,
        artifact.row,
        regimes_of(artifact.row),
        artifact.tokens,
        artifact.tokens * raw_token_nbytes(artifact.layout),
        _tiers(artifact),
        _layers(artifact),
        _segments(artifact, store.resolve(source)[1] or 0),
        about,
        store.template(artifact.row.template).kind,
        dict(artifact.stored[0].pack.manifest.provenance),
        calibrations_in(store, artifact.encoding),
    )


def _tiers(artifact: Artifact) -> list[TierDetail]:
    encoding, values = artifact.encoding, artifact.tokens * artifact.layout.values_per_token
    own = {t.name: sum(s.segment.nbytes([t.array]) for s in artifact.stored) for t in encoding.tiers}
    found, known = [], artifact.known
    for tier in encoding.tiers:
        load = sum(own[t.name] for t in tier_chain(encoding, tier.name))
        found.append(TierDetail(tier.name, tier.codec, tier.requires, tier.exact, own[tier.name], load, 8 * load / values, *known[tier.name]))
    return found


def _layers(artifact: Artifact) -> list[LayerBytes]:
    """One entry a group, bits a value of each tier's own units."""
    pack, found = artifact.stored[0].pack, []
    for group in range(pack.groups):
        layers = pack.group_layers(group)
        values = artifact.tokens * len(layers) * 2 * artifact.layout.channels
        nbytes = {t.name: sum(_group_nbytes(s, t.array, group) for s in artifact.stored) for t in artifact.encoding.tiers}
        found.append(LayerBytes(layers[0], layers[-1], nbytes, {n: 8 * b / values for n, b in nbytes.items()}))
    return found


def _group_nbytes(stored: Stored, array: str, group: int) -> int:
    block = stored.encoding.block_tokens
    first, blocks = stored.segment.start // block, -(-stored.segment.tokens // block)
    return int(stored.pack.index(array)[group, first : first + blocks, 1].sum(dtype=np.uint64))


def _segments(artifact: Artifact, first: int) -> list[SegmentDetail]:
    found = []
    for number, passage in enumerate(artifact.passages, first):
        keys = {"prefix": passage.prefix, "isolated": passage.isolated}
        if passage.prefix == passage.isolated:
            keys = {"both": passage.prefix}
        found += [_segment(artifact.store.stored(key, artifact.row.encoding), number, regime) for regime, key in keys.items() if key is not None]
    return found + _chained(artifact, range(first, first + len(artifact.passages)))


def _chained(artifact: Artifact, passages: range) -> list[SegmentDetail]:
    row, store = artifact.row, artifact.store
    mine = [c for c in row.chained if c.passage in passages]
    rows = store.rows(model=row.model, template=row.template, encoding=row.encoding) if mine else []
    return [_segment(store.stored(c.key, row.encoding), c.passage, "chain", tuple(before(c, rows))) for c in mine]


def _segment(stored: Stored, number: int, regime: str, after: tuple[str, ...] = ()) -> SegmentDetail:
    segment = stored.segment
    return SegmentDetail(number, regime, segment.key, stored.id, stored.pack.name, segment.tokens, segment.position, after)
