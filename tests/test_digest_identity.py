"""Keys: distinct things have distinct keys, equal things equal ones, and a mismatch is named."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.digest import canonical, digest, sha256
from kvstore.errors import IncompatibleError, InputError
from kvstore.identity import (
    KV_FIELDS,
    Context,
    artifact_id,
    difference,
    exact,
    id_bytes,
    kv_config,
    make_model,
    require_same,
    segment_key,
    weights_digest,
)
from kvstore.manifest import CodecSpec, Encoding, Layout, Model, RopeRecord, Tier
from tests.synthetic import ENCODING, LAYOUT, ROPE

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equality that keeps True and 1 apart."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@given(plain, plain)
def test_distinct_values_have_distinct_bytes(a: Any, b: Any) -> None:
    assert (canonical(a) == canonical(b)) is same(a, b)


@given(st.lists(plain, min_size=2, max_size=4))
def test_no_value_is_the_beginning_of_another(values: list[Any]) -> None:
    """So that values written one after the other stay apart."""
    joined = b"".join(map(canonical, values))
    assert joined.startswith(canonical(values[0]))
    assert canonical(values) != canonical(values[:1]) + canonical(values[1:])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (True, 1),
        (False, 0),
        (0, "0"),
        (None, ""),
        (None, []),
        ("", b""),
        ("a", b"a"),
        ([], {}),
        (["ab", "c"], ["a", "bc"]),
        ([["a"], "b"], [["a", "b"]]),
        ({"a": "b"}, ["a", "b"]),
        ({"a": None}, {}),
        ("\ud800", "?"),
        ("\u00e9", "e\u0301"),
        (2**64, -(2**64)),
    ],
)
def test_neighbours_are_kept_apart(a: Any, b: Any) -> None:
    assert digest("test", a) != digest("test", b)


def test_order_of_names_does_not_matter_and_order_of_items_does() -> None:
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    assert canonical([1, 2]) != canonical([2, 1])
    assert canonical([1, 2]) == canonical((1, 2))


@pytest.mark.parametrize("value", [1.0, [0.5], {"a": {"b": float("nan")}}, np.float32(1), np.int64(1), object(), {1, 2}])
def test_what_has_no_canonical_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="no canonical form"):
        canonical(value)


def test_domains_never_meet() -> None:
    assert digest("kvstore/a/1", "x") != digest("kvstore/b/1", "x")
    assert digest("ab", "c") != digest("a", "bc")


def test_known_digests() -> None:
    """What is on disks already must never change."""
    assert digest("kvstore/test/1", {"ids": b"\x01\x00\x00\x00", "n": [1, None, True, "\u00e9"]}) == KNOWN
    assert sha256(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


KNOWN = "f197ea5552a9969ec43cface7fa57bf348d5839ac8497dd8d2c4fffe54d4c142"


# configs


@given(st.integers(-(2**52), 2**52))
def test_whole_floats_equal_their_integers(value: int) -> None:
    assert exact(float(value)) == exact(value)


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_floats_are_kept_apart_exactly(a: float, b: float) -> None:
    assert (exact(a) == exact(b)) is (a == b)
    canonical(exact(a))


def test_config_field_that_is_absent_or_none_does_not_count() -> None:
    config = {"hidden_size": 64, "rope_scaling": None, "rope_theta": 10000.0, "use_cache": True}
    assert kv_config(config) == {"hidden_size": 64, "rope_theta": 10000}
    assert kv_config(config | {"rope_parameters": {"factor": 0.5, "x": None}})["rope_parameters"] == {"factor": (0.5).hex()}


def test_every_listed_field_enters() -> None:
    assert kv_config(dict.fromkeys(KV_FIELDS, 3)) == dict.fromkeys(KV_FIELDS, 3)
    assert len(set(KV_FIELDS)) == len(KV_FIELDS)


# weights

TENSORS = {"model.embed_tokens.weight": ("bfloat16", (100, 8), "aa"), "model.norm.weight": ("bfloat16", (8,), "bb"),
           "lm_head.weight": ("bfloat16", (100, 8), "aa")}  # fmt: skip


def test_tied_table_counts_once_whether_the_checkpoint_holds_it_once_or_twice() -> None:
    once = {k: v for k, v in TENSORS.items() if k != "lm_head.weight"}
    assert weights_digest(TENSORS, 100) == weights_digest(once, 100)
    untied = TENSORS | {"lm_head.weight": ("bfloat16", (100, 8), "cc")}
    assert weights_digest(untied, 100) != weights_digest(once, 100)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("field", range(3))
def test_any_change_of_a_tensor_changes_the_digest(name: str, field: int) -> None:
    changed: Any = tuple(new if i == field else old for i, (old, new) in enumerate(zip(TENSORS[name], ("float16", (4, 2), "ff"), strict=True)))
    assert weights_digest(TENSORS | {name: changed}, 100) != weights_digest(TENSORS, 100)


def test_renamed_tensor_changes_the_digest() -> None:
    renamed = {k.replace("norm", "norm2"): v for k, v in TENSORS.items()}
    assert weights_digest(renamed, 100) != weights_digest(TENSORS, 100)


# models

FIELDS: dict[str, Any] = {"weights": "aa", "config": {"hidden_size": 64, "rope_theta": 10000}, "dtype": "bfloat16", "adapters": (),
                          "quantization": None, "code": None}  # fmt: skip
MODEL = make_model("name", **FIELDS)
OTHER: dict[str, Any] = {"weights": "ab", "config": {"hidden_size": 64, "rope_theta": 10001}, "dtype": "float16", "adapters": ("cc",),
                         "quantization": "int8", "code": "dd"}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_model_changes_its_key_and_is_named(field: str) -> None:
    other = make_model("name", **FIELDS | {field: OTHER[field]})
    assert other.key != MODEL.key
    assert difference(MODEL, other) == ["config.rope_theta" if field == "config" else field]
    with pytest.raises(IncompatibleError, match="rope_theta" if field == "config" else field) as caught:
        require_same(other, [MODEL])
    assert caught.value.exit_status == 4


def test_every_field_of_the_model_was_tried() -> None:
    assert {"key", "name", *FIELDS} == set(Model.__struct_fields__)


def test_name_is_for_display() -> None:
    assert make_model("other name", **FIELDS).key == MODEL.key
    assert difference(make_model("other name", **FIELDS), MODEL) == []


def test_nearest_model_is_the_one_that_is_compared() -> None:
    near = make_model("near", **FIELDS | {"dtype": "float16"})
    far = make_model("far", **OTHER)
    with pytest.raises(IncompatibleError, match=r"near.*different: dtype \(stored float16, given bfloat16\)"):
        require_same(MODEL, [far, near])
    require_same(MODEL, [far, MODEL])
    require_same(MODEL, [])


# segments

BASE: dict[str, Any] = {"model": MODEL, "layout": LAYOUT, "context": Context.anchor([1]), "ids": [5, 6, 7]}


def with_rope(**fields: Any) -> Layout:
    return msgspec.structs.replace(LAYOUT, ropes=(msgspec.structs.replace(ROPE, **fields),))


CHANGED: dict[str, dict[str, Any]] = {
    "model": {"model": make_model("name", **OTHER)},
    "layers": {"layout": msgspec.structs.replace(LAYOUT, layers=4, rope_of=(0, None, 0, 0))},
    "heads": {"layout": msgspec.structs.replace(LAYOUT, kv_heads=4)},
    "head_dim": {"layout": msgspec.structs.replace(LAYOUT, head_dim=16)},
    "dtype": {"layout": msgspec.structs.replace(LAYOUT, dtype="float16")},
    "capture": {"layout": msgspec.structs.replace(LAYOUT, capture="unrotated")},
    "layers without rope": {"layout": msgspec.structs.replace(LAYOUT, rope_of=(0, 0, 0))},
    "rotated channels start": {"layout": with_rope(start=2, dim=6)},
    "rotated channels": {"layout": with_rope(dim=4)},
    "pairs of channels": {"layout": with_rope(layout="interleaved")},
    "no context": {"context": Context.root()},
    "anchor id": {"context": Context.anchor([2])},
    "anchor length": {"context": Context.anchor([1, 1])},
    "a parent": {"context": Context.parent("ab" * 32, 1)},
    "another parent": {"context": Context.parent("cd" * 32, 1)},
    "parent length": {"context": Context.parent("ab" * 32, 2)},
    "id": {"ids": [5, 6, 8]},
    "id order": {"ids": [6, 5, 7]},
    "fewer ids": {"ids": [5, 6]},
    "more ids": {"ids": [5, 6, 7, 0]},
    "latent attention": {"layout": msgspec.structs.replace(LAYOUT, latent=(8, 8))},
    "latent widths": {"layout": msgspec.structs.replace(LAYOUT, latent=(12, 4))},
    "rotated tensor": {"layout": msgspec.structs.replace(LAYOUT, rotated="values")},
    "rope regime": {"layout": msgspec.structs.replace(LAYOUT, rope_regime="short", rope_limit=4096)},
}


def test_everything_that_changes_kv_changes_the_segment_key() -> None:
    keys = {what: segment_key(**BASE | change) for what, change in CHANGED.items()} | {"base": segment_key(**BASE)}
    assert len(set(keys.values())) == len(keys)


def test_every_field_of_the_layout_was_tried() -> None:
    """`ropes` beyond their geometry follow from the config, which the model's key holds."""
    plain = {"layers", "kv_heads", "head_dim", "dtype", "capture", "rope_of", "ropes"}
    assert set(Layout.__struct_fields__) == plain | {"latent", "rotated", "rope_regime", "rope_limit", "state"}
    assert set(msgspec.to_builtins(LAYOUT)) == plain  # files of models without any of the others are what they were
    assert set(RopeRecord.__struct_fields__) == {"start", "dim", "layout", "inv_freq", "scaling", "arithmetic", "kind"}


