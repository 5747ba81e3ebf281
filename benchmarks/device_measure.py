"""The timed pieces of device.py: one document of one geometry on one device."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvstore.artifact import Stored
from kvstore.codecs import codec_of
from kvstore.codecs.transform_ladder import rows_of
from kvstore.decode import KV, Decoder, Piece, allocate
from kvstore.device.codec import Target, TransformOnDevice, unusable
from kvstore.device.layer import waiting_cache
from kvstore.device.path import DevicePath
from kvstore.device.pipeline import angles_of
from kvstore.device.ready import Pending
from kvstore.device.streams import Streams, streams_of
from kvstore.device.wanted import Wanted
from kvstore.families.rope import cos_sin
from kvstore.pack import Pack


class Device:
    """A device, its streams, and how to wait for it."""

    def __init__(self, name: str, runs: int, threads: int):
        self.device, self.runs = torch.device(name), runs
        self.cuda = self.device.type == "cuda"
        self.streams: Streams = streams_of(self.device)
        self.pool = ThreadPoolExecutor(threads)
        self.decoder = Decoder()
        self.why_not: str | None = unusable(self.device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], runs: int | None = None) -> float:
        """Median, the device idle before and after; the first, which compiles and allocates, does not count (but on the CPU, where nothing does)."""
        taken = []
        for _ in range(int(self.cuda) + (runs or self.runs)):
            self.wait()
            started = time.perf_counter()
            kept = call()
            self.wait()
            taken.append(time.perf_counter() - started)
            del kept
        return statistics.median(taken[int(self.cuda) :])

    def start(self, pieces: Sequence[Piece], cache: Sequence[KV]) -> Pending | Sequence[KV]:
        """As compose does on a GPU; on the CPU by Triton's interpreter, or the CPU's own decoder where that is off."""
        if self.cuda:
            readies = self.decoder.start(pieces, cache)
        elif self.why_not is None:
            readies = [self.path.load(pieces, cache, [])]
        else:
            readies = self.decoder.start(pieces, cache)
        return Pending(cache, readies) if readies else cache

    @property
    def path(self) -> DevicePath:
        if not hasattr(self, "_path"):
            self._path = DevicePath(self.streams, self.pool, lambda rope, dtype, n: cos_sin(torch.arange(n), rope, dtype, self.device))
        return self._path


class Load(NamedTuple):
    """Seconds to a cache that may be used. `cold`: the file is not in the page cache, nor its digest known; `read` bytes then came from disk."""

    warm: float
    cold: float
    read: int
    peak: int


def load(device: Device, stored: Stored, tier: str) -> Load:
    tokens, layout = stored.segment.tokens, stored.pack.layout

    peak = 0

    def once(found: Stored = stored) -> Any:
        nonlocal peak
        cache = device.start([Piece(found, tier, tokens, 0, 0)], allocate(layout, tokens, device.device))
        tuple(cache)  # the host knows that all is there
        peak = getattr(cache, "peak_nbytes", 0)
        return cache

    warm = device.seconds(once)
    taken, reads = [], []
    for _ in range(min(3, device.runs)):
        fresh, before = forgotten(stored), disk_reads()
        device.wait()
        started = time.perf_counter()
        once(fresh)
        device.wait()
        taken.append(time.perf_counter() - started)
        reads.append(disk_reads() - before)
        forget(fresh.pack)
    return Load(warm, statistics.median(taken), int(statistics.median(reads)), peak)


def forgotten(stored: Stored) -> Stored:
    """The same as a new process finds it, the shards out of the page cache."""
    forget(stored.pack)
    pack = Pack(stored.pack.storage, stored.pack.name)
    for tier in pack.encoding.tiers:
        with open(pack.storage.root / pack.folder / tier.array / "c.0.0.0.0", "rb") as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Stored(pack, stored.segment)


def forget(pack: Pack) -> None:
    """Let go of the pack's maps: pages that a process maps stay in the page cache. They are mapped again when they are needed."""
    pack._maps.clear()
    pack._indexes.clear()
    gc.collect()


