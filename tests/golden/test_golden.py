"""Stores written by earlier versions stay readable, and the same input still gives the same bytes."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.codecs import codec_class
from kvstore.digest import sha256
from kvstore.identity import artifact_id, id_bytes
from kvstore.index import Index
from kvstore.manifest import Snapshot
from kvstore.pack import Pack
from kvstore.store import Store
from kvstore.tags import list_tags
from kvstore.verify import verify
from tests.golden import make
from tests.golden.expected import SAMPLE, decoded
from tests.golden.values import Bits, bits_for
from tests.plain_reader import PlainPack

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("v[0-9]*"), key=lambda p: int(p.name[1:]))
NEWEST = VERSIONS[-1]
BATCHES = {b.name: b for b in make.batches()}


@pytest.fixture(params=VERSIONS, ids=lambda p: p.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, dict[str, Any]]:
    """A copy of a golden store (reading must not change the original), and what it must contain."""
    shutil.copytree(request.param / "kv.zarr", tmp_path / "kv.zarr")
    expected = json.loads((request.param / "expected.json").read_text(encoding="utf-8"))
    return Store(tmp_path / "kv.zarr", cache=tmp_path / "cache"), expected


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The newest golden input, written by today's code."""
    path = tmp_path_factory.mktemp("fresh") / "kv.zarr"
    return path, make.write_store(path)


def test_artifacts_are_small() -> None:
    for version in VERSIONS:
        assert sum(f.stat().st_size for f in version.rglob("*") if f.is_file()) < 150_000


