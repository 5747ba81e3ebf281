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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvstore.arrays import stored_type
from kvstore.artifact import Stored, policy_of, tier_chain
from kvstore.codecs import codec_of
from kvstore.device.path import DevicePath, together
from kvstore.device.ready import Ready
from kvstore.device.staging import Courier
from kvstore.device.streams import Streams, streams_of
from kvstore.devices import free_memory, known_device
from kvstore.errors import IncompatibleError, KvstoreError, ResourceError
from kvstore.families.rope import Angles, cos_sin, rotate
from kvstore.families.states import States, states_from
from kvstore.hot import Recent
from kvstore.manifest import Layout, RopeRecord, Tier

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KV = tuple[torch.Tensor, torch.Tensor]
_ALONE = 32  # tokens up to which one thread decodes
_SLAB = 4  # layers of a GPU's cache that lie side by side: one launch writes them all, and few enough that a cache that grows soon frees them
_KEPT = 1 << 18  # positions up to which a table of cosines is kept: 64 MiB for heads of 128 in bfloat16


def allocate(layout: Layout, tokens: int, device: torch.device | str = "cpu") -> list[KV]:
    """Per layer keys and values [1, kv_heads, tokens, channels of each] in the model's dtype, uninitialised.

    Raises ResourceError where memory is short.
    """
    dtype, device = TORCH[layout.dtype], known_device(device)
    need = layout.values_per_token * tokens * dtype.itemsize
    if (free := free_memory(device)) is not None and need > free:
        raise ResourceError(
            f"the cache of {tokens:,} tokens takes {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free on {device}",
            remedy="load fewer documents or passages",
        )
    k, v = ((1, layout.kv_heads, tokens, width) for width in layout.widths)
    with torch.inference_mode(False):  # the tensors outlive the caller's mode
        if device.type == "cuda" and k == v:
            slabs = (torch.empty((min(_SLAB, layout.layers - i), 2, *k), dtype=dtype, device=device) for i in range(0, layout.layers, _SLAB))
            return [(both[0], both[1]) for slab in slabs for both in slab]
        return [(torch.empty(k, dtype=dtype, device=device), torch.empty(v, dtype=dtype, device=device)) for _ in range(layout.layers)]


def stored_states(stored: Stored, device: torch.device | str = "cpu") -> States:
    """The recurrent states at the end of a stored segment, exact at every tier; () for models that have none. Raises IntegrityError."""
    pack = stored.pack
    return states_from(pack.layout, pack.state(stored.segment), device) if pack.layout.state else ()


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
    """Decodes artifacts into caches, several groups of layers at a time. One object may serve many threads.

    `host_cache`: bytes of decoded units, in the model's dtype and before rotation, that are kept for the next time.
    """

    def __init__(self, workers: int | None = None, host_cache: int = 0):
        self.workers = workers or os.cpu_count() or 1
        self.hot: Recent[npt.NDArray[Any]] = Recent(host_cache, lambda values: values.nbytes)
        self._owned: tuple[int, ThreadPoolExecutor] | None = None
        self._scratch, self._turns, self._courier = Scratch(), AngleTables(), Courier()
        self._streams: dict[torch.device, Streams] = {}
        self._paths: dict[torch.device, DevicePath] = {}
        self._opening = threading.Lock()

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
        for ready in self.start([piece], cache, masked=masked):
            ready.finish()

    def start(self, pieces: Sequence[Piece], cache: Sequence[KV], *, masked: bool = False) -> list[Ready]:
        """`decode` of several pieces. What a GPU decodes by itself is on its way when this returns: `Pending(cache, readies)` waits for it, and only
        then can damage be known. The rest is done. Raises as `decode` does.
        """
        for piece in pieces:
            _require_readable(piece, masked)
        path = self._path(cache[0][0].device)
        theirs = [piece for piece in pieces if path is not None and path.takes(piece)]
        readies = [self._send(path, same, cache) for same in together(theirs)] if path is not None else []
        for piece in pieces:
            if piece not in theirs:
                self._decode(piece, cache)
        return readies

    def _path(self, device: torch.device) -> DevicePath | None:
        """The way of units to a GPU; None for the CPU, where they are decoded."""
        if device.type != "cuda":
            return None
        streams = self._streams_of(device)
        with self._opening:
            if device not in self._paths:
                self._paths[device] = self._new_path(streams)
            return self._paths[device]

    def _streams_of(self, device: torch.device) -> Streams:
        with self._opening:
            if device not in self._streams:
                self._streams[device] = streams_of(device)
            return self._streams[device]

    def _new_path(self, streams: Streams) -> DevicePath:
        def table(rope: RopeRecord, dtype: torch.dtype, count: int) -> Angles:
            return self._turns.take(rope, 0, count, dtype, streams.device)

        return DevicePath(streams, self._pool, table)

    def _send(self, path: DevicePath, pieces: Sequence[Piece], cache: Sequence[KV]) -> Ready:
        checks = {(p.stored.segment.key, t.array): (p.stored, t.array) for p in pieces for t in tier_chain(p.stored.encoding, p.tier)}
        return path.load(pieces, cache, [self._pool.submit(stored.pack.check_once, stored.segment, array) for stored, array in checks.values()])

    def _decode(self, piece: Piece, cache: Sequence[KV]) -> None:
        """On the CPU."""
        stored, tiers = piece.stored, tier_chain(piece.stored.encoding, piece.tier)
        job = _Job(piece, tiers, cache, self._scratch, self._turns, self.hot, _Way(self._streams_of(cache[0][0].device), self._courier))
        work = [partial(stored.pack.check_once, stored.segment, t.array) for t in tiers]
        work += [partial(job.unit, g, b) for g in range(stored.pack.groups) for b in job.blocks]
        if piece.count <= _ALONE:  # handing work to threads would take longer than doing it
            for step in work:
                step()
            return
        for done in [self._pool.submit(step) for step in work]:
            done.result()

    def warm_up(self, stored: Stored, device: torch.device | str = "cpu") -> threading.Thread:
        """Load (or compile) what decoding to `device` needs, in the background: compiled kernels take half a second of a process's first load."""

        def work() -> None:
            # a damaged artifact is for the load that wants it to report; RuntimeError: the process ends already
            with suppress(KvstoreError, RuntimeError):
                for tier in stored.encoding.tiers:
                    count = min(stored.segment.tokens, 2 * _ALONE)
                    self.decode(Piece(stored, tier.name, count, 0, 0), allocate(stored.pack.layout, count, device), masked=True)

        thread = threading.Thread(target=work, name="kvstore-warm-up")
        thread.start()
        return thread


