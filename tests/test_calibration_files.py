"""Calibrations on disk: bytes, damage, races, collection, and who finds them where."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import zarr

from kvstore import codecs
from kvstore.calibration import files, registry, shelf
from kvstore.calibration.checks import group_dims
from kvstore.calibration.record import Calibration
from kvstore.codecs import codec_of, get_codec
from kvstore.codecs.base import Array, Codec, Record, expect
from kvstore.codecs.raw import RawCodec
from kvstore.digest import sha256
from kvstore.errors import FormatError, IntegrityError, KvstoreError, NotFoundError, StorageError
from kvstore.gc import collect
from kvstore.inventory import stats
from kvstore.manifest import CodecSpec, Encoding, Tier, zarr_group
from kvstore.pack import PACKS, Pack
from kvstore.snapshot import Change
from kvstore.store import Store
from kvstore.verify import verify
from tests.plain_reader import PlainCalibration
from tests.synthetic import LAYOUT, MODEL, Document, make_store, make_units, missing, new_writer
from tests.synthetic_calibration import make_calibration, make_values

CALIBRATION = make_calibration(model=MODEL.key)
OTHER = make_calibration(model=MODEL.key, seed=9)
NOW: dict[str, Any] = {"grace_seconds": 0.0, "keep_snapshots": 1}


@pytest.fixture(autouse=True)
def patient_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced when is tested once, below: hundreds of real syncs take most of a minute."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "kv.zarr")


def encoding_with(calibration: Calibration, codec: str = "transform", levels: int = 3) -> Encoding:
    names = ("draft", "standard", "fine")[:levels]
    tiers = tuple(Tier(n, f"t{i}", codec, i, names[:i], False) for i, n in enumerate(names))
    return Encoding((CodecSpec(codec, 1, {}, calibration.digest),), tiers, 8, calibration.record.group_layers)


def build(store: Store, documents: list[Document], encoding: Encoding) -> str | None:
    """One pack and one snapshot, as tests.synthetic builds them."""
    writer = new_writer(store.storage, encoding)
    for task in missing(store, documents, encoding).values():
        writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids), encoding))
    name = writer.close()
    store.commit(Change(tuple(d.row(encoding) for d in documents)), "test")
    return name


def written(folder: Path, calibration: Calibration = CALIBRATION) -> Path:
    """The calibration in a folder named by its digest."""
    (folder / calibration.digest).mkdir(parents=True)
    assert files.write(folder / calibration.digest, calibration) == calibration.digest
    return folder / calibration.digest


def changed(calibration: Calibration = CALIBRATION, **fields: Any) -> Calibration:
    return Calibration("", msgspec.structs.replace(calibration.record, **fields), calibration.bases, calibration.classes, calibration.weights,
                       calibration.thirds)  # fmt: skip


# files


def test_round_trip(tmp_path: Path) -> None:
    found = files.read(written(tmp_path), CALIBRATION.digest)
    assert found.record == CALIBRATION.record and found.digest == CALIBRATION.digest
    for ours, theirs in zip(CALIBRATION.bases, found.bases, strict=True):
        for name in ("mean", "rows", "scale", "metric", "metric_scale"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
            assert not b.flags.writeable
    assert all((a == b).all() for a, b in zip(CALIBRATION.classes, found.classes, strict=True))
    assert (found.weights == CALIBRATION.weights).all() and (found.thirds == CALIBRATION.thirds).all()


def test_equal_calibrations_have_equal_bytes(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a"), written(tmp_path / "b", make_calibration(model=MODEL.key))
    names = sorted(p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file())
    assert [*names] == sorted([*CALIBRATION.record.files, "zarr.json"])
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)
    assert OTHER.digest != CALIBRATION.digest


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_the_name_comes_last_and_after_all_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    folder = written(tmp_path)
    names = [Path(p).relative_to(folder).as_posix() for p in synced]
    assert names[-2:] == ["zarr.json", "."] and set(names[:-2]) == {*CALIBRATION.record.files} | {
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir()
    }
    assert all(names.index(n) < names.index(str(Path(n).parent)) for n in names if Path(n).parent != Path("."))


def test_plain_zarr_reads_every_array(tmp_path: Path) -> None:
    group: Any = zarr.open_group(written(tmp_path), mode="r")
    assert sorted(group) == ["g0", "g1", "mean", "metric", "metric_scale", "thirds", "weights"]
    basis = CALIBRATION.bases[1]
    assert (group["g1/rows"][:] == basis.rows).all() and (group["mean"][2].reshape(-1) == basis.mean).all()
    assert group["metric"].shape == (3, 2, 16, 16) and group["g0/classes"].dtype == np.uint8


def test_the_second_reader_reads_the_same(tmp_path: Path) -> None:
    """Written from the page alone, with the standard library."""
    found = PlainCalibration(written(tmp_path))
    for g, basis in enumerate(CALIBRATION.bases):
        assert found.mean(g) == basis.mean.tolist()
        np.testing.assert_allclose(found.synthesis(g), basis.synthesis(basis.rank), rtol=1e-6)
        assert found.array(f"g{g}/classes")[1] == CALIBRATION.classes[g].tolist()
    assert found.array("weights") == ([49, 128], CALIBRATION.weights.reshape(-1).tolist())
    assert found.array("metric")[0] == [3, 2, 16, 16]


@pytest.mark.parametrize("name", ["zarr.json", *CALIBRATION.record.files])
def test_damage_of_every_file_is_found(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path)
    whole = (folder / name).read_bytes()
    for data in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], whole + b"\0", b""):
        (folder / name).write_bytes(data)
        with pytest.raises(KvstoreError):
            files.read(folder, CALIBRATION.digest)
        assert files.problems(folder, CALIBRATION.digest)
    (folder / name).unlink()
    with pytest.raises((IntegrityError, NotFoundError)):
        files.read(folder, CALIBRATION.digest)
    (folder / name).write_bytes(whole)
    assert files.problems(folder, CALIBRATION.digest) == []


def test_foreign_files_are_found(tmp_path: Path) -> None:
    folder = written(tmp_path)
    (folder / "g0" / "notes.txt").write_text("x")
    assert files.problems(folder, CALIBRATION.digest) == ["g0/notes.txt does not belong to the calibration"]


RECORDS: dict[str, dict[str, Any]] = {
    "a rank beyond the group": {"ranks": (65, 24)},
    "a group too few": {"ranks": (50,)},
    "energies of other groups": {"energy": (1.0,)},
    "an energy of zero": {"energy": (1.0, 0.0)},
    "no step": {"step": 0.0},
    "a negative step": {"step": -1.0},
    "an infinite step": {"step": math.inf},
    "a step that is no number": {"step": math.nan},
    "shrinks of other tiers": {"shrink": (0.1,)},
    "a shrink beyond half": {"shrink": (0.1, 0.1, 0.6)},
    "a negative shrink": {"shrink": (0.1, -0.1, 0.1)},
    "kl of other tiers": {"kl": (0.1,)},
    "a negative kl": {"kl": (0.1, -0.1, 0.1)},
    "no exemption": {"exempt": 0.0},
    "groups longer than the model": {"group_layers": 4, "ranks": (50,), "energy": (1.0,)},
    "too many channels": {"kv_heads": 1 << 14, "head_dim": 1 << 16},
    "a head too wide": {"head_dim": (1 << 16) + 1},
}


@pytest.mark.parametrize("fields", RECORDS.values(), ids=RECORDS.keys())
def test_no_such_record(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Neither written nor read, before any file of it is looked at."""
    with pytest.raises(FormatError):
        files.seal(changed(**fields))
    record = changed(**fields).record
    if all(map(math.isfinite, (record.step, *record.shrink))):  # JSON has no others
        folder = tmp_path / "x"
        folder.mkdir()
        data = zarr_group(record)
        (folder / "zarr.json").write_bytes(data)
        with pytest.raises(FormatError):
            files.read(folder, sha256(data))


