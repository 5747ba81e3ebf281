"""What a store holds and what that takes: its documents, and all of its bytes. Torch-free; reads rows and manifests, no payload."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kvstore.artifact import tier_chain
from kvstore.calibration import shelf
from kvstore.calibration.record import CalibrationRecord
from kvstore.calibration.shelf import CALIBRATIONS
from kvstore.certificates import TierQuality
from kvstore.errors import FormatError, IntegrityError, NotFoundError
from kvstore.manifest import Encoding, Layout, Row, zarr_group
from kvstore.pack import PACKS, Pack
from kvstore.pack_files import STATE
from kvstore.records import MODELS
from kvstore.store import Store

REGIMES = ("prefix", "isolated")
Sizes = dict[bytes, int]


@dataclass(frozen=True)
class Listed:
    """One document in one model, template and encoding (keys). `nbytes`: its units in all tiers, regimes and chains, without the shared head.

    `chains`: how often passages of it are stored once more, after other passages than the head.
    """

    source: str
    passages: int
    tokens: int
    nbytes: int
    tiers: tuple[str, ...]
    regimes: tuple[str, ...]
    model: str
    template: str
    encoding: str
    chains: int = 0


def documents(
    store: Store, source: str | None = None, *, model: str | None = None, template: str | None = None, encoding: str | None = None
) -> list[Listed]:
    """The newest snapshot's documents by source, one entry a version; keys may be their beginnings."""
    rows = store.rows(source, model=model, template=template, encoding=encoding)
    packs = [p for p in packs_of(store) if p.manifest.encoding_id in {r.encoding for r in rows}]
    encodings = {p.manifest.encoding_id: p.encoding for p in packs}
    sizes: dict[str, Sizes] = {e: {} for e in encodings}
    for pack in packs:
        sizes[pack.manifest.encoding_id] |= _sizes(pack)
    return [_listed(row, encodings.get(row.encoding), sizes.get(row.encoding, {})) for row in rows]


def packs_of(store: Store) -> list[Pack]:
    """Every pack that is (still) there."""
    found = []
    for name in store.index.packs():
        try:
            found.append(store.index.pack(name))
        except NotFoundError:  # collected meanwhile
            continue
    return found


def _sizes(pack: Pack) -> Sizes:
    """Segment key -> bytes of its units in all tiers, and of its recurrent state."""
    rows = pack.rows
    total = sum((rows[f"{a}.nbytes"] for a in pack.arrays), np.zeros(len(rows), np.uint64))
    return {key.tobytes(): int(n) for key, n in zip(rows["key"], total, strict=True)}


def _listed(row: Row, encoding: Encoding | None, sizes: Sizes) -> Listed:
    keys = {bytes.fromhex(k) for p in row.passages for k in (p.prefix, p.isolated) if k is not None} | {bytes.fromhex(c.key) for c in row.chained}
    return Listed(
        row.source,
        len(row.passages),
        sum(p.tokens for p in row.passages),
        sum(sizes.get(k, 0) for k in keys),
        tuple(t.name for t in encoding.tiers) if encoding else (),
        regimes_of(row),
        row.model,
        row.template,
        row.encoding,
        len(row.chained),
    )


def regimes_of(row: Row) -> tuple[str, ...]:
    """The contexts that every passage is stored in."""
    return tuple(r for r in REGIMES if row.passages and all(getattr(p, r) is not None for p in row.passages))


@dataclass
class TierTotal:
    """One tier of one encoding: what its units take, and `raw_ratio`, how many times smaller a load at it reads than the model's own dtype.

    `kl` (nats a token) is the mean that the quality reports have, `upper` its upper 95 % bound; 0 where the tier is exact, None where unmeasured.
    """

    name: str
    exact: bool
    nbytes: int = 0
    load_nbytes: int = 0
    raw_ratio: float = 0.0
    kl: float | None = None
    upper: float | None = None


@dataclass
class EncodingTotal:
    """All artifacts of one encoding and model. `raw_nbytes`: the same K and V as the model computes them.

    `state_nbytes`: recurrent states, which lie beside the tiers and are exact at each of them.
    """

    id: str
    model: str
    codecs: list[str]
    tiers: list[TierTotal]
    artifacts: int = 0
    tokens: int = 0
    raw_nbytes: int = 0
    state_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tiers) + self.state_nbytes


@dataclass(frozen=True)
class CalibrationTotal:
    """One calibration: for which model (key), by which metric from how many tokens, what its files take, and whether new builds use it."""

    digest: str
    model: str
    metric: str
    tokens: int
    nbytes: int
    current: bool


@dataclass
class Stats:
    """A whole store. `overhead` (bytes by kind) and the tiers' bytes add up to `nbytes`, what its files take.

    `chains`: passages of the newest snapshot that are stored once more, after others.
    """

    store: str
    id: str
    snapshot: int
    snapshots: int
    documents: int
    packs: int
    chains: int = 0
    nbytes: int = 0
    encodings: list[EncodingTotal] = field(default_factory=list)
    overhead: dict[str, int] = field(default_factory=dict)
    models: list[tuple[str, str]] = field(default_factory=list)
    templates: list[tuple[str, str]] = field(default_factory=list)
    calibrations: list[CalibrationTotal] = field(default_factory=list)

    @property
    def artifacts(self) -> int:
        return sum(e.artifacts for e in self.encodings)

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.encodings)

    @property
    def raw_nbytes(self) -> int:
        return sum(e.raw_nbytes for e in self.encodings)


