"""A store is plain Zarr v3: the library reads what the format promises to it, through the codec of the installed package."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kvstore.errors import NotFoundError
from kvstore.pack import NO_TOKEN, Pack
from kvstore.store import Store
from kvstore.zarr_view import TierStore, as_zarr
from tests.golden.expected import decoded
from tests.plain_reader import parse_row

GOLDEN = max((Path(__file__).parent / "golden").glob("v[0-9]*"), key=lambda p: int(p.name[1:]))
PACKS: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))["packs"]
NAN_BITS = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(shutil.copytree(GOLDEN / "kv.zarr", tmp_path / "kv.zarr"), cache=tmp_path / "cache")


def opened(store: Store, *below: str) -> Any:
    """The store, or a group in it, as any Zarr user opens it (`Any`: zarr's own types are unions of all it might find)."""
    return zarr.open_group(str(store.path.joinpath(*below)), mode="r")


def pack_of(store: Store, name: str) -> Pack:
    return Pack(store.storage, PACKS[name]["pack"])


def whole(pack: Pack, tier: str, dtype: np.dtype[Any], fill: Any) -> np.ndarray[Any, Any]:
    """What a reader of the whole token axis must see: [layers, 2, slots, channels], padding filled."""
    out = np.full((pack.layout.layers, 2, pack.manifest.slots, pack.layout.channels), fill, dtype)
    for segment in map(pack.segment, range(len(pack.rows))):
        out[:, :, segment.start : segment.start + segment.tokens] = decoded(pack, segment, tier)
    return out


def test_the_codec_is_found_through_its_entry_point() -> None:
    (found,) = entry_points(group="zarr.codecs", name="kvstore.unit")
    assert found.load().__module__.startswith("kvstore.codecs")


def test_the_tree_is_a_hierarchy_of_groups_and_arrays(store: Store) -> None:
    root = opened(store)
    assert sorted(root) == ["calibrations", "models", "packs"]
    assert root.attrs["kvstore"] == {"format": 1, "kind": "store", "id": store.id}
    assert sorted(root["packs"]) == sorted(p["pack"] for p in PACKS.values())
    assert all(root["models"][key].attrs["kvstore"]["kind"] == "model" for key in root["models"])


@pytest.mark.parametrize("name", PACKS)
def test_base_tiers_equal_our_own_decode_and_padding_is_nan(store: Store, name: str) -> None:
    pack, group = pack_of(store, name), opened(store)["packs"][PACKS[name]["pack"]]
    for tier in (t for t in pack.encoding.tiers if t.level == 0):
        array = group[tier.array]
        values = array[...]
        if tier.exact:
            np.testing.assert_array_equal(values, whole(pack, tier.name, values.dtype, NAN_BITS[pack.layout.dtype]))
        else:
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, whole(pack, tier.name, values.dtype, np.nan))
            assert np.isnan(values[:, :, ~real_tokens(pack)]).all()


def real_tokens(pack: Pack) -> np.ndarray[Any, Any]:
    return pack.token_ids != NO_TOKEN


def test_every_store_here_has_padding_to_see(store: Store) -> None:
    assert all((~real_tokens(pack_of(store, name))).any() for name in PACKS)


def test_slices_across_units_and_shards_are_right(store: Store) -> None:
    pack = pack_of(store, "scalar-1")
    array = opened(store, "packs", pack.name)["t0"]
    np.testing.assert_array_equal(array[1:3, 1, 10:35, 2::3], whole(pack, "standard", np.dtype(np.float32), np.nan)[1:3, 1, 10:35, 2::3])


def test_a_refinement_alone_says_what_it_is(store: Store) -> None:
    array = opened(store, "packs", PACKS["scalar-1"]["pack"])["t1"]
    with pytest.raises(Exception, match="(?i)refine|tier|level"):
        _ = array[...]


@pytest.mark.parametrize("name", PACKS)
def test_tokens_and_segments_are_ordinary_arrays(store: Store, name: str) -> None:
    pack, group = pack_of(store, name), opened(store, "packs", PACKS[name]["pack"])
    np.testing.assert_array_equal(group["tokens"][...], pack.token_ids)
    rows = [parse_row(bytes(row), len(pack.encoding.tiers)) for row in group["segments"][...]]
    assert [r.key for r in rows] == [s["key"] for s in PACKS[name]["segments"]]
    assert [r.tokens for r in rows] == [s["tokens"] for s in PACKS[name]["segments"]]


def test_the_probe_is_an_ordinary_array(store: Store) -> None:
    for record in store.models():
        array = zarr.open_array(str(store.path / "models" / record.model.key / "probe"), mode="r")
        np.testing.assert_array_equal(array[...], store.probe(record.model.key))


@pytest.mark.parametrize("tier", ["standard", "fine", "lossless", "raw"])
def test_the_view_composes_tiers(store: Store, tier: str) -> None:
    having = {n: p for n, p in PACKS.items() if pack_of(store, n).encoding.tier(tier) is not None}
    view: Any = as_zarr(store, tier)
    assert sorted(view) == sorted(p["pack"] for p in having.values())
    for name, found in having.items():
        pack, values = pack_of(store, name), view[found["pack"]][...]
        exact = tier in ("lossless", "raw")
        fill = NAN_BITS[pack.layout.dtype] if exact else np.nan
        np.testing.assert_array_equal(values, whole(pack, tier, values.dtype, fill))
        assert (values.dtype == np.float32) is not exact


def test_the_view_is_read_only_and_knows_its_tiers(store: Store) -> None:
    array: Any = as_zarr(store, "fine")[PACKS["scalar-1"]["pack"]]
    with pytest.raises(Exception, match="(?i)read.?only"):
        array[0] = 0
    with pytest.raises(NotFoundError, match="no pack .* has a tier 'finest'"):
        as_zarr(store, "finest")


def test_the_view_has_no_chunks_beyond_its_arrays(store: Store) -> None:
    name = PACKS["scalar-1"]["pack"]
    inside = TierStore({name: Pack(store.storage, name)}, "fine")
    asked = ("c.0.0.0.0", "c.2.0.2.0", "c.3.0.0.0", "c.0.0.3.0", "c.-1.0.0.0", "c.0.0", "nothing")
    found = [inside._value(f"{name}/{key}") is not None for key in asked]
    assert found == [True, True, False, False, False, False, False]


def test_the_view_reads_parts(store: Store) -> None:
    name = PACKS["scalar-wide"]["pack"]
    wanted = whole(Pack(store.storage, name), "fine", np.dtype(np.float32), np.nan)
    view: Any = as_zarr(store, "fine")
    np.testing.assert_array_equal(view[name][0, 1, 120:137, 100:], wanted[0, 1, 120:137, 100:])


def test_damage_is_an_error_not_a_value(store: Store) -> None:
    shard = store.path / "packs" / PACKS["scalar-1"]["pack"] / "t0" / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Exception, match="(?i)checksum|crc|damaged"):
        _ = opened(store, "packs", PACKS["scalar-1"]["pack"])["t0"][...]
    view: Any = as_zarr(store, "fine")
    with pytest.raises(Exception, match="(?i)damaged"):
        _ = view[PACKS["scalar-1"]["pack"]][...]