@pytest.mark.parametrize("change", ["missing", "extra", "size", "no digest", "path"])
def test_listed_files_must_be_those_that_follow(tmp_path: Path, change: str) -> None:
    listed = dict(CALIBRATION.record.files)
    entry = listed["weights/c.0.0"]
    if change == "missing":
        del listed["weights/c.0.0"]
    elif change == "extra":
        listed["g2/zarr.json"] = entry
    elif change == "path":
        listed["../../x"] = entry
    else:
        listed["weights/c.0.0"] = msgspec.structs.replace(entry, **({"bytes": 1 << 50} if change == "size" else {"sha256": None}))
    folder = written(tmp_path)
    data = zarr_group(msgspec.structs.replace(CALIBRATION.record, files=listed))
    (folder / "zarr.json").write_bytes(data)
    with pytest.raises(FormatError, match="files|entry"):
        files.read(folder, sha256(data))


def with_array(name: str, at: Any, value: float, group: int = 0) -> Callable[[], Calibration]:
    """A copy in which one value of an array is another."""

    def make() -> Calibration:
        c = CALIBRATION
        bases, classes, tables = list(c.bases), list(c.classes), {"weights": c.weights, "thirds": c.thirds}
        if name in tables:
            tables[name] = tables[name].copy()
            tables[name][at] = value
        elif name == "classes":
            classes[group] = classes[group].copy()
            classes[group][at] = value
        else:
            array = getattr(bases[group], name).copy()
            array[at] = value
            parts = {n: getattr(bases[group], n) for n in ("mean", "rows", "scale", "metric", "metric_scale")} | {name: array}
            bases[group] = type(bases[group])(**parts)
        return Calibration("", c.record, tuple(bases), tuple(classes), tables["weights"], tables["thirds"])

    return make


