"""As `test_golden`, for the folders `lossy-v*`: codecs that learn or drop, and what certifies them."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.calibration import shelf
from kvstore.certificates import read_reports
from kvstore.codecs import codec_class
from kvstore.codecs.masked import split
from kvstore.pack import Pack
from kvstore.store import Store
from kvstore.verify import verify
from tests import plain_transform
from tests.golden import learned, make_lossy
from tests.golden.expected import SAMPLE, decoded
from tests.golden.test_golden import as_float, compare_packs, contents, timeless
from tests.plain_reader import PlainCalibration, PlainPack, undropped

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("lossy-v[0-9]*"), key=lambda p: int(p.name[7:]))
NEWEST = VERSIONS[-1]
BATCHES = {b.name: b for b in make_lossy.batches()}
LEARNED = [name for name, batch in BATCHES.items() if batch.calibration is not None]
ROUNDING = 2e-5  # sums of a transform may differ in the last bits; a wrong level is off by a hundred times as much


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda p: p.name)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Any]]:
    """A copy of a golden store (reading must not change the original), and what it must contain."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.copytree(request.param / "kv.zarr", folder / "kv.zarr")
    expected = json.loads((request.param / "expected.json").read_text(encoding="utf-8"))
    return Store(folder / "kv.zarr", cache=folder / "cache"), expected


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The newest golden input, written by today's code."""
    path = tmp_path_factory.mktemp("fresh") / "kv.zarr"
    return path, make_lossy.write_store(path)


def pack_of(golden: tuple[Store, dict[str, Any]], name: str) -> Pack:
    return Pack(golden[0].storage, golden[1]["packs"][name]["pack"])


def plain_of(pack: Pack) -> PlainPack:
    return PlainPack(Path(pack.storage.path(pack.folder)))


def test_artifacts_are_small() -> None:
    for version in VERSIONS:
        assert sum(f.stat().st_size for f in version.rglob("*") if f.is_file()) < 150_000


def test_verifies(golden: tuple[Store, dict[str, Any]]) -> None:
    """A calibration that was current once and is gone is no error."""
    report = verify(golden[0])
    assert report.ok, report.problems
    assert (report.packs, report.calibrations, report.snapshots) == (len(golden[1]["packs"]), 2, 1)
    assert report.segments == sum(len(p["segments"]) for p in golden[1]["packs"].values())


def test_lists(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    first = BATCHES["transform"]
    model, calibration = first.model.model.key, first.encoding.codecs[0].calibration
    assert sorted(r.model.key for r in store.models()) == expected["models"]
    assert [t.id for t in store.templates()] == [expected["template"]]
    assert store.row("a.md").encoding == first.encoding.id
    assert shelf.current(store.storage, model) == calibration
    assert [shelf.read_link(store.storage, model, n).previous for n in (1, 2)] == [None, make_lossy.GONE]
    assert sorted(shelf.list_calibrations(store.storage)) == sorted({BATCHES[n].encoding.codecs[0].calibration for n in LEARNED})
    assert read_reports(store.storage, first.encoding.id) == [make_lossy.report(first)]


@pytest.mark.parametrize("name", BATCHES)
def test_decodes_to_the_expected_values(golden: tuple[Store, dict[str, Any]], name: str) -> None:
    pack, found = pack_of(golden, name), golden[1]["packs"][name]
    assert (pack.manifest.encoding_id, pack.layout.dtype) == (found["encoding"], found["dtype"])
    for row, wanted in enumerate(found["segments"]):
        segment = pack.segment(row)
        assert (segment.key, segment.context, segment.tokens) == (wanted["key"], wanted["context"], wanted["tokens"])
        for tier, sample in wanted["lossy"].items():
            values = decoded(pack, segment, tier).reshape(-1)[::SAMPLE]
            np.testing.assert_allclose(values, np.array(sample, float), rtol=1e-6, atol=ROUNDING * (name in LEARNED))


@pytest.mark.parametrize("name", BATCHES)
def test_a_reader_written_from_the_page_reads_the_same(golden: tuple[Store, dict[str, Any]], name: str) -> None:
    ours = pack_of(golden, name)
    theirs = plain_of(ours)
    for row, plain in enumerate(theirs.rows):
        segment = ours.segment(row)
        assert theirs.ids(plain) == ours.ids(segment).tolist()
        for tier in ours.encoding.tiers:
            wanted = decoded(ours, segment, tier.name)
            found = np.array(theirs.decode(plain, tier.name)).reshape(wanted.shape)
            if name in LEARNED:
                np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=ROUNDING)
            else:
                np.testing.assert_array_equal(found.astype(np.float32), wanted)