def test_measured_numbers_stay_out_of_keys() -> None:
    measured = with_rope(inv_freq=np.ones(4, "<f4").tobytes().hex(), scaling=1.25)
    assert segment_key(**BASE | {"layout": measured}) == segment_key(**BASE)
    canonical(LAYOUT.identity())


def test_forms_of_the_same_ids_are_the_same_key() -> None:
    key = segment_key(**BASE)
    assert segment_key(**BASE | {"ids": (5, 6, 7)}) == segment_key(**BASE | {"ids": np.asarray([5, 6, 7])}) == key
    assert Context.anchor([]) == Context.root()
    assert id_bytes([1, 256]) == b"\x01\0\0\0\0\x01\0\0"


@pytest.mark.parametrize("ids", [[-1], [2**32], [2**64], [1.5], np.asarray([-1]), np.asarray([2**32]), np.asarray([1.0])])
def test_ids_that_are_none_are_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="token ids"):
        id_bytes(ids)


# encodings and artifacts

ENCODINGS: dict[str, dict[str, Any]] = {
    "codec": {"codecs": (CodecSpec("other", 1, {"bits": 4}),)},
    "codec version": {"codecs": (CodecSpec("noise", 2, {"bits": 4}),)},
    "parameter": {"codecs": (CodecSpec("noise", 1, {"bits": 3}),)},
    "calibration": {"codecs": (CodecSpec("noise", 1, {"bits": 4}, "ab" * 32),)},
    "tiers": {"tiers": ENCODING.tiers[:1]},
    "tier name": {"tiers": (Tier("rough", "t0", "noise", 0, (), False), *ENCODING.tiers[1:])},
    "block": {"block_tokens": 16},
    "group": {"group_layers": 1},
}


def test_everything_in_an_encoding_changes_its_id() -> None:
    ids = {what: msgspec.structs.replace(ENCODING, **change).id for what, change in ENCODINGS.items()} | {"base": ENCODING.id}
    assert len(set(ids.values())) == len(ids)
    assert set(Encoding.__struct_fields__) == {"codecs", "tiers", "block_tokens", "group_layers"}


def test_artifact_is_a_segment_in_an_encoding() -> None:
    names = {artifact_id(s, e) for s in ("a", "b") for e in ("a", "b")}
    assert len(names) == 4