ARRAYS = {
    "mean": with_array("mean", 3, math.nan),
    "mean-infinite": with_array("mean", 3, -math.inf, 1),
    "rows": with_array("rows", (49, 63), math.inf),
    "metric": with_array("metric", (3, 1, 2), math.nan),
    "metric-negative": with_array("metric", (3, 1, 1), -1.0),
    "metric_scale": with_array("metric_scale", 1, 0.0),
    "scale-zero": with_array("scale", 5, 0.0),
    "scale-negative": with_array("scale", 5, -1.0),
    "scale-nan": with_array("scale", 5, math.nan),
    "scale-huge": with_array("scale", 5, 1e31),
    "classes": with_array("classes", 49, 200),
    "weights-sum": with_array("weights", (30, 0), 5),
    "weights-gap": with_array("weights", (30, 100), 1),
    "weights-one-symbol": with_array("weights", (0, slice(None)), 0),
    "thirds-zero": with_array("thirds", (7, 1), 0),
    "thirds-outer": with_array("thirds", (7, 0), 2048),
    "thirds-sum": with_array("thirds", (7, 2), 4095),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS.keys())
def test_no_such_array(tmp_path: Path, make: Callable[[], Calibration], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not written; and not read where somebody else wrote it with digests that match."""
    with pytest.raises(IntegrityError):
        files.seal(make())
    with monkeypatch.context() as patch:
        patch.setattr(files, "require_arrays", lambda *_: None)
        folder = tmp_path / "x"
        folder.mkdir()
        digest = files.write(folder, make())
    with pytest.raises(IntegrityError):
        files.read(folder, digest)


def test_synthetic_calibrations_are_what_they_say() -> None:
    """The covariance of the coefficients is diagonal, in steps as their classes say; the transform inverts."""
    values = make_values(4000)
    assert [b.dim for b in CALIBRATION.bases] == group_dims(CALIBRATION.record) == [64, 32]
    for g, basis in enumerate(CALIBRATION.bases):
        x = values[CALIBRATION.group_layers(g).start : CALIBRATION.group_layers(g).stop].transpose(2, 0, 1, 3).reshape(4000, -1)
        c = (x - basis.mean) @ basis.analysis()
        sigma = CALIBRATION.record.step * 3 ** ((CALIBRATION.classes[g].astype(float) - 24) / 8)
        np.testing.assert_allclose(c.std(0), sigma, rtol=0.15)
        assert np.abs(np.corrcoef(c.T) - np.eye(basis.rank)).max() < 0.1
        np.testing.assert_allclose(basis.synthesis(basis.rank) @ basis.analysis(), np.eye(basis.rank), atol=0.02)
    assert make_calibration(layers=5, group_layers=4, rank=7, tiers=1).record.ranks == (7, 7)


# the registry


def test_registry_finds_in_folders_and_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a")
    written(tmp_path / "b", OTHER)
    found = registry.Registry()
    with pytest.raises(FormatError, match=r"kvstore\.open.*KVSTORE_CALIBRATIONS"):
        found.find(CALIBRATION.digest)
    found.register(tmp_path / "a")
    assert found.find(CALIBRATION.digest) is found.find(CALIBRATION.digest)
    monkeypatch.setenv("KVSTORE_CALIBRATIONS", os.pathsep.join([str(tmp_path / "nowhere"), str(tmp_path / "b")]))
    assert found.find(OTHER.digest).record == OTHER.record


def test_registry_takes_an_intact_copy_and_else_says_what_is_damaged(tmp_path: Path) -> None:
    one, two = written(tmp_path / "a"), written(tmp_path / "b")
    (one / "mean" / "c.0.0.0").write_bytes(b"")
    found = registry.Registry()
    found.register(tmp_path / "a")
    with pytest.raises(IntegrityError, match="mean"):
        found.find(CALIBRATION.digest)
    found.register(tmp_path / "b")
    assert found.find(CALIBRATION.digest).digest == CALIBRATION.digest
    assert two.exists()


@pytest.mark.parametrize("name", ["", "..", "../a", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_registry_forms_no_path_from_what_is_no_digest(name: str) -> None:
    with pytest.raises(FormatError, match="names no calibration"):
        registry.find(name)


def test_registry_loads_once_for_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []

    def read(folder: Path, digest: str) -> Calibration:
        loads.append(digest)
        return files.read(folder, digest)

    monkeypatch.setattr(registry, "read", read)
    written(tmp_path)
    found = registry.Registry()
    found.register(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert len({id(c) for c in pool.map(found.find, [CALIBRATION.digest] * 32)}) == 1
    assert loads == [CALIBRATION.digest]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_not_locked_out(tmp_path: Path) -> None:
    """A thread of the parent holds the registry's lock at the fork."""
    written(tmp_path)
    found = registry.Registry()
    found.register(tmp_path)
    with found._lock():
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = int(found.find(CALIBRATION.digest).digest != CALIBRATION.digest)
            finally:  # a child that goes on would run the tests after this one
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0


# codecs


class StepsCodec(Codec):
    """A stand-in for a calibrated codec: levels of plain rounding by the calibration's step, base 16 * step, then the rest."""

    name: ClassVar[str] = "steps"
    exact: ClassVar[bool] = False
    n_tiers: ClassVar[int] = 2
    needs_calibration: ClassVar[bool] = True

    def __init__(self, params: Any, calibration: Calibration | None = None):
        super().__init__(params, calibration)
        assert calibration is not None
        self.step = calibration.record.step

    def encode(self, bits: Array, dtype: str, group: int = 0) -> list[bytes]:
        raise NotImplementedError

    def decode(self, records: list[Record], out: Array) -> None:  # type: ignore[override]
        header = expect(records, out, 2)
        parts = [np.frombuffer(r, "<i4", offset=12).reshape(header.shape) for r in records]
        out[...] = self.step * (16 * parts[0] + (parts[1] if len(parts) > 1 else 0))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "REGISTRY", {**codecs.REGISTRY, "steps": "tests.test_calibration_files:StepsCodec"})
    monkeypatch.setitem(sys.modules, "tests.test_calibration_files", sys.modules[__name__])


