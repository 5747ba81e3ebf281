"""Every example of the format page, worked out again: by kvstore, and by a second reader written from the page."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvstore.digest
from kvstore import fingerprint, identity
from kvstore.arrays import state_metadata, tier_metadata
from kvstore.calibration.checks import require_record
from kvstore.calibration.files import chunk_files, metadata_files, plan
from kvstore.calibration.record import Calibration, CalibrationRecord
from kvstore.calibration.shelf import Current
from kvstore.certificates import QualityReport
from kvstore.codecs import ans, get_codec, table_data
from kvstore.codecs.masked import Mask
from kvstore.families.rope import rotate
from kvstore.families.states import State, state_bytes, states_from
from kvstore.manifest import Encoding, Layout, ModelRecord, PackManifest, RopeRecord, Row, Snapshot, StoreRecord, TemplateRecord, parse, zarr_group
from kvstore.tags import Tag
from kvstore.transforms.klt import Basis
from tests import plain_codecs, plain_reader, plain_transform

SCHEMAS = Path(__file__).parents[1] / "schemas"
PAGE = (SCHEMAS / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```json (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES: dict[str, Any] = {name: json.loads(body) for name, body in BLOCKS}
Check = Callable[[Any], None]


def bytes_in(value: Any) -> Any:
    """`{"$hex": ...}` is a byte string."""
    if isinstance(value, dict):
        return bytes.fromhex(value["$hex"]) if value.keys() == {"$hex"} else {k: bytes_in(v) for k, v in value.items()}
    return [bytes_in(v) for v in value] if isinstance(value, list) else value


def check_digest(example: Any) -> None:
    value = bytes_in(example["value"])
    assert plain_reader.digest(example["domain"], value) == kvstore.digest.digest(example["domain"], value) == example["sha256"]
    ours = plain_reader.canonical(example["domain"]) + plain_reader.canonical(value)
    assert ours == kvstore.digest.canonical(example["domain"]) + kvstore.digest.canonical(value)
    assert "bytes" not in example or ours.hex() == example["bytes"]


def check_compact(example: Any) -> None:
    assert msgspec.json.encode(example["value"], order="deterministic").hex() == example["bytes"]
    assert plain_reader.compact(example["value"]).encode().hex() == example["bytes"]


def check_weights(example: Any) -> None:
    check_digest(example)
    tensors = {name: (dtype, shape, sha) for name, (dtype, shape, sha) in example["tensors"].items()}
    assert identity.weights_digest(tensors, example["vocab_size"]) == example["sha256"]


def check_model_key(example: Any) -> None:
    check_digest(example)
    assert identity.make_model("any name", **example["value"]).key == example["sha256"] == EXAMPLES["model"]["model"]["key"]


def check_segment_key(example: Any) -> None:
    check_digest(example)
    record = parse(EXAMPLES["model"], ModelRecord, "page")
    kind, before, tokens = example["value"]["context"]
    ids = [i for (i,) in struct.iter_unpack("<I", bytes_in(example["value"]["ids"]))]
    assert identity.segment_key(record.model, record.layout, identity.Context(kind, before, tokens), ids) == example["sha256"]


def check_encoding_id(example: Any) -> None:
    check_digest(example)
    assert parse(example["value"], Encoding, "page").id == example["sha256"] == EXAMPLES["pack"]["encoding_id"]


def check_artifact_id(example: Any) -> None:
    check_digest(example)
    assert example["value"] == [EXAMPLES["segment-key"]["sha256"], EXAMPLES["encoding-id"]["sha256"]]
    assert identity.artifact_id(*example["value"]) == example["sha256"]


def check_rope(examples: Any) -> None:
    for example in examples:
        record, before = parse(example["record"], RopeRecord, "page"), example["before"]
        keys = torch.tensor(before, dtype=torch.bfloat16).view(1, 1, -1)
        assert rotate(keys, torch.tensor([example["position"]]), record).float().flatten().tolist() == example["after"]
        assert plain_rotation(example["record"], example["position"], before) == example["after"]


def plain_rotation(rope: dict[str, Any], position: int, head: list[float]) -> list[float]:
    """As the page says, for bfloat16: each product and sum rounded by itself."""
    f32, half = np.float32, rope["dim"] // 2
    wide = to_bfloat16 if rope["arithmetic"] == "model" else f32
    turn = f32 if rope["arithmetic"] == "float32" else to_bfloat16
    out = list(head)
    for i, frequency in enumerate(np.frombuffer(bytes.fromhex(rope["inv_freq"]), "<f4")):
        a, b = (2 * i, 2 * i + 1) if rope["layout"] == "interleaved" else (i, i + half)
        a, b = a + rope["start"], b + rope["start"]
        angle = f32(position) * frequency
        c, s = (turn(f(angle) * f32(rope["scaling"])) for f in (np.cos, np.sin))
        out[a] = float(to_bfloat16(wide(wide(f32(head[a]) * c) - wide(f32(head[b]) * s))))
        out[b] = float(to_bfloat16(wide(wide(f32(head[b]) * c) + wide(f32(head[a]) * s))))
    return out


def to_bfloat16(x: Any) -> Any:
    bits = int(np.float32(x).view(np.uint32))
    return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)


def check_pack(example: Any) -> None:
    manifest = parse(example, PackManifest, "page")
    assert manifest.encoding_id == manifest.encoding.id
    assert manifest.model == EXAMPLES["model"]["model"]["key"]


def check_tier(example: Any) -> None:
    manifest = parse(EXAMPLES["pack"], PackManifest, "page")
    data = tier_metadata(manifest.encoding.tiers[0], manifest.layout, manifest.encoding, manifest.slots)
    assert json.loads(data) == example
    assert kvstore.digest.sha256(data) == manifest.files["t0/zarr.json"].sha256


def check_state(example: Any) -> None:
    layout = parse({**EXAMPLES["pack"]["layout"], "state": example["layout"]}, Layout, "page")
    tensors = [torch.tensor(values).view(1, *t.shape).to(getattr(torch, t.dtype)) for values, t in zip(example["tensors"], layout.state, strict=True)]
    states = tuple(State(t.layer, t.name, value) for t, value in zip(layout.state, tensors, strict=True))
    data, unit = state_bytes(layout, states), bytes.fromhex(example["unit"])
    assert data is not None and data + struct.pack("<I", plain_reader.crc32c(data)) == unit
    assert all(torch.equal(a.value, b.value) for a, b in zip(states_from(layout, unit[:-4]), states, strict=True))
    assert plain_reader.state_values(example["layout"], unit[:-4]) == example["tensors"]
    assert json.loads(state_metadata(example["segments"], layout)) == example["metadata"]


def check_row(example: Any) -> None:
    row, fields = plain_reader.parse_row(bytes.fromhex(example["row"]), len(example["tiers"])), example["fields"]
    assert (row.key, row.position, row.start, row.tokens) == (fields["key"], fields["position"], fields["start"], fields["tokens"])
    assert ["root", "anchor", "parent"][row.context] == fields["context"]
    assert row.parent == fields["parent"]
    assert [list(r) for r in row.ranges] == [fields[name] for name in example["tiers"]]


def check_exact(example: Any, name: str) -> None:
    kind = np.uint32 if example["dtype"] == "float32" else np.uint16
    bits, record = np.array(example["bits"], kind).reshape(example["shape"]), bytes.fromhex(example["record"])
    out = np.empty_like(bits)
    get_codec(name, 1, {}).decode([record], out)
    assert (out == bits).all()
    assert get_codec(name, 1, {}).encode(bits, example["dtype"]) == [record]
    assert plain_codecs.DECODERS[name]([record], {}, example["dtype"]) == example["bits"]


def check_ans(example: Any) -> None:
    values, weights = (np.array(column) for column in zip(*example["model"], strict=True))
    symbols = example["symbols"]
    assert plain_codecs.ans_decode(example["words"], [list(map(tuple, example["model"]))], len(symbols), len(symbols)) == symbols
    row, table = np.array(symbols, np.int8).view(np.uint8), ans.encode_table(weights, values)[None]
    coded = ans.encode(row, ans.cut(len(symbols), 4096), np.zeros(1, np.uint8), table)
    assert np.frombuffer(coded.content(), "<u4").tolist() == example["words"]


def check_dropped(example: Any) -> None:
    flags = np.array([[[t in gone for t in range(example["tokens"])] for gone in heads] for heads in example["dropped"]])
    assert Mask(flags, np.array(example["profile"], np.uint8)).bytes().hex() == example["section"]


def check_scalar(example: Any) -> None:
    records = [bytes.fromhex(r) for r in example["records"]]
    for count, name in ((1, "standard_float32"), (2, "fine_float32")):
        wanted = np.frombuffer(bytes.fromhex(example[name]), "<f4")
        out = np.empty(example["shape"], np.float32)
        get_codec("scalar", 1, example["params"]).decode(records[:count], out)
        assert out.tobytes() == wanted.tobytes()
        assert plain_codecs.scalar(records[:count], example["params"], "bfloat16") == wanted.tolist()


def check_transform(example: Any) -> None:
    c, tables = example["calibration"], json.loads((SCHEMAS / "scalar-tables.json").read_text(encoding="utf-8"))
    weights = [row + [0] * (128 - len(row)) for row in tables["base"]]
    plain = [
        plain_transform.Calibrated(c["classes"], weights, tables["thirds"], c["tiers"], c["least"], c["step"], c["shrink"], c["mean"], c["rows"])
    ]
    codec, records = get_codec("transform", 1, {}, calibration_of(c, weights, tables["thirds"])), [bytes.fromhex(r) for r in example["records"]]
    assert codec.encode(np.array(example["bits"], np.uint16).reshape(example["shape"]), example["dtype"]) == records
    for count, (levels, values) in enumerate(zip(example["levels"], example["values"], strict=True), 1):
        found = plain_transform.read(records[:count], plain)
        assert (found.group, found.classes, found.levels) == (0, example["sets"], levels)
        out = np.empty(example["shape"], np.float32)
        codec.decode(records[:count], out)
        np.testing.assert_allclose(out.flatten(), values, rtol=1e-6)
        rows = out.transpose(2, 0, 1, 3).reshape(example["shape"][2], -1)
        np.testing.assert_allclose(rows, plain_transform.values(records[:count], plain, example["dtype"]), rtol=1e-6)


def calibration_of(c: Any, weights: list[list[int]], thirds: list[list[int]]) -> Calibration:
    """What the page shows of a calibration of one layer with two channels, its metric the identity."""
    fields = {**EXAMPLES["calibration"], "layers": 1, "kv_heads": 1, "head_dim": 2, "group_layers": 1, "exempt": 50.0, "energy": [4.0]}
    fields |= {"ranks": [len(c["rows"])], "kl": [], **{name: c[name] for name in ("tiers", "least", "step", "shrink")}}
    metric = np.broadcast_to(np.eye(2, dtype=np.float16), (2, 2, 2))
    basis = Basis(
        np.array(c["mean"], np.float32), np.array(c["rows"], np.float16), np.ones(len(c["rows"]), np.float32), metric, np.ones(2, np.float32)
    )
    arrays = (np.array(c["classes"], np.uint8),), np.array(weights, np.uint16), np.array(thirds, np.uint16)
    return Calibration("0" * 64, parse(fields, CalibrationRecord, "page"), (basis,), *arrays)


def check_cachegen(example: Any) -> None:
    bits, record = np.array(example["bits"], np.uint16).reshape(example["shape"]), bytes.fromhex(example["record"])
    codec, out = get_codec("cachegen", 1, example["params"]), np.empty(example["shape"], np.float32)
    assert codec.encode(bits, example["dtype"], example["group"]) == [record]
    codec.decode([record], out)
    assert out.tobytes().hex() == example["float32"]
    assert plain_codecs.cachegen([record], example["params"], example["dtype"]) == out.flatten().tolist()


def check_model(example: Any) -> None:
    record = parse(example, ModelRecord, "page")
    assert record.digest == record.own_digest()
    body = plain_reader.compact({k: v for k, v in example.items() if k != "digest"}).encode()
    assert plain_reader.digest("kvstore/model-record/1", body) == example["digest"]


def check_probe(example: Any) -> None:
    assert list(fingerprint.probe_ids(example["vocab_size"])[: len(example["first_ids"])]) == example["first_ids"]
    state, signs = 1, []
    for _ in example["signs_of_channel_0"]:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        signs.append(1 if state >> 63 else -1)
    assert signs == example["signs_of_channel_0"] == np.sign(fingerprint._signs(4)[0]).tolist()


def check_template(example: Any) -> None:
    record = parse(example, TemplateRecord, "page")
    source = {"kind": record.kind, "text": "", "system": record.system}
    assert plain_reader.digest("kvstore/template-source/1", source) == record.source
    assert plain_reader.digest("kvstore/template/1", example) == record.id


def check_snapshot(example: Any) -> None:
    record = parse(example, Snapshot, "page")
    body = plain_reader.compact({k: v for k, v in example.items() if k != "digest"}).encode()
    assert plain_reader.digest("kvstore/snapshot/1", body) == record.digest == record.own_digest()


def check_chains(example: Any) -> None:
    check_segment_key(example)
    row = parse(example["row"], Row, "page")
    ((chained, passage),) = zip(row.chained, row.passages, strict=True)
    assert (chained.key, chained.passage) == (example["sha256"], 0)
    assert example["value"]["context"] == ["parent", chained.parent, 20 + EXAMPLES["row"]["fields"]["tokens"]]
    assert chained.parent == EXAMPLES["row"]["fields"]["key"] and passage.prefix == EXAMPLES["segment-key"]["sha256"]


def check_tag(example: Any) -> None:
    assert parse(example, Tag, "page").snapshot == example["snapshot"]


def check_quality(example: Any) -> None:
    record = parse(example, QualityReport, "page")
    body = plain_reader.compact({k: v for k, v in example.items() if k != "digest"}).encode()
    assert plain_reader.digest("kvstore/quality/1", body) == record.digest == record.own_digest()
    assert record.encoding == EXAMPLES["encoding-id"]["sha256"]


def check_calibration(example: Any) -> None:
    record = parse(example, CalibrationRecord, "page")
    require_record(record, "page")
    assert kvstore.digest.sha256(zarr_group(record)) in PAGE
    implied = metadata_files(record)
    assert {n: f.sha256 for n, f in record.files.items() if n in implied} == {n: kvstore.digest.sha256(d) for n, d in implied.items()}
    assert {n: f.bytes for n, f in record.files.items() if n not in implied} == {n: a.nbytes for n, a in chunk_files(record).items()}


def check_calibration_array(example: Any) -> None:
    record = parse(EXAMPLES["calibration"], CalibrationRecord, "page")
    assert json.loads(plan(record)["g1/rows"].metadata()) == example


def check_synthesis(example: Any) -> None:
    """As the page says, in float64: c B + mean, and back by F B'."""
    dim, scale = len(example["mean"]), np.array(example["scale"])
    synthesis = np.frombuffer(bytes.fromhex(example["rows_float16"]), "<f2").reshape(-1, dim) * scale[:, None]
    blocks = np.frombuffer(bytes.fromhex(example["metric_float16"]), "<f2").reshape(len(example["metric_scale"]), -1)
    size = dim // len(blocks)
    whole = np.zeros((dim, dim))
    for b, (block, factor) in enumerate(zip(blocks, example["metric_scale"], strict=True)):
        whole[b * size : (b + 1) * size, b * size : (b + 1) * size] = block.reshape(size, size) * factor
    x = np.array(example["mean"]) + np.array(example["coefficients"]) @ synthesis
    np.testing.assert_allclose(x, example["x"], atol=1e-4)
    np.testing.assert_allclose((x - example["mean"]) @ whole @ synthesis.T, example["coefficients_of_x"], atol=2e-3)
    np.testing.assert_allclose(example["coefficients_of_x"], example["coefficients"], atol=5e-3)


