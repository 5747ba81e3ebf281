"""kvstore's own codec as a method: calibrations of token sequences through the product's learner, records through its codec, every byte counted."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import torch
from peers.base import Floats, Method, Version
from texts import Ids

from kvstore.calibration import files, learn
from kvstore.calibration.live import Live
from kvstore.calibration.metric import measure as metric_of
from kvstore.calibration.record import Calibration
from kvstore.calibration.sample import Excerpt
from kvstore.codecs import get_codec
from kvstore.codecs.base import Codec
from kvstore.codecs.table_data import BASE, THIRDS
from kvstore.models import ModelSource

BLOCK = 512  # as encode.BLOCK_TOKENS
UNIT_BYTES = 4 + 16  # crc32c and the entry in the shard's index
ROW_BYTES, TIER_ROW_BYTES = 88, 48  # of a pack's table of segments
TIERS = ("draft", "standard", "fine")


class Learner(learn.Learner):
    """The product's learner on given sequences. `apart`: keys and values are transformed apart."""

    def __init__(self, *args: Any, sequences: Sequence[Ids], apart: bool, **more: Any):
        super().__init__(*args, **more)
        self.given, self.apart = sequences, apart

    def _sequences(self, pool: Any, renderer: Any, room: int) -> list[Excerpt]:
        return [Excerpt(ids, 0) for ids in self.given]

    def _solve(self, sums: list[Any], metric: Any) -> Any:
        if self.apart:
            channels = self.live.layout.channels
            for one in sums:
                kind = torch.arange(len(one.mean)) // channels % 2
                one.covariance[kind[:, None] != kind[None]] = 0
        return super()._solve(sums, metric)


class Shelf:
    """Calibrations by what they were made of, kept in a folder between runs; metrics are shared between those of one text and seed."""

    def __init__(self, source: ModelSource, folder: Path):
        self.source, self.folder = source, folder / source.identity.key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics: dict[tuple[object, ...], Any] = {}

    def calibration(self, sequences: Sequence[Ids], *, apart: bool = False, **choices: Any) -> Calibration:
        made_of = hashlib.sha256(repr((list(sequences), apart, sorted(choices.items()))).encode()).hexdigest()
        kept = self.folder / made_of
        if not kept.exists():
            staged = Path(tempfile.mkdtemp(dir=self.folder)) / "calibration"
            staged.mkdir()
            files.write(staged, self._learn(sequences, apart, choices))
            staged.rename(kept)
        return files.read(kept, hashlib.sha256((kept / "zarr.json").read_bytes()).hexdigest())

    def _learn(self, sequences: Sequence[Ids], apart: bool, choices: dict[str, Any]) -> Calibration:
        started, live = time.perf_counter(), Live(self.source.model, self.source.layout)
        made = Learner(live, self.source.identity.key, learn.Choices(**choices), {}, sequences=sequences, apart=apart)
        with mock.patch.object(learn, "measure", self._measure):
            found = made.learn(None, None, 1 << 20)  # type: ignore[arg-type]  # both are for choosing sequences
        seconds = ", ".join(f"{stage} {t:.0f} s" for stage, t in found.seconds.items())
        print(f"  calibrated {choices} in {time.perf_counter() - started:.0f} s ({seconds}), KL {found.calibration.record.kl}", flush=True)
        return found.calibration

    def _measure(self, metric: str, live: Live, sequences: Sequence[Excerpt], seed: int, tick: Any) -> Any:
        key = (metric, seed, tuple(s.ids for s in sequences))
        if key not in self._metrics:
            self._metrics[key] = metric_of(metric, live, sequences, seed, tick)
        return self._metrics[key]


def coarser(calibration: Calibration, eighths: int) -> Calibration:
    """With a step 3 ** (eighths / 8) times as large: classes count eighths, so the tables stay as they are."""
    record = msgspec.structs.replace(calibration.record, step=calibration.record.step * 3 ** (eighths / 8))
    classes = tuple(np.maximum(c.astype(np.int64) - eighths, 0).astype(np.uint8) for c in calibration.classes)
    return dataclasses.replace(calibration, record=record, classes=classes)


def single_tier(calibration: Calibration, tier: int) -> Calibration:
    """One tier with the step that `tier` has."""
    r = calibration.record
    up = r.tiers - 1 - tier
    record = msgspec.structs.replace(r, tiers=1, step=r.step * 3**up, shrink=(r.shrink[tier],), kl=())
    classes = tuple(np.maximum(c.astype(np.int64) - 8 * up, 0).astype(np.uint8) for c in calibration.classes)
    return dataclasses.replace(calibration, record=record, classes=classes)