def test_calibrated_codecs_are_those_whose_classes_say_so() -> None:
    assert {n for n in codecs.NAMES if codecs.codec_class(n).needs_calibration} == codecs.CALIBRATED & set(codecs.NAMES)


def test_a_codec_without_calibration_refuses_one_and_the_other_way_round(steps: None) -> None:
    with pytest.raises(FormatError, match="takes no calibration"):
        get_codec("raw", 1, {}, CALIBRATION)
    with pytest.raises(FormatError, match="needs a calibration"):
        get_codec("steps", 1, {})
    assert isinstance(get_codec("steps", 1, {}, CALIBRATION), StepsCodec)
    assert isinstance(codec_of(CodecSpec("raw", 1, {}), encoding_with(CALIBRATION, "raw", 1), LAYOUT), RawCodec)


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (make_calibration(layers=2), "layers"),
        (make_calibration(head_dim=4), "layers"),
        (make_calibration(kv_heads=1), "layers"),
        (make_calibration(group_layers=3), "groups of 3"),
        (make_calibration(tiers=1), "has 1 tiers"),
    ],
    ids=["layers", "head_dim", "kv_heads", "groups", "tiers"],
)
def test_a_calibration_must_fit_encoding_and_layout(steps: None, calibration: Calibration, match: str) -> None:
    registry.add(calibration)
    registry.add(CALIBRATION)
    encoding = encoding_with(CALIBRATION, "steps", 2)
    assert isinstance(codec_of(encoding.codecs[0], encoding, LAYOUT), StepsCodec)
    with pytest.raises(FormatError, match=match):
        codec_of(msgspec.structs.replace(encoding.codecs[0], calibration=calibration.digest), encoding, LAYOUT)


def test_manifests_name_a_calibration_where_one_is_needed(store: Store) -> None:
    """A pack must name one for a codec that needs it, and none for one that has none; an unknown codec is another version's business."""
    name, encoding = calibrated(store), encoding_with(CALIBRATION)
    assert Pack(store.storage, name).encoding == encoding
    for codec, digest, good in (("transform", None, False), ("raw", CALIBRATION.digest, False), ("newer", CALIBRATION.digest, True)):
        tiers = tuple(msgspec.structs.replace(t, codec=codec) for t in encoding.tiers)
        other = msgspec.structs.replace(encoding, codecs=(CodecSpec(codec, 1, {}, digest),), tiers=tiers)
        writer = new_writer(store.storage, other)
        for task in Document("b.md").tasks():
            writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids), other))
        pack = writer.close()
        assert pack is not None
        if good:
            assert Pack(store.storage, pack).encoding == other
        else:
            with pytest.raises(FormatError, match="calibration"):
                Pack(store.storage, pack)


