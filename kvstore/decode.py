"""Units to values: decoded group by group, rotated to their positions, written straight into the tensors of a cache."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore.arrays import stored_type
from kvstore.artifact import Stored, policy_of, tier_chain
from kvstore.codecs import codec_of
from kvstore.devices import free_memory, known_device
from kvstore.errors import IncompatibleError, KvstoreError, ResourceError
from kvstore.families.rope import Angles, cos_sin, rotate
from kvstore.manifest import Layout, RopeRecord, Tier

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KV = tuple[torch.Tensor, torch.Tensor]
_ALONE = 32  # tokens up to which one thread decodes
_KEPT = 1 << 18  # positions up to which a table of cosines is kept: 64 MiB for heads of 128 in bfloat16


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
        self._scratch, self._turns = Scratch(), Turns()

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """Threads of this process: a forked child has none of its parent's."""
        if self._owned is None or self._owned[0] != os.getpid():
            self._owned = (os.getpid(), ThreadPoolExecutor(self.workers, thread_name_prefix="kvstore-decode"))
        return self._owned[1]

    def decode(self, piece: Piece, cache: Sequence[KV], *, masked: bool = False) -> None:
        """Fill `cache` rows `at : at + count` of every layer. Keys of dropped tokens become NaN, which only attention that masks them
        understands: the caller says with `masked` that it is such, else IncompatibleError. Raises IntegrityError where stored bytes are damaged.
        """
        stored, tiers = piece.stored, tier_chain(piece.stored.encoding, piece.tier)
        if not masked and stored.drops(piece.tier):
            raise IncompatibleError(
                f"tier {piece.tier!r} lacks dropped tokens ({policy_of(stored.encoding, piece.tier)}), which only attention that masks them can read",
                remedy="compose or load it with a model, or take a tier without dropped tokens",
                code="unmasked",
            )
        job = _Job(piece, tiers, cache, self._scratch, self._turns)
        work = [partial(stored.pack.check_once, stored.segment, t.array) for t in tiers]
        work += [partial(job.unit, g, b) for g in range(stored.pack.groups) for b in job.blocks]
        if piece.count <= _ALONE:  # handing work to threads would take longer than doing it
            for step in work:
                step()
            return
        for done in [self._pool.submit(step) for step in work]:
            done.result()

    def warm_up(self, stored: Stored) -> threading.Thread:
        """Load (or compile) what decoding needs, in the background: compiled kernels take half a second of a process's first load."""

        def work() -> None:
            # a damaged artifact is for the load that wants it to report; RuntimeError: the process ends already
            with suppress(KvstoreError, RuntimeError):
                for tier in stored.encoding.tiers:
                    count = min(stored.segment.tokens, 2 * _ALONE)
                    self.decode(Piece(stored, tier.name, count, 0, 0), allocate(stored.pack.layout, count), masked=True)

        thread = threading.Thread(target=work, name="kvstore-warm-up")
        thread.start()
        return thread


class Scratch(threading.local):
    """Arrays that each thread takes again and again: fresh ones cost a page fault per 4 KiB."""

    def __init__(self) -> None:
        self.buffers: dict[str, npt.NDArray[np.uint8]] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """An uninitialised array, valid until this thread takes `name` again."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if name not in self.buffers or self.buffers[name].nbytes < nbytes:
            self.buffers[name] = np.empty(nbytes, np.uint8)
        return self.buffers[name][:nbytes].view(dtype).reshape(shape)


class Turns:
    """cos and sin of all positions up to the furthest one asked for, per rope: computing them anew took half of a raw load's time.

    Made on the cache's own device: cosines of a CPU and a GPU differ in the last bits.
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[RopeRecord, torch.dtype, torch.device], Angles] = {}

    def take(self, rope: RopeRecord, first: int, count: int, dtype: torch.dtype, device: torch.device) -> Angles:
        """Of positions `first : first + count`, [count, dim / 2] each."""
        key, needed = (rope, dtype, device), first + count
        if needed > _KEPT:
            return cos_sin(torch.arange(first, needed), rope, dtype, device)
        table = self.tables.get(key)
        if table is None or len(table.cos) < needed:
            with torch.inference_mode(False):  # the table outlives the caller's mode
                table = cos_sin(torch.arange(max(1024, 1 << (needed - 1).bit_length())), rope, dtype, device)
            self.tables[key] = table
        return Angles(table.cos[first:needed], table.sin[first:needed])