def check_current(example: Any) -> None:
    link = parse(example, Current, "page")
    assert link.model == EXAMPLES["calibration"]["model"] and link.previous is not None and link.previous in PAGE


CHECKS: dict[str, Check] = {
    "store": lambda e: None,  # below
    "group": lambda e: None,  # below
    "canonical": check_digest,
    "compact": check_compact,
    "weights": check_weights,
    "model-key": check_model_key,
    "segment-key": check_segment_key,
    "encoding-id": check_encoding_id,
    "artifact-id": check_artifact_id,
    "rope": check_rope,
    "pack": check_pack,
    "tier": check_tier,
    "state": check_state,
    "row": check_row,
    "raw": lambda e: check_exact(e, "raw"),
    "ans": check_ans,
    "lossless": lambda e: check_exact(e, "lossless"),
    "scalar": check_scalar,
    "transform": check_transform,
    "cachegen": check_cachegen,
    "dropped": check_dropped,
    "model": check_model,
    "calibration": check_calibration,
    "calibration-array": check_calibration_array,
    "synthesis": check_synthesis,
    "current": check_current,
    "probe": check_probe,
    "template": check_template,
    "snapshot": check_snapshot,
    "chains": check_chains,
    "tag": check_tag,
    "quality": check_quality,
}


def test_every_example_has_its_check_and_every_check_its_example() -> None:
    assert Counter(name for name, _ in BLOCKS) == Counter(CHECKS.keys())
    assert PAGE.count("```json") == len(BLOCKS)
    assert "@@" not in PAGE


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str) -> None:
    CHECKS[name](EXAMPLES[name])