@pytest.fixture
def stepped(store: Store, steps: None) -> tuple[Store, np.ndarray[Any, Any]]:
    """A store with one segment in the codec `steps`; and its levels [tiers, layers, 2, tokens, channels]."""
    shelf.publish(store.storage, CALIBRATION)
    encoding, (task, *_) = encoding_with(CALIBRATION, "steps", 2), Document("a.md").tasks()
    levels = np.random.default_rng(3).integers(-8, 8, (2, 3, 2, len(task.ids), LAYOUT.channels)).astype("<i4")
    writer = new_writer(store.storage, encoding)
    units = {f"t{i}": [[record(part[:2], i)], [record(part[2:], i)]] for i, part in enumerate(levels)}
    writer.add(task.key, task.context, task.ids, units)
    assert writer.close() is not None
    store.refresh()
    return store, levels


def record(levels: Array, level: int) -> bytes:
    layers, _, tokens, channels = levels.shape
    return np.array([tokens, layers | level << 16, channels], "<u4").tobytes() + levels.tobytes()


@pytest.mark.parametrize("tier", ["draft", "standard"])
def test_the_view_composes_calibrated_tiers(stepped: tuple[Store, Array], tier: str) -> None:
    from kvstore.zarr_view import as_zarr

    store, levels = stepped
    (name,) = store.index.packs()
    group: Any = as_zarr(store, tier)
    found = group[name][:]
    wanted = 0.25 * (16 * levels[0] + (levels[1] if tier == "standard" else 0))
    tokens = levels.shape[3]
    assert (found[:, :, :tokens] == wanted).all() and np.isnan(found[:, :, tokens:]).all()


def test_plain_zarr_decodes_tier_zero_where_it_finds_the_calibration(stepped: tuple[Store, Array], monkeypatch: pytest.MonkeyPatch) -> None:
    store, levels = stepped
    (name,) = store.index.packs()
    array: Any = zarr.open_array(store.path / PACKS / name / "t0", mode="r")
    monkeypatch.setattr(registry, "find", registry.Registry().find)  # a process that has not opened the store
    with pytest.raises(FormatError, match=r"kvstore\.open.*KVSTORE_CALIBRATIONS"):
        _ = array[:]
    monkeypatch.setenv("KVSTORE_CALIBRATIONS", str(store.path / "calibrations"))
    assert (array[:, :, : levels.shape[3]] == 4.0 * levels[0]).all()


def test_plain_zarr_decodes_the_transform_codec_in_another_process(store: Store) -> None:
    from kvstore.zarr_view import as_zarr

    shelf.publish(store.storage, CALIBRATION)
    encoding, (task, *_) = encoding_with(CALIBRATION), Document("a.md").tasks()
    codec, values = codec_of(encoding.codecs[0], encoding, LAYOUT), make_values(len(task.ids))
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    groups = [codec.encode(np.ascontiguousarray(part), "bfloat16", g) for g, part in enumerate((bits[:2], bits[2:]))]
    writer = new_writer(store.storage, encoding)
    writer.add(task.key, task.context, task.ids, {f"t{i}": [[records[i]] for records in groups] for i in range(3)})
    name = writer.close()
    store.refresh()
    views: list[Any] = [as_zarr(store, tier) for tier in ("draft", "fine")]
    draft, fine = (view[name][:] for view in views)
    errors = [float(np.abs(found[:, :, : len(task.ids)] - values).mean()) for found in (draft, fine)]
    assert errors[1] < errors[0] < float(np.abs(values).mean())
    code = f"import zarr, sys; sys.stdout.buffer.write(zarr.open_array({str(store.path / PACKS / str(name) / 't0')!r}, mode='r')[:].tobytes())"
    for folders, good in ((str(store.path / "calibrations"), True), ("", False)):
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "KVSTORE_CALIBRATIONS": folders}, capture_output=True, timeout=120,
                              check=False)  # fmt: skip
        assert (done.stdout == draft.tobytes()) is good
        assert good or b"KVSTORE_CALIBRATIONS" in done.stderr


def test_plain_zarr_refuses_a_calibration_of_other_chunks(stepped: tuple[Store, Array]) -> None:
    from kvstore.codecs.zarr_adapter import UnitCodec

    _, levels = stepped
    registry.find(CALIBRATION.digest)
    codec = UnitCodec("steps", 1, (), 0, "bfloat16", CALIBRATION.digest)
    data = memoryview(record(levels[0, :2], 0))
    assert codec.decode_record(data, (2, 2, 8, 16), np.dtype("f4")).shape == (2, 2, 8, 16)
    for shape in ((3, 2, 8, 16), (2, 2, 8, 32), (2, 3, 8, 16)):
        with pytest.raises(FormatError, match="is for"):
            codec.decode_record(data, shape, np.dtype("f4"))


