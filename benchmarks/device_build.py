"""The building half of device.py: prefill with capture, and with the encoder beside it, against a bare pass of the same batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from device_data import encoding_of
from transformers import DynamicCache

from kvstore.calibration.record import Calibration
from kvstore.compiling import BATCH_TOKENS, BatchLine, Compiler
from kvstore.encode import Encoder
from kvstore.families.capture import forward
from kvstore.identity import Context
from kvstore.manifest import Layout, Row
from kvstore.plan import Planned, Task
from kvstore.prefill import Prefiller
from kvstore.viewing import nobody

BATCHES = 4
HEAD = (1,)


def measure(device: Any, model: Any, layout: Layout, calibration: Calibration, block: int, tiny: bool) -> list[list[object]]:
    """A row a length of documents: `BATCHES` full batches of them."""
    lengths, tokens = ((15, 31), 64) if tiny else ((512, 2048, 8192), BATCH_TOKENS)
    return [_row(device, model, layout, calibration, block, length, tokens) for length in lengths]


def _row(device: Any, model: Any, layout: Layout, calibration: Calibration, block: int, length: int, tokens: int) -> list[object]:
    rows = tokens // (length + len(HEAD))
    prefiller, encoder = Prefiller(model, layout), Encoder(encoding_of(calibration, block), layout, device.pool)
    bare = device.seconds(lambda: [_bare(model, rows, length) for _ in range(BATCHES)])
    captured = device.seconds(lambda: [prefiller.run_rows([_ids(length)] * rows, (HEAD,)) for _ in range(BATCHES)])
    built = device.seconds(lambda: _build(prefiller, encoder, rows * BATCHES, length, tokens), runs=2)
    over = [100 * (other / bare - 1) for other in (captured, built)]
    return [rows * BATCHES, length, 1e3 * bare, 1e3 * captured, over[0], 1e3 * built, over[1]]


def _ids(length: int) -> tuple[int, ...]:
    return tuple(3 + n % 150 for n in range(length))


def _bare(model: Any, rows: int, length: int) -> None:
    """The decoder over the same ids, the head before them, into a cache that nobody keeps."""
    ids = torch.tensor([[*HEAD, *_ids(length)]] * rows)
    forward(model, ids, torch.arange(ids.shape[1]).expand(rows, -1), DynamicCache(config=model.config))


def _build(prefiller: Prefiller, encoder: Encoder, documents: int, length: int, tokens: int) -> None:
    """All but the disk: units are made and forgotten."""
    line = BatchLine(Compiler(prefiller, encoder, nobody, lambda part: nullcontext()), lambda task, found: None, lambda planned: None, tokens, True)
    row: Any = Row("a", "0" * 64, "0" * 64, "0" * 64, "0" * 64, "whole", "0" * 64, (), "", {})
    for number in range(documents):
        line.put(Planned(row, (Task(f"{number:064x}", Context.anchor(HEAD), (HEAD,), _ids(length)),), True))
    line.end()