def test_verifies(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    report = verify(store)
    assert report.ok, report.problems
    assert report.packs == len(expected["packs"])
    assert report.segments == sum(len(p["segments"]) for p in expected["packs"].values())


def test_lists(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    assert store.sources() == ["c.md", "notes/b.md"]
    assert {r.source for r in store.snapshots.rows(1).values()} == {"a.md", "notes/b.md"}
    assert len(store.snapshots.rows(2)) == 3
    assert list_tags(store.storage) == {"first": 1}
    assert sorted(r.model.key for r in store.models()) == expected["models"]
    assert [t.id for t in store.templates()] == [expected["template"]]
    assert store.row("notes/b.md").metadata == {"title": "Grüße", "weight": 1.0}
    assert [p.tokens for p in store.row("notes/b.md").passages] == [16, 5]


def test_decodes_to_the_expected_values(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    for found in expected["packs"].values():
        pack = Pack(store.storage, found["pack"])
        assert (pack.manifest.encoding_id, pack.layout.dtype) == (found["encoding"], found["dtype"])
        for row, wanted in enumerate(found["segments"]):
            check_segment(pack, row, wanted)
            assert store.stored(wanted["key"], found["encoding"]).id == artifact_id(wanted["key"], found["encoding"])


def check_segment(pack: Pack, row: int, wanted: dict[str, Any]) -> None:
    segment = pack.segment(row)
    fields = (segment.key, segment.parent, segment.context, segment.position, segment.tokens)
    assert fields == tuple(wanted[name] for name in ("key", "parent", "context", "position", "tokens"))
    assert {a: list(r) for a, r in segment.ranges.items()} == wanted["ranges"]
    assert sha256(id_bytes(pack.ids(segment).tolist())) == wanted["ids_sha256"]
    for name, digest in wanted["exact_sha256"].items():
        bits = decoded(pack, segment, name)
        assert sha256(bits.astype(bits.dtype.newbyteorder("<")).tobytes()) == digest
    for name, sample in wanted["lossy"].items():
        np.testing.assert_allclose(decoded(pack, segment, name).reshape(-1)[::SAMPLE], sample, rtol=1e-6, atol=0)


def test_exact_tiers_restore_the_input_and_finer_tiers_are_closer(golden: tuple[Store, dict[str, Any]]) -> None:
    store, expected = golden
    for name, found in expected["packs"].items():
        pack = Pack(store.storage, found["pack"])
        for row, piece in enumerate(BATCHES[name].pieces):
            bits = bits_for(pack.layout, piece.ids, plain=piece.plain)
            values = {t.name: decoded(pack, pack.segment(row), t.name) for t in pack.encoding.tiers}
            assert all((values[t.name] == bits).all() for t in pack.encoding.tiers if t.exact)
            if "fine" in values:
                coarse, fine = (np.abs(values[t] - as_float(bits, pack.layout.dtype)).mean() for t in ("standard", "fine"))
                assert fine < coarse / 2


def as_float(bits: Bits, dtype: str) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "float16" else np.float32).astype(np.float32)


def test_a_reader_written_from_the_page_reads_the_same(golden: tuple[Store, dict[str, Any]]) -> None:
    """Bit for bit, lossy tiers too."""
    store, expected = golden
    for found in expected["packs"].values():
        ours, theirs = Pack(store.storage, found["pack"]), PlainPack(store.path / "packs" / found["pack"])
        for row in range(len(ours.rows)):
            segment, plain = ours.segment(row), theirs.rows[row]
            assert theirs.ids(plain) == ours.ids(segment).tolist()
            for tier in ours.encoding.tiers:
                wanted = decoded(ours, segment, tier.name)
                got = np.array(theirs.decode(plain, tier.name), wanted.dtype).reshape(wanted.shape)
                np.testing.assert_array_equal(got.view(np.uint32 if wanted.dtype == np.float32 else wanted.dtype),
                                              wanted.view(np.uint32 if wanted.dtype == np.float32 else wanted.dtype))  # fmt: skip


def test_the_same_input_gives_the_same_bytes(fresh: tuple[Path, dict[str, str]]) -> None:
    """Every file of every pack, model and template. A codec whose bytes change gets a new version, and new golden artifacts."""
    path, packs = fresh
    expected = json.loads((NEWEST / "expected.json").read_text(encoding="utf-8"))
    for name, pack in packs.items():
        assert all(spec.version == codec_class(spec.name).version for spec in BATCHES[name].encoding.codecs)
        compare_packs(path / "packs" / pack, NEWEST / "kv.zarr" / "packs" / expected["packs"][name]["pack"])
    for folder in ("models", ".kvstore/templates", ".kvstore/tags"):
        assert contents(path / folder) == contents(NEWEST / "kv.zarr" / folder)


def compare_packs(ours: Path, theirs: Path) -> None:
    """Byte for byte; where another zlib packs the ids otherwise, the ids, and everything that does not depend on their packing."""
    mine, golden = contents(ours), contents(theirs)
    if mine["tokens/c.0"] != golden["tokens/c.0"]:
        for files in (mine, golden):
            files["tokens/c.0"] = zlib.decompress(files["tokens/c.0"], wbits=31)
            del files["zarr.json"]
    assert mine.keys() == golden.keys()
    assert [name for name in mine if mine[name] != golden[name]] == []


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_changes_give_the_same_snapshots(fresh: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """But for when they were made."""
    ours = Store(fresh[0], cache=tmp_path / "a")
    theirs = Store(shutil.copytree(NEWEST / "kv.zarr", tmp_path / "kv.zarr"), cache=tmp_path / "b")
    assert ours.snapshots.numbers() == theirs.snapshots.numbers() == [1, 2, 3]
    for number in (1, 2, 3):
        mine, golden = ours.snapshots.read(number), theirs.snapshots.read(number)
        assert timeless(mine) == timeless(golden)
    assert ours.snapshots.read(2).removed == ()
    assert [r.source for r in ours.snapshots.read(2).rows] == ["c.md", "notes/b.md"]


def timeless(snapshot: Snapshot) -> tuple[Any, ...]:
    return snapshot.number, snapshot.parent, snapshot.full, snapshot.note, snapshot.rows, snapshot.removed


def test_one_changed_byte_is_found(tmp_path: Path) -> None:
    """In every file outside the packs but the empty lock, and in every file of the pack with most tiers."""
    store = Path(shutil.copytree(NEWEST / "kv.zarr", tmp_path / "kv.zarr"))
    chosen = json.loads((NEWEST / "expected.json").read_text(encoding="utf-8"))["packs"]["scalar-1"]["pack"]
    for file in sorted(p for p in store.rglob("*") if p.is_file() and p.stat().st_size):
        if "packs" in file.parts[:-2] and chosen not in file.parts:
            continue
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[4 if file == store / "zarr.json" else len(intact) // 2] ^= 1  # the middle of the root's is a random id: any is valid
        file.write_bytes(damaged)
        assert not verify(store, workers=1).ok, file
        file.write_bytes(intact)
    assert verify(store).ok


def test_make_never_overwrites(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        make.main(tmp_path)


def test_index_is_rebuilt_from_the_store_alone(golden: tuple[Store, dict[str, Any]], tmp_path: Path) -> None:
    store, expected = golden
    index = Index(store.storage, store.id, tmp_path / "another cache")
    index.refresh()
    assert index.packs() == sorted(p["pack"] for p in expected["packs"].values())