# the shelf


def test_publishing_twice_is_publishing_once(store: Store) -> None:
    assert shelf.publish(store.storage, CALIBRATION) == CALIBRATION.digest == shelf.publish(store.storage, CALIBRATION)
    assert shelf.list_calibrations(store.storage) == [CALIBRATION.digest]
    assert store.calibrations() == {CALIBRATION.digest: CALIBRATION.record}
    assert store.calibration(CALIBRATION.digest).record == CALIBRATION.record
    assert not list((store.path / ".kvstore" / "tmp").iterdir())
    with pytest.raises(NotFoundError):
        store.calibration(OTHER.digest)


def test_publishing_mends_a_damaged_one(store: Store) -> None:
    shelf.publish(store.storage, CALIBRATION)
    path = store.path / "calibrations" / CALIBRATION.digest / "g0" / "rows" / "c.0.0"
    path.write_bytes(b"x")
    shelf.publish(store.storage, CALIBRATION)
    assert files.problems(path.parents[2], CALIBRATION.digest) == []


def test_what_no_reader_takes_is_not_published(store: Store) -> None:
    with pytest.raises(IntegrityError):
        shelf.publish(store.storage, ARRAYS["mean"]())
    assert shelf.list_calibrations(store.storage) == [] and not list((store.path / ".kvstore" / "tmp").iterdir())


def test_the_first_link_wins_unless_it_is_replaced(store: Store) -> None:
    for c in (CALIBRATION, OTHER):
        shelf.publish(store.storage, c)
    assert store.current_calibration(MODEL.key) is None
    assert shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest) == CALIBRATION.digest
    assert shelf.set_current(store.storage, MODEL.key, OTHER.digest) == CALIBRATION.digest
    assert shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest) == CALIBRATION.digest
    assert shelf.numbers(store.storage, MODEL.key) == [1]
    assert shelf.set_current(store.storage, MODEL.key, OTHER.digest, replacing=CALIBRATION.digest) == OTHER.digest
    assert shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest, replacing=CALIBRATION.digest) == OTHER.digest
    assert store.current_calibration(MODEL.key) == OTHER.digest
    assert shelf.read_link(store.storage, MODEL.key, 2).previous == CALIBRATION.digest
    assert verify(store).ok


def test_a_link_to_what_is_gone_does_not_win(store: Store) -> None:
    for c in (CALIBRATION, OTHER):
        shelf.publish(store.storage, c)
    shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest)
    shutil.rmtree(store.path / "calibrations" / CALIBRATION.digest)
    assert store.current_calibration(MODEL.key) is None
    assert shelf.set_current(store.storage, MODEL.key, OTHER.digest) == OTHER.digest


def test_only_a_stored_calibration_of_that_model_becomes_current(store: Store) -> None:
    with pytest.raises(StorageError) as caught:
        shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest)
    assert caught.value.code == "collected"
    stranger = make_calibration(model="5" * 64)
    shelf.publish(store.storage, stranger)
    with pytest.raises(FormatError, match="for model"):
        shelf.set_current(store.storage, MODEL.key, stranger.digest)
    assert shelf.models(store.storage) == []


def test_of_many_first_links_one_wins(store: Store) -> None:
    made = [make_calibration(layers=1, kv_heads=1, head_dim=4, group_layers=1, model=MODEL.key, seed=s) for s in range(6)]
    for c in made:
        shelf.publish(store.storage, c)
    gate = threading.Barrier(len(made))

    def race(digest: str) -> str:
        gate.wait()
        return shelf.set_current(store.storage, MODEL.key, digest)

    with ThreadPoolExecutor(len(made)) as pool:
        winners = set(pool.map(race, [c.digest for c in made]))
    assert len(winners) == 1 and shelf.numbers(store.storage, MODEL.key) == [1]


def test_of_many_replacements_one_wins(store: Store) -> None:
    made = [make_calibration(layers=1, kv_heads=1, head_dim=4, group_layers=1, model=MODEL.key, seed=s) for s in range(6)]
    for c in made:
        shelf.publish(store.storage, c)
    first = shelf.set_current(store.storage, MODEL.key, made[0].digest)
    with ThreadPoolExecutor(5) as pool:
        winners = set(pool.map(lambda c: shelf.set_current(store.storage, MODEL.key, c.digest, replacing=first), made[1:]))
    assert len(winners) == 1 and winners != {first} and shelf.numbers(store.storage, MODEL.key) == [1, 2]