def test_group_files_are_byte_for_byte_as_shown() -> None:
    bodies = dict(BLOCKS)
    assert zarr_group().decode() == bodies["group"].rstrip("\n")
    record = parse(EXAMPLES["store"]["attributes"]["kvstore"], StoreRecord, "page")
    assert zarr_group(record).decode() == bodies["store"].rstrip("\n")


def test_config_fields_are_those_of_the_code() -> None:
    (listed,) = re.findall(r"^```config-fields\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert listed.split() == identity.KV_FIELDS


def test_every_domain_of_a_stored_key_is_listed() -> None:
    code = "".join(p.read_text(encoding="utf-8") for p in SCHEMAS.parent.joinpath("kvstore").rglob("*.py"))
    used = set(re.findall(r"[\"'](kvstore/[a-z-]+/\d+)[\"']", code))
    local = {"kvstore/file/1", "kvstore/calibration-order/1"}  # names of files in the user's cache; an order to draw samples in
    assert used - local == set(re.findall(r"`(kvstore/[a-z-]+/\d+)`", PAGE))


def test_scalar_tables_are_those_of_the_code() -> None:
    tables = json.loads((SCHEMAS / "scalar-tables.json").read_text(encoding="utf-8"))
    assert tables == {"base": [list(row) for row in table_data.BASE], "thirds": [list(row) for row in table_data.THIRDS]}


def test_crc32c_is_the_one_of_the_page() -> None:
    assert plain_reader.crc32c(b"123456789") == google_crc32c.value(b"123456789") == 0xE3069283
    assert "0xE3069283" in PAGE


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_compact_json_is_what_the_page_says(value: Any) -> None:
    assert plain_reader.compact(value).encode() == msgspec.json.encode(value, order="deterministic")


def test_links_and_anchors_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target[1:] in headings if target.startswith("#") else (SCHEMAS / target).exists(), target