@pytest.mark.parametrize("name", LEARNED)
def test_levels_are_those_that_whole_numbers_give(golden: tuple[Store, dict[str, Any]], name: str) -> None:
    """At every tier, of every token that is coded: rounding is done in integers here. Raw tokens hold the model's bits."""
    pack, batch = pack_of(golden, name), BATCHES[name]
    plain, size, block = plain_of(pack), batch.encoding.group_layers, batch.encoding.block_tokens
    calibrations = PlainCalibration.of(plain, plain.encoding["codecs"][0])
    for row, piece in enumerate(batch.pieces):
        values, bits = learned.whole(pack.layout, size, piece.ids), batch.bits(piece)
        if batch.assigned(piece) is not None:  # dropped ones are put on the mean
            values = filled(batch, piece, values)
        stored = [plain.records(plain.rows[row], i) for i in range(len(pack.encoding.tiers))]
        for g, group in enumerate(learned.groups_of(pack.layout, size)):
            for b, start in enumerate(range(0, len(piece.ids), block)):
                unit, _ = undropped([s[g][b] for s in stored], plain.encoding["codecs"][0]["params"])
                cell = slice(g * size, (g + 1) * size), slice(None), slice(start, start + block)
                for count in range(1, len(unit) + 1):
                    read = plain_transform.read(unit[:count], calibrations)
                    check_levels(read, group, values[cell], bits[cell], len(unit) - count)


def filled(batch: make_lossy.Lossy, piece: Any, values: learned.Ints) -> learned.Ints:
    """`values` in 1 / 32 with the mean in place of dropped tokens."""
    assigned, layout = batch.assigned(piece), batch.model.layout
    assert assigned is not None
    gone = assigned.dropped(layout.layers, layout.kv_heads)[0, 0]
    mean = np.concatenate([g.mean.reshape(-1, 2, 1, layout.channels) for g in learned.groups_of(layout, batch.encoding.group_layers)])
    return np.where(gone[:, None], 8 * mean, values)