def test_a_killed_publication_leaves_nothing_that_is_seen(store: Store, tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.append({str(Path(__file__).resolve().parent.parent)!r})
from pathlib import Path
from kvstore.calibration import files, shelf
from kvstore.storage.local import LocalStorage
from tests.synthetic_calibration import make_calibration
files.sync_folder = lambda path: os._exit(9)
shelf.publish(LocalStorage(Path({str(store.path)!r})), make_calibration())
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 9
    assert shelf.list_calibrations(store.storage) == [] and verify(store).ok
    assert collect(store, **NOW).leftovers_removed == 1


# verify


def calibrated(store: Store) -> str:
    """A store with a calibration that is current and that a pack names; the pack's name."""
    shelf.publish(store.storage, CALIBRATION)
    shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest)
    name = build(store, [Document("a.md")], encoding_with(CALIBRATION))
    assert name is not None
    return name


def where_and_what(store: Store) -> list[tuple[str, str]]:
    return [(p.where, p.what) for p in verify(store).problems]


def test_verify_reads_calibrations_and_links(store: Store) -> None:
    calibrated(store)
    report = verify(store)
    assert report.ok and report.problems == [] and report.calibrations == 1


def test_verify_finds_damage_and_who_needs_it(store: Store) -> None:
    name, folder = calibrated(store), f"calibrations/{CALIBRATION.digest}"
    (store.path / folder / "thirds" / "c.0.0").write_bytes(b"\0" * 294)
    found = dict(where_and_what(store))
    assert found.keys() == {folder, f".kvstore/current/{MODEL.key}/000001.json", f"packs/{name}"}
    assert "thirds/c.0.0 does not match its sha256" in found[folder] and "missing or damaged" in found[f"packs/{name}"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda f: f.rename(f.with_name("000002.json")), "number 1"),
        (lambda f: f.write_bytes(b"{"), "not JSON"),
        (lambda f: f.write_text(f.read_text().replace(CALIBRATION.digest, "ab" * 32)), "missing or damaged"),
        (lambda f: f.write_text(f.read_text().replace('"number"', '"nr"')), "nr"),
        (lambda f: f.with_name("notes.txt").write_text("x"), "is not a link"),
        (lambda f: f.parents[1].joinpath("x").mkdir(), "is not a model's"),
    ],
    ids=["renamed", "cut", "foreign-calibration", "field", "foreign-file", "foreign-folder"],
)
def test_verify_finds_what_is_wrong_with_a_link(store: Store, change: Callable[[Path], Any], what: str) -> None:
    calibrated(store)
    change(store.path / shelf.link_name(MODEL.key, 1))
    (problem,) = where_and_what(store)
    assert what in problem[1] and problem[0].startswith(".kvstore/current")


def test_verify_follows_the_chain_of_links(store: Store) -> None:
    for c in (CALIBRATION, OTHER):
        shelf.publish(store.storage, c)
    shelf.set_current(store.storage, MODEL.key, CALIBRATION.digest)
    shelf.set_current(store.storage, MODEL.key, OTHER.digest, replacing=CALIBRATION.digest)
    path = store.path / shelf.link_name(MODEL.key, 2)
    path.write_text(json.dumps({**json.loads(path.read_text()), "previous": "ab" * 32}))
    assert where_and_what(store) == [(shelf.link_name(MODEL.key, 2), "does not follow from the link before it")]


def test_verify_compares_packs_with_their_calibrations(store: Store) -> None:
    stranger, thin = make_calibration(model="5" * 64), make_calibration(model=MODEL.key, tiers=2)
    for c in (stranger, thin):
        shelf.publish(store.storage, c)
        build(store, [Document("a.md")], encoding_with(c))
    problems = sorted(what for _, what in where_and_what(store))
    assert len(problems) == 2
    assert any("for another model" in p for p in problems) and any("has 2 tiers" in p for p in problems)


# gc


def aged(store: Store, seconds: float = 7200.0) -> None:
    for folder in ("calibrations", "packs"):
        for path in (store.path / folder).iterdir():
            old = path.stat().st_mtime - seconds
            os.utime(path, (old, old))


def test_gc_keeps_what_packs_and_the_newest_link_name(store: Store) -> None:
    calibrated(store)
    third = make_calibration(model=MODEL.key, seed=77)
    for c in (OTHER, third):
        shelf.publish(store.storage, c)
    shelf.set_current(store.storage, MODEL.key, OTHER.digest, replacing=CALIBRATION.digest)
    dry = collect(store, **NOW, dry_run=True)
    report = collect(store, **NOW)
    assert dry.calibrations_removed == report.calibrations_removed == [third.digest] and report.calibrations_kept == 2
    assert dry.bytes_freed == report.bytes_freed >= 1000
    assert set(store.calibrations()) == {CALIBRATION.digest, OTHER.digest} and verify(store).ok


