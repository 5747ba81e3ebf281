"""Recurrent states that an earlier version wrote stay readable, and the same input still gives the same bytes."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kvstore.pack import Pack
from kvstore.store import Store
from kvstore.verify import verify
from tests.golden import make_state
from tests.golden.test_golden import check_segment, compare_packs, contents
from tests.plain_reader import PlainPack

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("state-v[0-9]*"), key=lambda p: int(p.name.split("v")[-1]))
PIECES = make_state.batch().pieces


@pytest.fixture(params=VERSIONS, ids=lambda p: p.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, dict[str, Any]]:
    shutil.copytree(request.param / "kv.zarr", tmp_path / "kv.zarr")
    expected = json.loads((request.param / "expected.json").read_text(encoding="utf-8"))
    return Store(tmp_path / "kv.zarr", cache=tmp_path / "cache"), expected["packs"]["state"]


def test_verifies_and_decodes(golden: tuple[Store, dict[str, Any]]) -> None:
    store, found = golden
    pack = Pack(store.storage, found["pack"])
    assert verify(store).ok and pack.layout.state == make_state.STATE
    for row, (piece, wanted) in enumerate(zip(PIECES, found["segments"], strict=True)):
        check_segment(pack, row, wanted)
        assert bytes(pack.state(pack.segment(row))) == make_state.state_of(piece)
    assert store["a.md"].stored[0].state_nbytes == pack.layout.state_nbytes + 4


def test_a_reader_written_from_the_page_and_zarr_read_the_same(golden: tuple[Store, dict[str, Any]]) -> None:
    store, found = golden
    plain = PlainPack(store.path / "packs" / found["pack"])
    array = np.asarray(zarr.open_array(str(plain.folder / "state"), mode="r")[...])
    for row, piece in enumerate(PIECES):
        wanted = make_state.state_of(piece)
        assert array[row].tobytes() == wanted
        values = plain.state(plain.rows[row])
        (small,) = (v for v, t in zip(values, make_state.STATE, strict=True) if t.dtype == "float16")
        np.testing.assert_array_equal(small, struct.unpack("<5e", wanted[-10:]))
        np.testing.assert_array_equal(np.array(values[0], np.float32).view(np.uint32) >> 16, np.frombuffer(wanted[:24], "<u2"))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    name, newest = make_state.write_store(tmp_path / "kv.zarr"), VERSIONS[-1]
    expected = json.loads((newest / "expected.json").read_text(encoding="utf-8"))
    compare_packs(tmp_path / "kv.zarr" / "packs" / name, newest / "kv.zarr" / "packs" / expected["packs"]["state"]["pack"])
    assert contents(tmp_path / "kv.zarr" / "models") == contents(newest / "kv.zarr" / "models")