def check_levels(read: plain_transform.Unit, group: learned.Group, values: learned.Ints, bits: npt.NDArray[Any], above: int) -> None:
    """`above`: tiers that were not read."""
    for t, (name, levels) in enumerate(zip(read.classes, read.levels, strict=True)):
        if name == plain_transform.RAW:
            assert levels == bits[:, :, t].reshape(-1).tolist()
            continue
        wanted = learned.levels(group, values[:, :, t : t + 1], name)[0]
        for _ in range(above):
            wanted = np.sign(wanted) * ((np.abs(wanted) + 1) // 3)
        assert levels == wanted[: len(levels)].tolist()


def test_every_kind_of_token_is_there(golden: tuple[Store, dict[str, Any]]) -> None:
    """Step classes, raw tokens, both lists of sets, escapes at all tiers, a row of two streams."""
    seen, forms, escapes, longest = set[Any](), set[int](), set[int](), 0
    for name in ("transform", "transform-wide", "transform-float32"):
        plain = plain_of(pack_of(golden, name))
        calibrations = PlainCalibration.of(plain, plain.encoding["codecs"][0])
        for row in plain.rows:
            records = [[r for group in plain.records(row, tier) for r in group] for tier in range(len(plain.tiers))]
            forms |= {r[15] & 1 for r in records[0]}
            escapes |= {tier for tier, mine in enumerate(records) if any(int.from_bytes(r[16:20], "little") for r in mine)}
            classes = [plain_transform.read([r], calibrations).classes for r in records[0]]
            seen |= {c for unit in classes for c in unit}
            longest = max(longest, *(unit.count(-1) * len(calibrations[0].at(1, -1)) for unit in classes))
    assert (seen, forms, escapes) == ({0, -1, 1, -2, plain_transform.RAW}, {0, 1}, {0, 1, 2})
    assert longest > 4096


@pytest.mark.parametrize("name", ["transform-dropped", "scalar-dropped"])
def test_dropped_tokens_are_those_that_the_policy_dropped(golden: tuple[Store, dict[str, Any]], name: str) -> None:
    pack, batch = pack_of(golden, name), BATCHES[name]
    assigned, layout = batch.assigned(batch.pieces[0]), pack.layout
    assert assigned is not None
    gone = assigned.dropped(layout.layers, layout.kv_heads)
    segment = pack.segment(0)
    for tier in pack.encoding.tiers:
        values = decoded(pack, segment, tier.name).reshape(layout.layers, 2, segment.tokens, layout.kv_heads, layout.head_dim)
        np.testing.assert_array_equal(np.isnan(values[:, 0]), np.broadcast_to(gone.transpose(0, 2, 1)[..., None], values[:, 0].shape))
        assert not values[:, 1][gone.transpose(0, 2, 1)].any()
        assert np.isfinite(values[:, 1]).all()
    assert 0 < gone.sum() < gone.size
    if assigned.profile is not None:
        plain = plain_of(pack)
        profiles = [split(group[0])[1].profile for group in plain.records(plain.rows[0], 0)]
        np.testing.assert_array_equal(np.concatenate(profiles), assigned.profile)


@pytest.mark.parametrize("name", BATCHES)
def test_finer_tiers_are_closer(golden: tuple[Store, dict[str, Any]], name: str) -> None:
    pack, batch = pack_of(golden, name), BATCHES[name]
    for row, piece in enumerate(batch.pieces):
        wanted = as_float(batch.bits(piece), pack.layout.dtype)
        errors = [np.nanmean(np.abs(decoded(pack, pack.segment(row), t.name)[:, 0] - wanted[:, 0])) for t in pack.encoding.tiers]
        assert all(fine < coarse * 0.6 for coarse, fine in pairwise(errors))
        assert errors[-1] < (0.1 if "cachegen" not in name else 0.25) * np.abs(wanted[:, 0]).mean()


def test_the_same_input_gives_the_same_bytes(fresh: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Every file but what holds a time. A codec whose bytes change gets a new version, and new golden artifacts."""
    path, packs = fresh
    expected = json.loads((NEWEST / "expected.json").read_text(encoding="utf-8"))
    for name, pack in packs.items():
        assert all(spec.version == codec_class(spec.name).version for spec in BATCHES[name].encoding.codecs)
        compare_packs(path / "packs" / pack, NEWEST / "kv.zarr" / "packs" / expected["packs"][name]["pack"])
    for folder in ("calibrations", "models", ".kvstore/templates", ".kvstore/current", ".kvstore/quality"):
        assert contents(path / folder) == contents(NEWEST / "kv.zarr" / folder)
    theirs = Store(shutil.copytree(NEWEST / "kv.zarr", tmp_path / "kv.zarr"), cache=tmp_path / "cache")
    assert timeless(Store(path, cache=tmp_path / "ours").snapshots.read(1)) == timeless(theirs.snapshots.read(1))


def test_one_changed_byte_is_found(tmp_path: Path) -> None:
    """In every file of the calibrations, of the links and of the reports, and in the pack with most sets."""
    store = Path(shutil.copytree(NEWEST / "kv.zarr", tmp_path / "kv.zarr"))
    chosen = json.loads((NEWEST / "expected.json").read_text(encoding="utf-8"))["packs"]["transform-wide"]["pack"]
    folders = ("calibrations", ".kvstore/current", ".kvstore/quality", f"packs/{chosen}")
    for file in sorted(p for folder in folders for p in (store / folder).rglob("*") if p.is_file()):
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[len(intact) // 2] ^= 1
        file.write_bytes(damaged)
        assert not verify(store, workers=1).ok, file
        file.write_bytes(intact)
    assert verify(store).ok


def test_make_never_overwrites(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        make_lossy.main(tmp_path)