def test_gc_collects_with_the_last_pack(store: Store) -> None:
    """Once another is current, and no pack is left; the old link is no error."""
    calibrated(store)
    shelf.publish(store.storage, OTHER)
    shelf.set_current(store.storage, MODEL.key, OTHER.digest, replacing=CALIBRATION.digest)
    store.commit(Change(removed=(Document("a.md").row(encoding_with(CALIBRATION)).id,)), "rm")
    dry = collect(store, **NOW, dry_run=True)
    assert dry.calibrations_removed == [CALIBRATION.digest] and set(store.calibrations()) == {CALIBRATION.digest, OTHER.digest}
    assert collect(store, **NOW).calibrations_removed == [CALIBRATION.digest]
    report = verify(store)
    assert report.ok and shelf.link_name(MODEL.key, 1) in [p.where for p in report.problems if p.severity == "notice"]
    assert any("no longer stored" in p.what for p in report.problems)


def test_gc_waits_for_the_grace_period(store: Store) -> None:
    calibrated(store)
    shelf.publish(store.storage, OTHER)
    assert collect(store, grace_seconds=3600, keep_snapshots=1).calibrations_removed == []
    aged(store)
    assert collect(store, grace_seconds=3600, keep_snapshots=1).calibrations_removed == [OTHER.digest]


def test_a_writer_keeps_its_calibration_young(store: Store) -> None:
    calibrated(store)
    shelf.publish(store.storage, OTHER)
    aged(store)
    encoding, (task, *_) = encoding_with(OTHER), Document("b.md").tasks()
    writer = new_writer(store.storage, encoding)
    writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids), encoding))
    assert collect(store, grace_seconds=3600, keep_snapshots=1).calibrations_removed == []
    writer.abandon()


def test_no_snapshot_names_packs_whose_calibration_is_gone(store: Store) -> None:
    encoding = encoding_with(OTHER)
    shelf.publish(store.storage, OTHER)
    build(store, [Document("a.md")], encoding)
    shutil.rmtree(store.path / "calibrations" / OTHER.digest)
    with pytest.raises(StorageError) as caught:
        build(store, [Document("b.md")], encoding)
    assert caught.value.code == "collected"


def test_gc_keeps_all_where_it_cannot_know(store: Store) -> None:
    """A damaged pack or link may name any of them."""
    name = calibrated(store)
    shelf.publish(store.storage, OTHER)
    link, manifest = store.path / shelf.link_name(MODEL.key, 1), store.path / "packs" / name / "zarr.json"
    for path in (link, manifest):
        whole = path.read_bytes()
        path.write_bytes(whole + b"x")
        report = collect(store, **NOW)
        assert report.calibrations_removed == [] and report.calibrations_kept == 2
        assert any(d.startswith("calibrations stay") for d in report.damaged)
        path.write_bytes(whole)
    assert collect(store, **NOW).calibrations_removed == [OTHER.digest]


def test_gc_keeps_all_where_there_is_no_snapshot(store: Store) -> None:
    """A copy may have left out the hidden folder, and with it the links."""
    shelf.publish(store.storage, CALIBRATION)
    assert collect(store, **NOW).calibrations_removed == []


def test_gc_drops_a_damaged_one_and_what_is_coded_with_it(store: Store) -> None:
    name = calibrated(store)
    (store.path / "calibrations" / CALIBRATION.digest / "mean" / "c.0.0.0").write_bytes(b"")
    assert collect(store, **NOW).calibrations_removed == []
    report = collect(store, **NOW, drop_damaged=True)
    assert report.packs_removed == [name] and report.calibrations_removed == [CALIBRATION.digest]
    assert any("its calibration" in d for d in report.damaged)
    assert store.current_calibration(MODEL.key) is None


# what is shown


def test_stats_count_every_byte_of_a_calibration(store: Store) -> None:
    calibrated(store)
    found, folder = stats(store), store.path / "calibrations" / CALIBRATION.digest
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    (total,) = found.calibrations
    assert (total.digest, total.metric, total.tokens, total.nbytes, total.current) == (CALIBRATION.digest, "fisher", 1000, size, True)
    assert found.overhead["calibrations"] == size
    assert found.nbytes == sum(p.stat().st_size for p in store.path.rglob("*") if p.is_file())
