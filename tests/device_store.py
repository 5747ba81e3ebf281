"""A pack in the codec `transform` without a model, and a decoder for the device path that runs on the CPU: what the tests of the pipeline share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.artifact import Stored
from kvstore.calibration import registry
from kvstore.calibration.record import Calibration
from kvstore.codecs import get_codec
from kvstore.codecs.base import damaged
from kvstore.codecs.masked import to_bits
from kvstore.device.placement import Target
from kvstore.encode import Encoder
from kvstore.families.rope import Angles, rotate
from kvstore.identity import Context, segment_key
from kvstore.manifest import CodecSpec, Encoding, Layout, Tier
from kvstore.pack import Pack
from kvstore.pack_writer import PackWriter
from kvstore.records import create
from kvstore.storage.local import LocalStorage
from tests.synthetic import MODEL, ROPE
from tests.synthetic_calibration import make_calibration, make_values

LAYERS, HEADS, WIDTH, BLOCK = 7, 2, 8, 8
LAYOUT = Layout(LAYERS, HEADS, WIDTH, "bfloat16", "hooked", (0, None, 0, 0, 0, 0, 0), (ROPE,))
CALIBRATION = make_calibration(LAYERS, HEADS, WIDTH, group_layers=1)
NAMES = ("draft", "standard", "fine")


def encoding_of(calibration: Calibration, block: int = BLOCK) -> Encoding:
    registry.add(calibration)
    tiers = tuple(Tier(name, f"t{level}", "transform", level, NAMES[:level], False) for level, name in enumerate(NAMES))
    return Encoding((CodecSpec("transform", 1, {}, calibration.digest),), tiers, block, calibration.record.group_layers)


def store_of(folder: Path, lengths: Sequence[int], layout: Layout = LAYOUT, calibration: Calibration = CALIBRATION) -> list[Stored]:
    """Segments of so many tokens, in one pack."""
    create(folder / "kv.zarr")
    encoding, storage = encoding_of(calibration), LocalStorage(folder / "kv.zarr")
    writer, encoder = PackWriter(storage, MODEL.key, layout, encoding, {}), Encoder(encoding, layout)
    for number, tokens in enumerate(lengths):
        values = make_values(tokens, layout.layers, layout.kv_heads, layout.head_dim, calibration.record.group_layers, draw=number)
        ids = tuple(range(100 * number, 100 * number + tokens))
        context = Context.anchor((1,))
        writer.add(segment_key(MODEL, layout, context, ids), context, ids, encoder.encode(to_bits(values, layout.dtype)))
    name = writer.close()
    assert name is not None
    pack = Pack(storage, name)
    return [Stored(pack, pack.segment(row)) for row in range(len(lengths))]


@dataclass
class FakePlan:
    table: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    group: int


@dataclass
class FakeLevels:
    values: list[npt.NDArray[np.float32]]
    flags: Tensor


class HostCodec:
    """`TransformOnDevice` by the codec's own decoder. It reads records and table from the copies that it is given, as a device does."""

    def __init__(self, calibration: Calibration = CALIBRATION, work: int = 1000):
        self.codec, self.calibration, self.work = get_codec("transform", 1, {}, calibration), calibration, work
        self.damaged: set[tuple[int, int]] = set()  # group and unit
        self.order: list[tuple[str, int]] = []

    def group_bytes(self, group: int) -> int:
        return 100

    def plan(self, words: npt.NDArray[np.uint32], spans: Any, tokens: Any, group: int) -> FakePlan:
        return FakePlan(np.arange(group, group + 40 + group, dtype=np.int32), spans, tokens, group)

    def work_bytes(self, plan: FakePlan) -> int:
        return self.work

    def decode(self, plan: FakePlan, words: Tensor, table: Tensor) -> FakeLevels:
        self.order.append(("decode", plan.group))
        assert table.tolist() == plan.table.tolist()
        layers, record = len(self.calibration.group_layers(plan.group)), self.calibration.record
        values = []
        for unit, tokens in zip(plan.spans, plan.tokens.tolist(), strict=True):
            out = np.empty((layers, 2, tokens, record.kv_heads * record.head_dim), np.float32)
            self.codec.decode([words[at : at + size].numpy().tobytes() for at, size in unit.tolist()], out)
            values.append(out)
        return FakeLevels(values, torch.tensor([(plan.group, u) in self.damaged for u in range(len(values))], dtype=torch.int32))

    def fill(self, levels: FakeLevels, target: Target, caches: Any, ropes: Any, angles: Sequence[Angles | None]) -> None:
        self.order.append(("fill", len(self.order)))
        for unit, values in enumerate(levels.values):
            row, position, first, end = (int(column[unit]) for column in target)
            for layer, (keys, into) in enumerate(caches):
                for kind, cache in enumerate((keys, into)):
                    tensor = torch.from_numpy(values[layer, kind, first:end]).to(cache.dtype).view(end - first, cache.shape[1], -1).transpose(0, 1)
                    if kind == 0 and (turn := angles[layer]) is not None:
                        part = slice(position + first, position + end)
                        at = torch.arange(position + first, position + end)
                        tensor = rotate(tensor, at, ropes[layer], angles=Angles(turn.cos[part], turn.sin[part]))
                    cache[0, :, row + first : row + end] = tensor

    def check(self, flags: Tensor, names: Sequence[str] | None = None) -> None:
        bad = flags.nonzero().flatten().tolist()
        if bad:
            raise damaged(", ".join(names[i] if names else str(i) for i in bad))
