"""From mapped units to the tensors of a cache on a device, group of layers by group of layers, several on their way at once.

The host copies a group's records into pinned memory and plans them; one stream copies them over, each slot's own stream decodes the symbols, one
stream multiplies, rotates and writes. Nobody waits but the next in line, and the host only before it uses pinned memory again. What is on its way
is bounded by the number of slots, which are fewer where memory is short.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.device.placement import Target
from kvstore.device.ready import KV, Ready, Verify
from kvstore.device.staging import Slot, Staging
from kvstore.device.streams import Streams
from kvstore.device.wanted import Wanted
from kvstore.devices import free_memory
from kvstore.errors import ResourceError
from kvstore.families.rope import Angles

SLOTS = 4  # groups on their way: the entropy decoder's time is one stream's latency, and only other groups fill the device meanwhile
I64 = npt.NDArray[np.int64]


class OnDevice(Protocol):
    """`device.codec.TransformOnDevice`, or what a test puts in its place. A plan's `table` (int32) goes to the device behind the words."""

    def group_bytes(self, group: int) -> int: ...
    def plan(self, words: npt.NDArray[np.uint32], spans: I64, tokens: I64, group: int) -> Any: ...
    def work_bytes(self, plan: Any) -> int: ...
    def decode(self, plan: Any, words: Tensor, table: Tensor) -> Any: ...
    def fill(self, levels: Any, target: Any, caches: Sequence[KV], ropes: Sequence[Any], angles: Sequence[Angles | None]) -> None: ...
    def check(self, flags: Any, names: Sequence[str] | None = None) -> None: ...


@dataclass
class Staged:
    """One group in pinned memory: `words` records' words, then the plan's table."""

    plan: Any
    words: int
    work_bytes: int

    @property
    def count(self) -> int:
        return self.words + len(self.plan.table)

    @property
    def nbytes(self) -> int:
        """On the device, until the group is in the cache."""
        return 4 * self.count + self.work_bytes


