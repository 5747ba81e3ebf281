"""Units to values: decoded group by group, rotated to their positions, written straight into the tensors of a cache."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore.codecs import get_codec
from kvstore.errors import InputError, KvstoreError, ResourceError
from kvstore.families.rope import cos_sin, rotate
from kvstore.manifest import Layout, Tier
from kvstore.store import Stored, tier_chain

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KV = tuple[torch.Tensor, torch.Tensor]
_ALONE = 32  # tokens up to which one thread decodes


def allocate(layout: Layout, tokens: int, device: torch.device | str = "cpu") -> list[KV]:
    """Per layer K and V [1, kv_heads, tokens, head_dim] in the model's dtype, uninitialised. Raises ResourceError where memory is short."""
    dtype, device = TORCH[layout.dtype], known_device(device)
    need = layout.values_per_token * tokens * dtype.itemsize
    if (free := free_memory(device)) is not None and need > free:
        raise ResourceError(
            f"the cache of {tokens:,} tokens takes {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free on {device}",
            remedy="load fewer documents or passages",
        )
    shape = (1, layout.kv_heads, tokens, layout.head_dim)
    with torch.inference_mode(False):  # the tensors outlive the caller's mode
        return [(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)) for _ in range(layout.layers)]


def known_device(name: torch.device | str) -> torch.device:
    """Raises InputError for a device that torch does not have here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"no device {str(name)!r} here: {str(error).splitlines()[0]}", remedy="use cpu, or a torch build for it") from error
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, None where nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@dataclass(frozen=True)
class Piece:
    """What to decode where: tokens `first : first + count` of an artifact at `tier`, to cache rows `at`, rotated to positions from `position`."""

    stored: Stored
    tier: str
    count: int
    at: int
    position: int
    first: int = 0


class Decoder:
    """Decodes artifacts into caches, several groups of layers at a time. One object may serve many threads."""

    def __init__(self, workers: int | None = None):
        self.workers = workers or os.cpu_count() or 1
        self._owned: tuple[int, ThreadPoolExecutor] | None = None

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """Threads of this process: a forked child has none of its parent's."""
        if self._owned is None or self._owned[0] != os.getpid():
            self._owned = (os.getpid(), ThreadPoolExecutor(self.workers, thread_name_prefix="kvstore-decode"))
        return self._owned[1]

    def decode(self, piece: Piece, cache: Sequence[KV]) -> None:
        """Fill `cache` rows `at : at + count` of every layer. Raises IntegrityError where stored bytes are damaged."""
        stored, tiers = piece.stored, tier_chain(piece.stored.encoding, piece.tier)
        units = [stored.pack.units(stored.segment, t.array) for t in tiers]
        place, groups = _Placer(piece, cache), range(stored.pack.groups)
        if piece.count <= _ALONE:  # handing work to threads would take longer than doing it
            for tier in tiers:
                stored.pack.check_once(stored.segment, tier.array)
            for group in groups:
                place(group, _decode_group(piece, tiers, [u[group] for u in units], group))
            return
        checks = [self._pool.submit(stored.pack.check_once, stored.segment, t.array) for t in tiers]
        pending: deque[tuple[int, Future[npt.NDArray[Any]]]] = deque()
        for group in groups:
            pending.append((group, self._pool.submit(_decode_group, piece, tiers, [u[group] for u in units], group)))
            if len(pending) > self.workers:  # bounds the memory beside the cache
                _finish(pending, place)
        while pending:
            _finish(pending, place)
        for check in checks:
            check.result()

    def warm_up(self, stored: Stored) -> Thread:
        """Load (or compile) what decoding needs, in the background: compiled kernels take half a second of a process's first load."""

        def work() -> None:
            # a damaged artifact is for the load that wants it to report; RuntimeError: the process ends already
            with suppress(KvstoreError, RuntimeError):
                for tier in stored.encoding.tiers:
                    count = min(stored.segment.tokens, 2 * _ALONE)
                    self.decode(Piece(stored, tier.name, count, 0, 0), allocate(stored.pack.layout, count))

        thread = Thread(target=work, name="kvstore-warm-up")
        thread.start()
        return thread


def _finish(pending: deque[tuple[int, Future[npt.NDArray[Any]]]], place: _Placer) -> None:
    group, future = pending.popleft()
    place(group, future.result())


def _decode_group(piece: Piece, tiers: Sequence[Tier], units: Sequence[Sequence[memoryview]], group: int) -> npt.NDArray[Any]:
    """[group layers, 2, tokens, channels]: float32, or bit patterns for exact tiers."""
    encoding, layout = piece.stored.encoding, piece.stored.pack.layout
    spec, block = encoding.codec(tiers[-1].codec), encoding.block_tokens
    codec = get_codec(spec.name, spec.version, spec.params)
    last = piece.first + piece.count
    dtype = np.float32 if not tiers[-1].exact else (np.uint32 if layout.dtype == "float32" else np.uint16)
    start = piece.first // block
    out = np.empty(
        (len(piece.stored.pack.group_layers(group)), 2, min(-(-last // block) * block, piece.stored.segment.tokens) - start * block, layout.channels),
        dtype,
    )
    for b in range(start, -(-last // block)):
        codec.decode([tier[b] for tier in units], out[:, :, (b - start) * block : (b - start + 1) * block])
    return out[:, :, piece.first - start * block : last - start * block]


class _Placer:
    """Casts, transposes and rotates decoded groups into the cache."""

    def __init__(self, piece: Piece, cache: Sequence[KV]):
        self.piece, self.cache, self.layout = piece, cache, piece.stored.pack.layout
        self.dtype, self.device = TORCH[self.layout.dtype], cache[0][0].device
        self.positions = torch.arange(piece.position, piece.position + piece.count)
        # cosines of the cache's own device: those of a CPU and a GPU differ in the last bits
        self.angles = [cos_sin(self.positions, rope, self.dtype, self.device) for rope in self.layout.ropes]

    def __call__(self, group: int, values: npt.NDArray[Any]) -> None:
        for layer, kv in zip(self.piece.stored.pack.group_layers(group), values, strict=True):
            into_k, into_v = (t[0, :, self.piece.at : self.piece.at + self.piece.count] for t in self.cache[layer])
            keys, rope = self._tensor(kv[0]).to(self.device), self.layout.rope_of[layer]
            if rope is None:
                into_k.copy_(keys)
            else:
                rotate(keys, self.positions, self.layout.ropes[rope], out=into_k, angles=self.angles[rope])
            into_v.copy_(self._tensor(kv[1]))

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """[kv_heads, tokens, head_dim] in the model's dtype, from [tokens, channels]."""
        if values.dtype == np.float32:
            plain = torch.from_numpy(values).to(self.dtype)
        else:
            plain = torch.from_numpy(values.view(np.int32 if values.itemsize == 4 else np.int16)).view(self.dtype)
        return plain.view(len(values), self.layout.kv_heads, self.layout.head_dim).transpose(0, 1)
