"""Writes a golden store of a model with recurrent states: `python -m tests.golden.make_state tests/golden/state-vN`. Refuses where it exists."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np

from kvstore.manifest import Layout, Passage, StateTensor
from kvstore.pack_writer import PackWriter
from kvstore.records import add_model, add_template, create
from kvstore.snapshot import Change
from kvstore.store import Store
from tests.golden.expected import expected, lines
from tests.golden.make import PROVENANCE, Batch, Piece, _family, encoding_of, layout_of, model_record, probe_of, row_of, template, units_of
from tests.golden.values import mixed

STATE = (
    StateTensor(0, "conv0", (3, 4), "bfloat16"),
    StateTensor(2, "conv0", (3, 4), "bfloat16"),
    StateTensor(2, "recurrent0", (2, 2, 3), "float32"),
    StateTensor(2, "recurrent1", (5,), "float16"),
)


def layout() -> Layout:
    return msgspec.structs.replace(layout_of("bfloat16"), state=STATE)


def batch() -> Batch:
    """A head, a document after it, and one after that."""
    record = model_record("bfloat16", layout())
    head, child, _, grandchild = _family(record, True)
    return Batch("state", record, encoding_of(["scalar", "lossless"], 16, 2), (head, child, grandchild))


def state_of(piece: Piece) -> bytes:
    """Bits of all kinds, NaN too: a state is stored as it is."""
    count = layout().state_nbytes
    return (mixed(np.arange(count) + 65537 * piece.ids[-1]) >> np.uint32(9)).astype(np.uint8).tobytes()


def write_store(path: Path) -> str:
    """The name of its pack."""
    create(path)
    storage, one = Store(path).storage, batch()
    add_model(storage, one.model, probe_of(one.model))
    writer = PackWriter(storage, one.model.model.key, one.model.layout, one.encoding, PROVENANCE)
    for piece in one.pieces:
        writer.add(one.key(piece), piece.context, piece.ids, units_of(one, piece), state=state_of(piece))
    name = writer.close() or ""
    add_template(storage, template())
    row = row_of("a.md", one, one.keys[0], (Passage(18, prefix=one.keys[1]), Passage(5, prefix=one.keys[2])), {})
    Store(path).snapshots.commit(Change((row,)), "first")
    return name


def main(folder: Path) -> None:
    """Raises FileExistsError: golden artifacts are only ever added."""
    folder.mkdir(parents=True)
    found = expected(folder / "kv.zarr", {"state": write_store(folder / "kv.zarr")})
    (folder / "expected.json").write_text(lines(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
