"""Writes a folder of golden artifacts: `python -m tests.golden.make tests/golden/vN`. Refuses where the folder exists.

Everything that goes in follows from integer formulas here, so that the same input can be written again by any later version. Nothing
here needs torch, a model or a random generator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs import codec_class, get_codec
from kvstore.digest import digest, sha256
from kvstore.identity import Context, id_bytes, make_model, segment_key
from kvstore.manifest import (
    FORMAT,
    CodecSpec,
    Encoding,
    Layout,
    Model,
    ModelRecord,
    Part,
    Passage,
    RopeRecord,
    Row,
    TemplateRecord,
    Tier,
    ValueDtype,
)
from kvstore.pack import Pack, Segment
from kvstore.pack_writer import PackWriter
from kvstore.snapshot import Change
from kvstore.sources import text_digest
from kvstore.store import Store, add_model, add_template, create, tier_chain
from kvstore.tags import add_tag
from tests.golden.values import Bits, bits_for, ids, mixed

SAMPLE = 397  # of a lossy tier every so manieth value is kept
PROVENANCE = {"kvstore": "golden", "machine": "none"}
DTYPES: tuple[ValueDtype, ...] = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Piece:
    """A segment to store. `plain`: only finite values, as lossy codecs want them."""

    ids: tuple[int, ...]
    context: Context
    plain: bool


@dataclass(frozen=True)
class Batch:
    """One pack."""

    name: str
    model: ModelRecord
    encoding: Encoding
    pieces: tuple[Piece, ...]

    def key(self, piece: Piece) -> str:
        return segment_key(self.model.model, self.model.layout, piece.context, piece.ids)

    @property
    def keys(self) -> list[str]:
        return [self.key(p) for p in self.pieces]


def layout_of(dtype: ValueDtype) -> Layout:
    """Two layers rotated as a whole in halves, a third in part and interleaved; in float32 the second has no RoPE."""
    whole = RopeRecord(0, 8, "half", np.array([1, 0.25, 0.0625, 0.015625], "<f4").tobytes().hex(), 1.0, "model", "default")
    part = RopeRecord(2, 4, "interleaved", np.array([1, 0.125], "<f4").tobytes().hex(), 1.25, "float32", "default")
    return Layout(3, 2, 8, dtype, "hooked", (0, None if dtype == "float32" else 0, 1), (whole, part))


def model_record(dtype: ValueDtype, layout: Layout) -> ModelRecord:
    config = {"model_type": "golden", "num_hidden_layers": layout.layers, "num_key_value_heads": layout.kv_heads, "head_dim": layout.head_dim,
              "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}, "rms_norm_eps": (1e-5).hex()}  # fmt: skip
    weights = digest("kvstore/weights/1", [["w", dtype, [layout.layers], sha256(b"golden")]])
    model: Model = make_model(f"golden-{dtype}", weights=weights, config=config, dtype=dtype)
    return ModelRecord(FORMAT, "model", model, layout, tuple(range(300, 308)), PROVENANCE)


def probe_of(record: ModelRecord) -> npt.NDArray[np.float32]:
    """float32 [layers, 2, tokens, 4]."""
    shape = (record.layout.layers, 2, len(record.probe_ids), 4)
    numbers = mixed(np.arange(np.prod(shape))) >> np.uint32(20)
    return (numbers.astype(np.float32) / np.float32(256) - np.float32(8)).reshape(shape)


def template() -> TemplateRecord:
    source = digest("kvstore/template-source/1", {"kind": "plain", "text": "", "system": "Be brief."})
    head, anchor = Part("<s>Be brief.\n", ids(1, 20)), Part("<s>", (1,))
    around = (Part("", ()), Part("\n", (13,)), Part("Q: ", (81, 58)), Part("\nA:", (13, 65)))
    return TemplateRecord(FORMAT, "plain", source, digest("kvstore/tokenizer/1", b"golden"), "Be brief.", anchor, head, *around)


def encoding_of(names: Sequence[str], block: int, group: int, value_group: int = 8) -> Encoding:
    """Parameters are fixed here: other defaults are no other format."""
    scalar: dict[str, int | str] = {"key_step": 450, "value_step": 560, "value_group": value_group}
    specs = [CodecSpec(name, codec_class(name).version, scalar if name == "scalar" else {}) for name in names]
    tiers = {"raw": [Tier("raw", "t0", "raw", 0, (), True)], "lossless": [Tier("lossless", "lossless", "lossless", 0, (), True)],
             "scalar": [Tier("standard", "t0", "scalar", 0, (), False), Tier("fine", "t1", "scalar", 1, ("standard",), False)]}  # fmt: skip
    return Encoding(tuple(specs), tuple(t for name in names for t in tiers[name]), block, group)


def batches() -> list[Batch]:
    """Every pack of a golden store."""
    records = {d: model_record(d, layout_of(d)) for d in DTYPES}
    found = [Batch("raw", records["bfloat16"], encoding_of(["raw"], 16, 2), tuple(_family(records["bfloat16"], False)))]
    found += [Batch(f"lossless-{d}", records[d], encoding_of(["lossless"], 16, 1), tuple(_family(records[d], False))[::3]) for d in DTYPES]
    found += [Batch(f"scalar-{d}", records[d], encoding_of(["scalar"], 32, 2), tuple(_family(records[d], True))[1:3]) for d in DTYPES[1:]]
    head, child, alone, grandchild = _family(records["bfloat16"], True)
    both = encoding_of(["scalar", "lossless"], 16, 1)
    found += [Batch("scalar-1", records["bfloat16"], both, (head, alone)), Batch("scalar-2", records["bfloat16"], both, (child, grandchild))]
    return [*found, _wide()]


def _family(record: ModelRecord, plain: bool) -> Iterator[Piece]:
    """Head, a document after it, a document after the anchor, a document after the first."""
    head = Piece(template().head.ids, Context.root(), plain)
    head_key = segment_key(record.model, record.layout, head.context, head.ids)
    child = Piece(ids(1000, 18), Context.parent(head_key, 20), plain)
    child_key = segment_key(record.model, record.layout, child.context, child.ids)
    alone = Piece(ids(2000, 16), Context.anchor(template().anchor.ids), plain)
    yield from (head, child, alone, Piece(ids(3000, 5), Context.parent(child_key, 38), plain))


def _wide() -> Batch:
    """Units of many streams: 2 x 128 x 128 values, and a last block of 9 tokens."""
    layout = Layout(1, 2, 64, "bfloat16", "unrotated", (None,), ())
    record = model_record("bfloat16", layout)
    return Batch("scalar-wide", record, encoding_of(["scalar"], 128, 1, value_group=64), (Piece(ids(5000, 137), Context.root(), True),))


def units_of(batch: Batch, bits: Bits) -> dict[str, list[list[bytes]]]:
    """Tier array -> units [group][block]."""
    encoding = batch.encoding
    codecs = {c.name: get_codec(c.name, c.version, c.params) for c in encoding.codecs}

    def records(tier: Tier, g: int, t: int) -> bytes:
        cell = np.ascontiguousarray(bits[g : g + encoding.group_layers, :, t : t + encoding.block_tokens])
        return codecs[tier.codec].encode(cell, batch.model.layout.dtype)[tier.level]

    groups, starts = range(0, bits.shape[0], encoding.group_layers), range(0, bits.shape[2], encoding.block_tokens)
    return {tier.array: [[records(tier, g, t) for t in starts] for g in groups] for tier in encoding.tiers}


def decoded(pack: Pack, segment: Segment, tier: str) -> Bits:
    """[layers, 2, tokens, channels]: float32, or bit patterns for an exact tier."""
    encoding, layout = pack.encoding, pack.layout
    tiers = tier_chain(encoding, tier)
    spec = encoding.codec(tiers[-1].codec)
    codec = get_codec(spec.name, spec.version, spec.params)
    dtype = np.dtype(np.float32 if not tiers[-1].exact else np.uint32 if layout.dtype == "float32" else np.uint16)
    out = np.empty((layout.layers, 2, segment.tokens, layout.channels), dtype)
    units = [pack.units(segment, t.array) for t in tiers]
    for g in range(pack.groups):
        for b in range(len(units[0][g])):
            start, layers = b * encoding.block_tokens, pack.group_layers(g)
            codec.decode([u[g][b] for u in units], out[layers.start : layers.stop, :, start : start + encoding.block_tokens])
    return out


def write_store(path: Path) -> dict[str, str]:
    """A store with everything; batch name -> pack name."""
    create(path)
    storage = Store(path).storage
    packs: dict[str, str] = {}
    for batch in batches():
        add_model(storage, batch.model, probe_of(batch.model))
        writer = PackWriter(storage, batch.model.model.key, batch.model.layout, batch.encoding, PROVENANCE)
        for piece in batch.pieces:
            writer.add(batch.key(piece), piece.context, piece.ids, units_of(batch, bits_for(batch.model.layout, piece.ids, plain=piece.plain)))
        packs[batch.name] = writer.close() or ""
    add_template(storage, template())
    for change, note in changes():
        Store(path).snapshots.commit(change, note)
    add_tag(storage, "first", 1)
    return packs


def changes() -> list[tuple[Change, str]]:
    """Two documents; one more, one changed; one gone."""
    named = {b.name: b for b in batches()}
    raw, one, two = named["raw"], named["scalar-1"], named["scalar-2"]
    a = _row("a.md", raw, raw.keys[0], (Passage(18, prefix=raw.keys[1]), Passage(5, prefix=raw.keys[3])), {})
    b = _row("notes/b.md", one, one.keys[0], (Passage(16, isolated=one.keys[1]),), {"title": "Grüße", "weight": 0.5})
    c = _row("c.md", two, one.keys[0], (Passage(18, prefix=two.keys[0]),), {})
    longer = (Passage(16, isolated=one.keys[1]), Passage(5, prefix=two.keys[1]))
    again = _row("notes/b.md", one, one.keys[0], longer, {"title": "Grüße", "weight": 1.0})
    return [(Change((a, b)), "first"), (Change((c, again)), "second"), (Change(removed=(a.id,)), "rm")]


def _row(source: str, batch: Batch, head: str, passages: tuple[Passage, ...], metadata: Mapping[str, Any]) -> Row:
    return Row(source, batch.model.model.key, template().id, batch.encoding.id, text_digest(f"text of {source}"), "passages=0 long=split room=1000",
               head, passages, "", dict(metadata))  # fmt: skip


def expected(path: Path, packs: Mapping[str, str]) -> dict[str, Any]:
    """What reading the store must give, batch by batch and segment by segment."""
    storage = Store(path).storage
    found: dict[str, Any] = {"template": template().id, "models": sorted({b.model.model.key for b in batches()}), "packs": {}}
    for batch in batches():
        pack = Pack(storage, packs[batch.name])
        segments = [_expected_segment(pack, pack.segment(row)) for row in range(pack.manifest.segments)]
        found["packs"][batch.name] = {"pack": pack.name, "encoding": batch.encoding.id, "dtype": pack.layout.dtype, "segments": segments}
    return found


def _expected_segment(pack: Pack, segment: Segment) -> dict[str, Any]:
    values = {t.name: decoded(pack, segment, t.name) for t in pack.encoding.tiers}
    exact = {t.name: sha256(values[t.name].astype(values[t.name].dtype.newbyteorder("<")).tobytes()) for t in pack.encoding.tiers if t.exact}
    lossy = {t.name: [float(v) for v in values[t.name].reshape(-1)[::SAMPLE]] for t in pack.encoding.tiers if not t.exact}
    return {"key": segment.key, "parent": segment.parent, "context": segment.context, "position": segment.position, "tokens": segment.tokens,
            "ids_sha256": sha256(id_bytes(pack.ids(segment).tolist())), "ranges": {a: list(r) for a, r in segment.ranges.items()},
            "exact_sha256": exact, "lossy": lossy}  # fmt: skip


def main(folder: Path) -> None:
    """Raises FileExistsError: golden artifacts are only ever added."""
    folder.mkdir(parents=True)
    packs = write_store(folder / "kv.zarr")
    (folder / "expected.json").write_text(lines(expected(folder / "kv.zarr", packs)), encoding="utf-8")


def lines(found: dict[str, Any]) -> str:
    """JSON with one line a segment."""
    whole = json.dumps({**found, "packs": {n: {**p, "segments": "@"} for n, p in found["packs"].items()}}, indent=1, sort_keys=True)
    for _, pack in sorted(found["packs"].items()):
        whole = whole.replace('"@"', "[\n  " + ",\n  ".join(json.dumps(s, sort_keys=True) for s in pack["segments"]) + "]", 1)
    return whole + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
