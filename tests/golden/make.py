"""Writes a folder of golden artifacts: `python -m tests.golden.make tests/golden/vN`. Refuses where the folder exists.

Everything that goes in follows from integer formulas here, so that the same input can be written again by any later version. Nothing
here needs torch, a model or a random generator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs import codec_class, codec_of
from kvstore.digest import digest, sha256
from kvstore.identity import Context, make_model, segment_key
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
from kvstore.pack_writer import PackWriter
from kvstore.parts import Parts, encode_part
from kvstore.policies import Assignment
from kvstore.records import add_model, add_template, create
from kvstore.snapshot import Change
from kvstore.sources import text_digest
from kvstore.storage.local import LocalStorage
from kvstore.store import Store
from kvstore.tags import add_tag
from tests.golden.expected import expected, lines
from tests.golden.values import Bits, bits_for, ids, mixed

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

    def bits(self, piece: Piece) -> Bits:
        return bits_for(self.model.layout, piece.ids, plain=piece.plain)

    def assigned(self, piece: Piece) -> Assignment | None:
        """What a policy makes of the tokens."""
        return None


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


def units_of(batch: Batch, piece: Piece) -> dict[str, list[list[bytes]]]:
    """Tier array -> units [group][block]."""
    encoding, layout, bits = batch.encoding, batch.model.layout, batch.bits(piece)
    codecs = {c.name: codec_of(c, encoding, layout) for c in encoding.codecs}
    parts, size, block = Parts(batch.assigned(piece), layout), encoding.group_layers, encoding.block_tokens

    def records(tier: Tier, g: int, t: int) -> bytes:
        cell = np.ascontiguousarray(bits[g : g + size, :, t : t + block])
        return encode_part(codecs[tier.codec], cell, layout.dtype, g // size, parts.cell(g, size, t, block))[tier.level]

    groups, starts = range(0, bits.shape[0], encoding.group_layers), range(0, bits.shape[2], encoding.block_tokens)
    return {tier.array: [[records(tier, g, t) for t in starts] for g in groups] for tier in encoding.tiers}


def write_store(path: Path) -> dict[str, str]:
    """A store with everything; batch name -> pack name."""
    create(path)
    storage = Store(path).storage
    packs = {batch.name: write_pack(storage, batch) for batch in batches()}
    add_template(storage, template())
    for change, note in changes():
        Store(path).snapshots.commit(change, note)
    add_tag(storage, "first", 1)
    return packs


def write_pack(storage: LocalStorage, batch: Batch) -> str:
    """Its name."""
    add_model(storage, batch.model, probe_of(batch.model))
    writer = PackWriter(storage, batch.model.model.key, batch.model.layout, batch.encoding, PROVENANCE)
    for piece in batch.pieces:
        writer.add(batch.key(piece), piece.context, piece.ids, units_of(batch, piece))
    return writer.close() or ""


def changes() -> list[tuple[Change, str]]:
    """Two documents; one more, one changed; one gone."""
    named = {b.name: b for b in batches()}
    raw, one, two = named["raw"], named["scalar-1"], named["scalar-2"]
    a = row_of("a.md", raw, raw.keys[0], (Passage(18, prefix=raw.keys[1]), Passage(5, prefix=raw.keys[3])), {})
    b = row_of("notes/b.md", one, one.keys[0], (Passage(16, isolated=one.keys[1]),), {"title": "Grüße", "weight": 0.5})
    c = row_of("c.md", two, one.keys[0], (Passage(18, prefix=two.keys[0]),), {})
    longer = (Passage(16, isolated=one.keys[1]), Passage(5, prefix=two.keys[1]))
    again = row_of("notes/b.md", one, one.keys[0], longer, {"title": "Grüße", "weight": 1.0})
    return [(Change((a, b)), "first"), (Change((c, again)), "second"), (Change(removed=(a.id,)), "rm")]


def row_of(source: str, batch: Batch, head: str, passages: tuple[Passage, ...], metadata: Mapping[str, Any]) -> Row:
    return Row(source, batch.model.model.key, template().id, batch.encoding.id, text_digest(f"text of {source}"), "passages=0 long=split room=1000",
               head, passages, "", dict(metadata))  # fmt: skip


def main(folder: Path) -> None:
    """Raises FileExistsError: golden artifacts are only ever added."""
    folder.mkdir(parents=True)
    packs = write_store(folder / "kv.zarr")
    (folder / "expected.json").write_text(lines(expected(folder / "kv.zarr", packs)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