def built_in_tables(calibration: Calibration) -> Calibration:
    weights = np.zeros_like(calibration.weights)
    for c, half in enumerate(BASE):
        weights[c, : len(half)] = half
    return dataclasses.replace(calibration, weights=weights, thirds=np.array(THIRDS, np.uint16))


@dataclass(frozen=True)
class Ours(Method):
    """All tiers of one calibration.

    Counted: `all` is what a store grows by (records, checksums, index, row, token ids), `records` the first three. With `extra`, for the same
    reconstructions, records with `built-in tables`, as a `single tier`, and coefficients of `fixed width`.
    """

    calibration: Calibration
    label: str = "ours"
    prefix: str = ""
    extra: bool = False

    @property
    def name(self) -> str:
        return self.label

    @property
    def tiers(self) -> int:
        return self.calibration.record.tiers

    @property
    def settings(self) -> Sequence[str]:
        return [self.prefix + t for t in TIERS[-self.tiers :]]

    @cached_property
    def codec(self) -> Codec:
        return codec_of(self.calibration)

    @cached_property
    def others(self) -> tuple[Codec, list[Codec]]:
        """With the built-in tables, and of single tiers."""
        return codec_of(built_in_tables(self.calibration)), [codec_of(single_tier(self.calibration, t)) for t in range(self.tiers)]

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        outs, sizes = [np.empty_like(kv) for _ in range(self.tiers)], np.zeros(self.tiers)
        for g, part in self._units(kv.shape[2]):
            records = self._records(self.codec, kv[part], g)
            sizes += sized(records)
            for tier, out in enumerate(outs):
                values = np.empty(kv[part].shape, np.float32)
                self.codec.decode(records[: tier + 1], values)
                out[part] = values
        rest = len(zlib.compress(np.array(ids, "<u4").tobytes(), 9)) + ROW_BYTES
        more = self._more(kv) if self.extra else [{} for _ in outs]
        return [Version(out, {"all": sizes[t] + rest + TIER_ROW_BYTES * (t + 1), "records": sizes[t]} | more[t]) for t, out in enumerate(outs)]

    def _units(self, tokens: int) -> Iterator[tuple[int, tuple[slice, ...]]]:
        for g in range(len(self.calibration.bases)):
            layers = self.calibration.group_layers(g)
            for start in range(0, tokens, BLOCK):
                yield g, (slice(layers.start, layers.stop), slice(None), slice(start, start + BLOCK))

    def _records(self, codec: Codec, kv: Floats, group: int) -> list[bytes]:
        return codec.encode(np.ascontiguousarray(kv).view(np.uint32), "float32", group)

    def _more(self, kv: Floats) -> list[dict[str, float]]:
        built_in, single = self.others
        tables, alone = np.zeros(self.tiers), np.zeros(self.tiers)
        for g, part in self._units(kv.shape[2]):
            tables += sized(self._records(built_in, kv[part], g))
            alone += [sized(self._records(codec, kv[part], g))[0] for codec in single]
        ways = zip(tables, alone, [fixed_width(self.calibration, kv, t) for t in range(self.tiers)], strict=True)
        return [{"built-in tables": a, "single tier": b, "fixed width": c} for a, b, c in ways]


def codec_of(calibration: Calibration) -> Codec:
    return get_codec("transform", 1, {}, calibration=calibration)


def sized(records: Sequence[bytes]) -> Any:
    """Bytes of the tiers up to each, as stored."""
    return np.cumsum([len(r) + UNIT_BYTES for r in records])


def fixed_width(calibration: Calibration, kv: Floats, tier: int) -> float:
    """Bytes of one document at `tier` without entropy coding: per unit and coefficient as many bits as its largest level needs, and 4 to say so."""
    step, bits = calibration.record.step * 3.0 ** (calibration.record.tiers - 1 - tier), 0
    up = 8 * (calibration.record.tiers - 1 - tier)
    for g, (basis, classes) in enumerate(zip(calibration.bases, calibration.classes, strict=True)):
        layers = calibration.group_layers(g)
        x = kv[layers.start : layers.stop].transpose(2, 0, 1, 3).reshape(kv.shape[2], -1)
        coded = int((classes.astype(np.int64) - up >= calibration.record.least).sum())
        levels = np.abs(np.rint((x - basis.mean) @ basis.analysis()[:, :coded] / step))
        for start in range(0, len(x), BLOCK):
            part = levels[start : start + BLOCK]
            bits += int((np.ceil(np.log2(2 * part.max(0) + 1)) * len(part) + 4).sum())
    return bits / 8