def stats(store: Store) -> Stats:
    """Add up a store. Bytes are those of the files now, whatever snapshots still need them."""
    packs = packs_of(store)
    found = Stats(str(store.path), store.id, store.number, len(store.snapshots.numbers()), len(store), len(packs))
    found.chains = sum(len(r.chained) for r in store.rows())
    found.models = [(r.model.key, r.model.name) for r in store.models()]
    found.templates = [(t.id, t.kind) for t in store.templates()]
    found.calibrations = [calibration_total(store, digest, record) for digest, record in store.calibrations().items()]
    totals: dict[tuple[str, str], EncodingTotal] = {}
    for pack in packs:
        _add_pack(totals, pack)
    found.encodings = [totals[k] for k in sorted(totals)]
    for total in found.encodings:
        _finish(total, next(p.encoding for p in packs if p.manifest.encoding_id == total.id))
        _add_quality(total, store)
    found.nbytes, found.overhead = _overhead(store, sum(e.nbytes for e in found.encodings))
    return found


def calibration_total(store: Store, digest: str, record: CalibrationRecord) -> CalibrationTotal:
    nbytes = len(zarr_group(record)) + sum(f.bytes for f in record.files.values())
    current = store.current_calibration(record.model) == digest
    return CalibrationTotal(digest, record.model, record.metric, record.tokens, nbytes, current)


def calibrations_in(store: Store, encoding: Encoding) -> list[CalibrationTotal]:
    """Those that an encoding's codecs name. Raises NotFoundError, IntegrityError, FormatError."""
    named = [c.calibration for c in encoding.codecs if c.calibration is not None]
    return [calibration_total(store, digest, shelf.record_of(store.storage, digest)) for digest in named]


def _add_pack(totals: dict[tuple[str, str], EncodingTotal], pack: Pack) -> None:
    m = pack.manifest
    if (m.encoding_id, m.model) not in totals:
        tiers = [TierTotal(t.name, t.exact) for t in m.encoding.tiers]
        totals[m.encoding_id, m.model] = EncodingTotal(m.encoding_id, m.model, [c.name for c in m.encoding.codecs], tiers)
    total, tokens = totals[m.encoding_id, m.model], int(pack.rows["tokens"].sum(dtype=np.uint64))
    total.artifacts += len(pack.rows)
    total.tokens += tokens
    total.raw_nbytes += tokens * raw_token_nbytes(pack.layout)
    total.state_nbytes += int(pack.rows[f"{STATE}.nbytes"].sum(dtype=np.uint64)) if STATE in pack.arrays else 0
    for tier, spec in zip(total.tiers, m.encoding.tiers, strict=True):
        tier.nbytes += int(pack.rows[f"{spec.array}.nbytes"].sum(dtype=np.uint64))


def raw_token_nbytes(layout: Layout) -> int:
    """Bytes of one token's K and V in the model's dtype."""
    return layout.values_per_token * (4 if layout.dtype == "float32" else 2)


def _finish(total: EncodingTotal, encoding: Encoding) -> None:
    own = {t.name: t.nbytes for t in total.tiers}
    for tier in total.tiers:
        tier.load_nbytes = sum(own[t.name] for t in tier_chain(encoding, tier.name))
        tier.raw_ratio = total.raw_nbytes / max(1, tier.load_nbytes)


def _add_quality(total: EncodingTotal, store: Store) -> None:
    """What cannot be read counts as unmeasured here; verify reports it."""
    measured: Mapping[str, TierQuality] = {}
    with suppress(FormatError, IntegrityError):
        measured = store.quality(total.id, total.model).tiers
    for tier in total.tiers:
        found = measured.get(tier.name)
        tier.kl, tier.upper = (0.0, 0.0) if tier.exact else (found.kl, found.upper) if found is not None else (None, None)


def _overhead(store: Store, units: int) -> tuple[int, dict[str, int]]:
    """(all bytes, bytes by kind) of everything that is no unit."""
    kinds = dict.fromkeys(("calibrations", "token ids", "rows", "unit index", "json", "probes", "other"), 0)
    for path in _files(store.path):
        kinds[_kind(path)] += os.stat(store.path / path).st_size
    total = sum(kinds.values())
    kinds["unit index"] = max(0, kinds["unit index"] - units)
    return total, kinds


def _files(root: Path) -> list[str]:
    return [Path(folder, name).relative_to(root).as_posix() for folder, _, names in os.walk(root) for name in names]


def _kind(path: str) -> str:
    """Of one file, by its name; shards count as `unit index` until the units are taken off."""
    top, _, rest = path.partition("/")
    if top == CALIBRATIONS and "/" in rest:
        return "calibrations"
    if path.endswith(".json"):
        return "json"
    if top == MODELS:
        return "probes"
    if top != PACKS:
        return "other"
    return "token ids" if "/tokens/" in path else "rows" if "/segments/" in path else "unit index"