class Pipeline:
    """Loads into caches on one device. `pool` stages groups ahead; loads of several threads take turns in launching, not in running."""

    def __init__(self, streams: Streams, pool: Executor, slots: int = SLOTS):
        self.streams, self.pool = streams, pool
        self._staging = Staging(streams, slots)
        self._lock = threading.Lock()
        self._latest: Ready | None = None
        self._loaded: set[tuple[OnDevice, int]] = set()  # whose matrices are on the device

    def load(self, on: OnDevice, wanted: Wanted, cache: Sequence[KV], angles: Sequence[Angles | None], checks: Sequence[Future[None]] = ()) -> Ready:
        """Start filling `cache`; what is returned says when which layer is there. `angles` by layer, of positions from 0.

        `checks` end before the cache may be believed. Raises ResourceError, and IntegrityError for what the host sees already.
        """
        layout = wanted.layout
        ready = Ready(self.streams, [layer // wanted.encoding.group_layers for layer in range(layout.layers)], checks=list(checks))
        with self._lock:
            run = _Run(self, on, wanted, cache, angles, ready)
            ready.done = lambda: self._release(ready)
            self._latest = ready
            run.go()
        return ready

    def _release(self, ready: Ready) -> None:
        """Give back what a load held on the device, unless another load has taken the slots since."""
        with self._lock:
            if self._latest is ready:
                for slot in self._staging.slots:
                    slot.held.clear()


class _Run:
    """One load, while it is being launched."""

    def __init__(self, pipeline: Pipeline, on: OnDevice, wanted: Wanted, cache: Sequence[KV], angles: Sequence[Angles | None], ready: Ready):
        self.streams, self.pool, self.staging = pipeline.streams, pipeline.pool, pipeline._staging
        self.loaded = pipeline._loaded
        self.on, self.wanted, self.cache, self.angles, self.ready = on, wanted, cache, angles, ready
        self.copying, self.filling = self.streams.open("copy"), self.streams.open("fill")
        self.target = Target(wanted.row, wanted.position, wanted.first, wanted.end)
        self.groups = wanted.pack.groups
        self.each = 0  # bytes that a slot's group takes on the device, at most

    def go(self) -> None:
        """Stage and launch every group, the staging `slots` groups ahead."""
        self._borrow()
        first = self._stage(self.staging.slots[0], 0)
        slots = self.staging.slots[: self._affordable(first)]
        with self._ahead(slots, first) as staged:
            for group in range(self.groups):
                found = staged(group)
                self._grown(found, len(slots))
                self._launch(group, slots[group % len(slots)], found)

    def _borrow(self) -> None:
        """The cache's memory may have had another use until now, and may get another one as soon as the caller loses interest."""
        self.streams.wait(self.filling, self.streams.record(self.streams.current()))
        turned = [t for angles in self.angles if angles is not None for t in (angles.cos, angles.sin)]
        for tensor in [*(t for kv in self.cache for t in kv), *turned]:
            self.streams.lend(tensor, self.filling)

    def _affordable(self, first: Staged) -> int:
        """How many slots fit in memory. The first group stands for all: they are of one size. Raises ResourceError."""
        bases = sum(self.on.group_bytes(group) for group in range(self.groups) if (self.on, group) not in self.loaded)
        count = min(len(self.staging.slots), self.groups)
        free = free_memory(self.streams.device)
        while free is not None and count > 1 and bases + count * first.nbytes > free:
            count -= 1
        need = bases + count * first.nbytes
        if free is not None and need > free:
            raise _short(need, free, self.streams.device)
        self.each = first.nbytes
        self.ready.peak_nbytes = need + sum(t.numel() * t.element_size() for kv in self.cache for t in kv)
        return count

    def _grown(self, staged: Staged, slots: int) -> None:
        """A group that takes more than the first one did. Raises ResourceError."""
        if staged.nbytes <= self.each:
            return
        free = free_memory(self.streams.device)
        if free is not None and staged.nbytes > free:
            raise _short(staged.nbytes, free, self.streams.device)
        self.ready.peak_nbytes += slots * (staged.nbytes - self.each)
        self.each = staged.nbytes

    @contextmanager
    def _ahead(self, slots: Sequence[Slot], first: Staged) -> Iterator[Callable[[int], Staged]]:
        """Staged groups, in order; each slot is staged anew as soon as its group before was launched."""
        waiting: dict[int, Future[Staged]] = {}

        def submit(group: int) -> None:
            if group < self.groups:
                waiting[group] = self.pool.submit(self._stage, slots[group % len(slots)], group)

        def take(group: int) -> Staged:
            if group:
                submit(group - 1 + len(slots))  # its slot was launched just now
                return waiting.pop(group).result()
            for ahead in range(1, len(slots)):
                submit(ahead)
            return first

        try:
            yield take
        finally:
            for left in waiting.values():  # nobody may write to a slot once another load may take it
                left.exception()

    def _stage(self, slot: Slot, group: int) -> Staged:
        """Put a group's records and its plan's table into the slot's pinned memory."""
        count = self.wanted.count(group)
        words = self.staging.words(slot, count)
        with self.streams.on(None, writes=[slot.host_name]):
            plan = self.on.plan(words, self.wanted.stage(group, words), self.wanted.tokens, group)
            whole = self.staging.grow(slot, words, count + len(plan.table))
            whole[count:] = plan.table.view(np.uint32)
        return Staged(plan, count, self.on.work_bytes(plan))

    def _launch(self, group: int, slot: Slot, staged: Staged) -> None:
        decoding = self.streams.open(f"decode {slot.number}")
        self._reuse(slot)
        sent = self.staging.send(slot, staged.count, self.copying)
        self.streams.wait(decoding, slot.copied)
        with self.streams.on(decoding, reads=[slot.device_name], writes=[("levels", slot.number)]):
            levels = self.on.decode(staged.plan, sent[: staged.words], sent[staged.words :])
        self.streams.wait(self.filling, self.streams.record(decoding))
        layers = self.wanted.pack.group_layers(group)
        with self.streams.on(self.filling, reads=[slot.device_name, ("levels", slot.number)], writes=[place_of(self.cache, i) for i in layers]):
            self.on.fill(levels, self.target, [self.cache[i] for i in layers], self._ropes(layers), [self.angles[i] for i in layers])
            verify = self._verify(group, levels.flags)
        self.loaded.add((self.on, group))
        slot.held += [sent, levels]
        slot.free = self.streams.record(self.filling)
        self.ready.add(slot.free, verify)

    def _reuse(self, slot: Slot) -> None:
        """The stream that copies, and with it the one that decodes what was copied, goes on after the end of the slot's last group: only then may the
        memory that this had go back to them."""
        if slot.free is not None:
            self.streams.wait(self.copying, slot.free)
        slot.held.clear()

    def _ropes(self, layers: range) -> list[Any]:
        layout = self.wanted.layout
        return [None if (rope := layout.rope_of[i]) is None else layout.ropes[rope] for i in layers]

    def _verify(self, group: int, flags: Tensor) -> Verify:
        """To be called when the group's event has occurred."""
        host = self.streams.pinned(flags.numel() * flags.element_size()).view(flags.dtype)
        host.copy_(flags.view(-1), non_blocking=True)
        names = [f"{name}, group {group}" for name in self.wanted.names]
        return lambda: self.on.check(host, names)


def _short(need: int, free: int, device: torch.device) -> ResourceError:
    return ResourceError(
        f"decoding groups of layers takes {need / 2**20:,.0f} MiB beside the cache, {free / 2**20:,.0f} MiB are free on {device}",
        remedy="load fewer documents or passages, or on the CPU",
    )


def place_of(cache: Sequence[KV], layer: int) -> tuple[str, int]:
    """What a layer's memory is called among buffers."""
    return ("cache", cache[layer][0].data_ptr())


def angles_of(wanted: Wanted, table: Callable[[Any, int], Angles]) -> list[Angles | None]:
    """By layer, of positions from 0 to the last one wanted. `table(rope, count)` makes those of one rope."""
    layout, needed = wanted.layout, int((wanted.position + wanted.end).max())
    made = [table(rope, needed) for rope in layout.ropes]
    return [None if rope is None else made[rope] for rope in layout.rope_of]