class _Job:
    """One piece on its way into a cache. Units are decoded, cast, transposed and rotated one by one, by whichever thread takes them."""

    def __init__(self, piece: Piece, tiers: Sequence[Tier], cache: Sequence[KV], scratch: Scratch, turns: Turns):
        self.piece, self.cache, self.pack, self.scratch = piece, cache, piece.stored.pack, scratch
        self.layout, self.block = self.pack.layout, piece.stored.encoding.block_tokens
        self.units = [self.pack.units(piece.stored.segment, t.array) for t in tiers]
        spec = piece.stored.encoding.codec(tiers[-1].codec)
        self.codec = codec_of(spec, piece.stored.encoding, self.layout)
        self.dtype, self.device = TORCH[self.layout.dtype], cache[0][0].device
        self.decoded = np.dtype(stored_type(tiers[-1], self.layout.dtype)[0])
        self.blocks = range(piece.first // self.block, -(-(piece.first + piece.count) // self.block))
        self.positions = torch.arange(piece.position, piece.position + piece.count)
        self.angles = [turns.take(rope, piece.position, piece.count, self.dtype, self.device) for rope in self.layout.ropes]

    def unit(self, group: int, block: int) -> None:
        """Decode one unit and put what is wanted of it into the cache."""
        layers, start = self.pack.group_layers(group), block * self.block
        tokens = min(self.block, self.piece.stored.segment.tokens - start)
        values = self.scratch.take("values", (len(layers), 2, tokens, self.layout.channels), self.decoded)
        self.codec.decode([tier[group][block] for tier in self.units], values)
        first, last = max(start, self.piece.first), min(start + tokens, self.piece.first + self.piece.count)
        rows = slice(first - self.piece.first, last - self.piece.first)
        for layer, kv in zip(layers, values[:, :, first - start : last - start], strict=True):
            self._place(layer, kv, rows)

    def _place(self, layer: int, kv: npt.NDArray[Any], rows: slice) -> None:
        """K and V [2, tokens, channels] of one layer into the piece's `rows`."""
        into_k, into_v = (t[0, :, self.piece.at + rows.start : self.piece.at + rows.stop] for t in self.cache[layer])
        rope = self.layout.rope_of[layer]
        angles = None if rope is None else Angles(self.angles[rope].cos[rows], self.angles[rope].sin[rows])
        record = None if rope is None else self.layout.ropes[rope]
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            _place_compiled(self._wide(kv[0]), angles, record, into_k)
            _place_compiled(self._wide(kv[1]), None, None, into_v)
            return
        keys = self._tensor(kv[0]).to(self.device)
        if angles is None or record is None:
            into_k.copy_(keys)
        else:
            rotate(keys, self.positions[rows], record, out=into_k, angles=angles)
        into_v.copy_(self._tensor(kv[1]))

    def _wide(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """bfloat16 bits as float32 of the same value, in memory that the next call takes again; float32 as it is."""
        from kvstore.placing import widen

        if values.dtype == np.float32:
            return values
        return widen(values, self.scratch.take("wide", values.shape, np.uint32))

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        """[kv_heads, tokens, head_dim] in the model's dtype, from [tokens, channels]."""
        if values.dtype == np.float32:
            plain = torch.from_numpy(values).to(self.dtype)
        else:
            plain = torch.from_numpy(values.view(np.int32 if values.itemsize == 4 else np.int16)).view(self.dtype)
        return plain.view(len(values), self.layout.kv_heads, self.layout.head_dim).transpose(0, 1)


def _place_compiled(values: npt.NDArray[np.float32], angles: Angles | None, record: RopeRecord | None, into: torch.Tensor) -> None:
    """[tokens, channels] into a bfloat16 CPU tensor [kv_heads, tokens, head_dim]."""
    from kvstore.placing import place

    none = np.empty((len(values), 0), np.float32)
    cos, sin = (none, none) if angles is None else (angles.cos.float().numpy(), angles.sin.float().numpy())
    start, interleaved, wide = (0, False, False) if record is None else (record.start, record.layout == "interleaved", record.arithmetic == "float32")
    place(values, cos, sin, start, interleaved, wide, into.view(torch.int16).numpy().view(np.uint16))