def _require_readable(piece: Piece, masked: bool) -> None:
    stored, limit = piece.stored, piece.stored.pack.layout.rope_limit
    if limit is not None and piece.position + piece.count > limit:
        raise IncompatibleError(
            f"keys up to position {piece.position + piece.count - 1} were asked for, those stored hold for prompts of up to {limit} tokens",
            remedy="give fewer documents: beyond that length this model's RoPE has other frequencies",
            code="rope",
        )
    if not masked and stored.drops(piece.tier):
        raise IncompatibleError(
            f"tier {piece.tier!r} lacks dropped tokens ({policy_of(stored.encoding, piece.tier)}), which only attention that masks them can read",
            remedy="compose or load it with a model, or take a tier without dropped tokens",
            code="unmasked",
        )


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


class AngleTables:
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


class _Way(NamedTuple):
    """How decoded values come to the cache's device."""

    streams: Streams
    courier: Courier


class _Job:
    """One piece on its way into a cache. Units are decoded, cast, transposed and rotated one by one, by whichever thread takes them."""

    def __init__(
        self, piece: Piece, tiers: Sequence[Tier], cache: Sequence[KV], scratch: Scratch, turns: AngleTables, hot: Recent[npt.NDArray[Any]], way: _Way
    ):
        self.piece, self.cache, self.pack, self.scratch = piece, cache, piece.stored.pack, scratch
        self.layout, self.block = self.pack.layout, piece.stored.encoding.block_tokens
        self.hot, self.name = hot, (piece.stored.id, piece.tier) if hot.budget else None
        self.units = [self.pack.units(piece.stored.segment, t.array) for t in tiers]
        spec = piece.stored.encoding.codec(tiers[-1].codec)
        self.codec = codec_of(spec, piece.stored.encoding, self.layout)
        self.dtype, self.device = TORCH[self.layout.dtype], cache[0][0].device
        self.way, self.stream = way, way.streams.current()  # the caller's: threads of a pool have others
        self.decoded = np.dtype(stored_type(tiers[-1], self.layout.dtype)[0])
        self.blocks = range(piece.first // self.block, -(-(piece.first + piece.count) // self.block))
        self.positions = torch.arange(piece.position, piece.position + piece.count)
        self.angles = [turns.take(rope, piece.position, piece.count, self.dtype, self.device) for rope in self.layout.ropes]

    def unit(self, group: int, block: int) -> None:
        """Decode one unit and put what is wanted of it into the cache."""
        layers, start = self.pack.group_layers(group), block * self.block
        tokens = min(self.block, self.piece.stored.segment.tokens - start)
        values = self._values(group, block, (len(layers), 2, tokens, self.layout.channels))
        first, last = max(start, self.piece.first), min(start + tokens, self.piece.first + self.piece.count)
        rows = slice(first - self.piece.first, last - self.piece.first)
        with self.way.streams.on(self.stream):
            for layer, kv in zip(layers, values[:, :, first - start : last - start], strict=True):
                self._place(layer, kv, rows)

    def _values(self, group: int, block: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A decoded unit [layers, 2, tokens, channels]: the one that was kept, or decoded now into memory that this thread takes again."""
        kept = None if self.name is None else self.hot.get((*self.name, group, block))
        if kept is not None:
            return kept
        values = self.scratch.take("values", shape, self.decoded)
        self.codec.decode([tier[group][block] for tier in self.units], values)
        if self.name is not None:
            self.hot.put((*self.name, group, block), self._narrow(values))
        return values

    def _narrow(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy in the model's dtype, as bits where numpy has none: the rounding that placing does first."""
        if values.dtype != np.float32 or self.dtype == torch.float32:
            return values.copy()
        bits: npt.NDArray[Any] = torch.from_numpy(values).to(self.dtype).view(torch.int16).numpy().view(np.uint16)
        return bits

    def _place(self, layer: int, kv: npt.NDArray[Any], rows: slice) -> None:
        """The stored pair [2, tokens, channels] of one layer into the piece's `rows`: unfolded, and what RoPE turns of it rotated."""
        into = [t[0, :, self.piece.at + rows.start : self.piece.at + rows.stop] for t in self.cache[layer]]
        pair, rope = self._unfolded(kv), self.layout.rope_of[layer]
        for kind in (0, 1):
            if rope is None or kind != self.layout.turned:
                self._put(pair[kind], None, None, rows, into[kind])
            else:
                angles = Angles(self.angles[rope].cos[rows], self.angles[rope].sin[rows])
                self._put(pair[kind], angles, self.layout.ropes[rope], rows, into[kind])

    def _put(self, values: npt.NDArray[Any], angles: Angles | None, record: RopeRecord | None, rows: slice, into: torch.Tensor) -> None:
        """Values [tokens, kv_heads * width] into a cache's [kv_heads, tokens, width]."""
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            _place_compiled(self._wide(values), angles, record, into)
            return
        given = self._tensor(values, into.shape[-1])
        if self.device.type == "cuda":
            given = self.way.courier.send(given, self.way.streams)
        if angles is None or record is None:
            into.copy_(given)
        else:
            rotate(given.to(self.device), self.positions[rows], record, out=into, angles=angles)

    def _unfolded(self, kv: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        """Keys and values as they are cached, from the two stored halves of latent attention; else as they are."""
        if self.layout.latent is None:
            return kv[0], kv[1]
        whole, width = np.concatenate((kv[0], kv[1]), axis=1), self.layout.latent[0]
        return np.ascontiguousarray(whole[:, :width]), np.ascontiguousarray(whole[:, width:])

    def _wide(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """bfloat16 bits as float32 of the same value, in memory that the next call takes again; float32 as it is."""
        from kvstore.placing import widen

        if values.dtype == np.float32:
            return values
        return widen(values, self.scratch.take("wide", values.shape, np.uint32))

    def _tensor(self, values: npt.NDArray[Any], width: int) -> torch.Tensor:
        """[kv_heads, tokens, width] in the model's dtype, from [tokens, kv_heads * width]."""
        if values.dtype == np.float32:
            plain = torch.from_numpy(values).to(self.dtype)
        else:
            plain = torch.from_numpy(values.view(np.int32 if values.itemsize == 4 else np.int16)).view(self.dtype)
        return plain.view(len(values), self.layout.kv_heads, width).transpose(0, 1)


def _place_compiled(values: npt.NDArray[np.float32], angles: Angles | None, record: RopeRecord | None, into: torch.Tensor) -> None:
    """[tokens, channels] into a bfloat16 CPU tensor [kv_heads, tokens, head_dim]."""
    from kvstore.placing import place

    none = np.empty((len(values), 0), np.float32)
    cos, sin = (none, none) if angles is None else (angles.cos.float().numpy(), angles.sin.float().numpy())
    start, interleaved, wide = (0, False, False) if record is None else (record.start, record.layout == "interleaved", record.arithmetic != "model")
    place(values, cos, sin, start, interleaved, wide, into.view(torch.int16).numpy().view(np.uint16))