def disk_reads() -> int:
    """Bytes that this process has made the system read from a disk; 0 where it does not say."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return 0


class Parts(NamedTuple):
    """Seconds of each step of all groups, one after another, and of `decode` and `fill` together on several streams."""

    stage: float
    plan: float
    copy: float
    decode: float
    fill: float
    both: float
    symbols: int


def parts(device: Device, stored: Stored, tier: str) -> Parts:
    """Where the time goes, each step by itself. Raises RuntimeError where the kernels cannot run."""
    if device.why_not is not None:
        raise RuntimeError(device.why_not)
    return _Steps(device, stored, tier).measure()


class _Steps:
    def __init__(self, device: Device, stored: Stored, tier: str):
        self.device, self.tokens, self.layout = device, stored.segment.tokens, stored.pack.layout
        self.wanted = Wanted([Piece(stored, tier, self.tokens, 0, 0)])
        codec: Any = codec_of(self.wanted.encoding.codecs[0], self.wanted.encoding, self.layout)
        self.on, self.ladders = TransformOnDevice(codec.calibration, device.device, self.layout.dtype), codec.ladders
        self.groups = range(stored.pack.groups)
        self.cache = allocate(self.layout, self.tokens, device.device)
        dtype = self.cache[0][0].dtype
        self.angles = angles_of(self.wanted, lambda rope, n: cos_sin(torch.arange(n), rope, dtype, device.device))
        self.target = Target(self.wanted.row, self.wanted.position, self.wanted.first, self.wanted.end)
        most = max(self.wanted.count(group) for group in self.groups)
        self.hosts = [device.streams.pinned(4 * most).numpy().view(np.uint32)[: self.wanted.count(group)] for group in self.groups]

    def measure(self) -> Parts:
        device = self.device
        stage = device.seconds(lambda: [self.wanted.stage(g, self.hosts[g]) for g in self.groups])
        spans = [self.wanted.stage(g, self.hosts[g]) for g in self.groups]
        plan = device.seconds(lambda: [self.on.plan(self.hosts[g], spans[g], self.wanted.tokens, g) for g in self.groups])
        self.plans = [self.on.plan(self.hosts[g], spans[g], self.wanted.tokens, g) for g in self.groups]
        copy = device.seconds(self._copies)
        self.sent = self._copies()
        decode = device.seconds(lambda: [self._decode(g) for g in self.groups])
        fill = self._filled([self._decode(g) for g in self.groups])
        return Parts(stage, plan, copy, decode, fill, device.seconds(self._overlapped), self._symbols())

    def _filled(self, levels: list[Any]) -> float:
        for found in levels:
            self.on.check(found.flags.cpu())
        return self.device.seconds(lambda: [self._fill(g, levels[g]) for g in self.groups])

    def _copies(self) -> list[tuple[Tensor, Tensor]]:
        where = self.device.device
        words = [torch.from_numpy(host.view(np.int32)).to(where, non_blocking=True) for host in self.hosts]
        return [(sent, torch.from_numpy(plan.table).to(where)) for sent, plan in zip(words, self.plans, strict=True)]

    def _decode(self, group: int) -> Any:
        return self.on.decode(self.plans[group], *self.sent[group])

    def _fill(self, group: int, levels: Any) -> None:
        layers = self.wanted.pack.group_layers(group)
        ropes = [None if (rope := self.layout.rope_of[i]) is None else self.layout.ropes[rope] for i in layers]
        self.on.fill(levels, self.target, [self.cache[i] for i in layers], ropes, [self.angles[i] for i in layers])

    def _overlapped(self) -> list[Any]:
        """From units on the device to the cache: four groups are decoded at once, and filled in order."""
        streams, kept = self.device.streams, []
        for group in self.groups:
            decoding, filling = streams.open(f"decode {group % 4}"), streams.open("fill")
            with streams.on(decoding):
                kept.append(self._decode(group))
            streams.wait(filling, streams.record(decoding))
            with streams.on(filling):
                self._fill(group, kept[-1])
        return kept

    def _symbols(self) -> int:
        """What the entropy decoder takes from all streams."""
        total = 0
        for group in self.groups:
            for level in range(len(self.wanted.tiers)):
                rows = rows_of(self.ladders[group], level, 0, self.tokens)
                total += rows.refined * rows.run + rows.added
        return total


class First(NamedTuple):
    """Seconds to the first token's logits on the host, after a prefill, a load, and a copy of raw values from pinned memory."""

    prefill: float
    stored: float
    raw: float


def first_token(device: Device, model: Any, stored: Stored, tier: str, query: int = 32) -> First:
    tokens, layout = stored.segment.tokens, stored.pack.layout
    ids = torch.randint(3, 150, (1, tokens + query), device=device.device)
    host = device.streams.pinned(2 * layout.values_per_token * tokens).view(torch.bfloat16)

    def logits(cache: Any) -> Tensor:
        with torch.inference_mode():
            return model(ids if cache is None else ids[:, tokens:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits.cpu()

    def raw() -> Tensor:
        return logits(waiting_cache(model.config, raw_cache(layout, tokens, host, device)))

    def loaded() -> Tensor:
        cache = allocate(layout, tokens, device.device)
        return logits(waiting_cache(model.config, device.start([Piece(stored, tier, tokens, 0, 0)], cache)))

    return First(device.seconds(lambda: logits(None)), device.seconds(loaded), device.seconds(raw))


def raw_cache(layout: Any, tokens: int, host: Tensor, device: Device) -> list[KV]:
    """Keys and values as they lie in pinned memory, copied in one go: the least that any store of raw values does."""
    sent = host.to(device.device, non_blocking=True).view(layout.layers, 2, 1, layout.kv_heads, tokens, layout.head_dim)
    return [(both[0], both[1]) for both in sent]


def copy_of_raw(device: Device, layout: Any, tokens: int) -> float:
    """Seconds of a pinned copy of the whole cache."""
    host = device.streams.pinned(2 * layout.values_per_token * tokens).view(torch.bfloat16)
    return device.seconds(lambda: raw_cache(layout, tokens, host, device))


def prefill(device: Device, model: Any, tokens: int) -> float:
    """Seconds of a bare pass with the logits of the last token."""
    ids = torch.randint(3, 150, (1, tokens), device=device.device)
    with torch.inference_mode():
        return device.seconds(lambda: model(ids, use_cache=True, logits_to_keep=1).logits)


class Rates(NamedTuple):
    """Bytes a second of a pinned copy and within the device's memory (read and written), FLOP a second of a large float16 product."""

    link: float
    memory: float
    product: float


def rates(device: Device) -> Rates:
    size, side = (1 << 30, 8192) if device.cuda else (1 << 20, 256)
    host, here = device.streams.pinned(size), torch.empty(size, dtype=torch.uint8, device=device.device)
    there, a = torch.empty_like(here), torch.randn(side, side, device=device.device, dtype=torch.float16 if device.cuda else torch.float32)
    link = device.seconds(lambda: here.copy_(host, non_blocking=True))
    return Rates(size / link, 2 * size / device.seconds(lambda: there.copy_(here)), 2 * side**3 / device.seconds(lambda: a @ a))


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection in the middle of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
