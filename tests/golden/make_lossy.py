"""Writes a second folder of golden artifacts: `python -m tests.golden.make_lossy tests/golden/lossy-vN`. Refuses where the folder exists.

What `make` has not: the codecs `transform` and `cachegen`, calibrations, token policies, quality reports. The same rules: integer formulas, and every
byte follows from them on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from kvstore.calibration import shelf
from kvstore.calibration.record import Calibration
from kvstore.certificates import ArtifactScore, QualityReport, TierScore, add_report, make_report
from kvstore.identity import Context, artifact_id, segment_key
from kvstore.manifest import FORMAT, CodecSpec, Encoding, Layout, ModelRecord, Passage, Tier
from kvstore.policies import DROP, Assignment, parse
from kvstore.records import add_model, add_template, create
from kvstore.snapshot import Change
from kvstore.sources import text_digest
from kvstore.store import Store
from tests.golden import learned
from tests.golden.expected import expected, lines
from tests.golden.make import PROVENANCE, Batch, Piece, encoding_of, layout_of, model_record, probe_of, row_of, template, write_pack
from tests.golden.values import Bits, bits_for, ids

WHOLE = "sink+recent:keep=0,recent=9,rest=drop,sinks=3"
HEADS = "fastgen:frequent=30,local=30,recover=95,rest=drop"
STEPS = "sink+recent:keep=-1,recent=15,rest=1,sinks=140"
TIERS = ("draft", "standard", "fine")
GONE = "ab" * 32  # a calibration that was current once


@dataclass(frozen=True)
class Lossy(Batch):
    """`calibration` makes it one of `transform`."""

    calibration: Calibration | None = None

    def bits(self, piece: Piece) -> Bits:
        layout = self.model.layout
        if self.calibration is None:
            return bits_for(layout, piece.ids, plain=True)
        return learned.bits_of(learned.whole(layout, self.encoding.group_layers, piece.ids), layout.dtype)

    def assigned(self, piece: Piece) -> Assignment | None:
        """`fastgen` wants a model's attention: some formula takes its place."""
        policy, layout = str(self.encoding.codecs[0].params.get("policy", "")), self.model.layout
        if policy != HEADS:
            view: Any = SimpleNamespace(ids=np.array(piece.ids))
            return parse(policy).assign(view) if policy else None
        heads, tokens = np.arange(layout.layers * layout.kv_heads), np.arange(len(piece.ids))
        classes = np.where((tokens * 5 + heads[:, None] * 3) % 7 < heads[:, None], DROP, 0).astype(np.int8)
        return Assignment(classes.reshape(layout.layers, layout.kv_heads, -1), heads.reshape(layout.layers, -1).astype(np.uint8))


def small(dtype: Any, layers: int) -> ModelRecord:
    """Without RoPE, 2 heads of 4 channels."""
    return model_record(dtype, Layout(layers, 2, 4, dtype, "unrotated", (None,) * layers, ()))


def family(record: ModelRecord) -> tuple[Piece, ...]:
    """Head, a document after it, a document after the anchor."""
    head = Piece(template().head.ids, Context.root(), True)
    key = segment_key(record.model, record.layout, head.context, head.ids)
    return head, Piece(ids(1000, 21), Context.parent(key, 20), True), Piece(ids(2000, 9), Context.anchor(template().anchor.ids), True)


def transform(name: str, model: ModelRecord, block: int, group: int, pieces: Sequence[Piece], policy: str = "", tiers: int = 3) -> Lossy:
    found = learned.calibration(model.model.key, model.layout, group, tiers)
    spec = CodecSpec("transform", 1, {"policy": policy} if policy else {}, found.digest)
    named = TIERS[-tiers:]
    listed = tuple(Tier(t, f"t{level}", "transform", level, named[:level], False) for level, t in enumerate(named))
    return Lossy(name, model, Encoding((spec,), listed, block, group), tuple(pieces), found)


def cachegen(name: str, model: ModelRecord, block: int, group: int, piece: Piece, **params: int | str) -> Lossy:
    spec = CodecSpec("cachegen", 1, {**params, "group_layers": group, "layers": model.layout.layers})
    return Lossy(name, model, Encoding((spec,), (Tier("standard", "t0", "cachegen", 0, (), False),), block, group), (piece,))


def batches() -> list[Lossy]:
    """Every pack."""
    large, single, half = model_record("bfloat16", layout_of("bfloat16")), small("float32", 1), small("float16", 2)
    long, middle, other = (Piece(ids(first, count), Context.root(), True) for first, count in ((5000, 165), (6000, 29), (7000, 37)))
    scalar = encoding_of(["scalar"], 16, 1)
    params = {**scalar.codecs[0].params, "policy": HEADS}
    return [
        transform("transform", large, 16, 2, family(large)),
        transform("transform-wide", large, 150, 2, [long], STEPS),
        transform("transform-dropped", large, 64, 2, [other], WHOLE),
        transform("transform-float32", single, 24, 1, [middle], tiers=2),
        Lossy("scalar-dropped", large, msgspec.structs.replace(scalar, codecs=(CodecSpec("scalar", 1, params),)), (middle,)),
        cachegen("cachegen", half, 24, 1, middle, chunk=16, deltas=0, table="sigcomm1"),
        cachegen("cachegen-deltas", half, 24, 2, middle, chunk=12, deltas=1, table="24:12"),
    ]


def report(batch: Batch) -> QualityReport:
    """Of two artifacts of the first pack; all means are exact in binary."""
    scores = []
    for n, key in enumerate(batch.keys[1:], 1):
        tiers = tuple(TierScore(t.name, n * 2.0**-level, 2.0 ** (2 - level), 4.0, 1 - 2.0 ** (-1 - level), -(2.0**-level))
                      for level, t in enumerate(batch.encoding.tiers, 4))  # fmt: skip
        scores.append(ArtifactScore(artifact_id(key, batch.encoding.id), text_digest(f"text {n}"), 32 * n, 2.0**-20, tiers))
    made = make_report(batch.model.model.key, batch.encoding.id, scores, {t.name: 1.0 for t in batch.encoding.tiers}, PROVENANCE)
    dated = msgspec.structs.replace(made, created="2026-11-21T12:00:00+00:00")
    return msgspec.structs.replace(dated, digest=dated.own_digest())


def write_store(path: Path) -> dict[str, str]:
    """A store with everything; batch name -> pack name."""
    create(path)
    store, found = Store(path), batches()
    for batch in found:
        add_model(store.storage, batch.model, probe_of(batch.model))
        if batch.calibration is not None:
            shelf.publish(store.storage, batch.calibration)
    packs = {batch.name: write_pack(store.storage, batch) for batch in found}
    add_template(store.storage, template())
    first, calibration = found[0], found[0].encoding.codecs[0].calibration or ""
    before = shelf.Current(FORMAT, "current", 1, first.model.model.key, GONE)
    store.storage.create(shelf.link_name(before.model, 1), msgspec.json.encode(before, order="deterministic"))
    shelf.set_current(store.storage, before.model, calibration)
    add_report(store.storage, report(first))
    passages = (Passage(21, prefix=first.keys[1]), Passage(9, isolated=first.keys[2]))
    store.snapshots.commit(Change((row_of("a.md", first, first.keys[0], passages, {}),)), "first")
    return packs


def main(folder: Path) -> None:
    """Raises FileExistsError: golden artifacts are only ever added."""
    folder.mkdir(parents=True)
    packs = write_store(folder / "kv.zarr")
    (folder / "expected.json").write_text(lines(expected(folder / "kv.zarr", packs)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
