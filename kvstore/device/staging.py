"""Pinned host memory on the way to a device, used in turn: each buffer again only when the copy out of it has ended."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.device.streams import Event, Stream, Streams

Words = npt.NDArray[np.uint32]
_LEAST = 1 << 18  # bytes of the first buffer: pinning takes as long as copying, so growing should be rare


@dataclass
class Slot:
    """A host buffer and what the device has made of it. `copied`: the copy out of `host` has ended. `free`: the device is done with all of it."""

    number: int
    host: Tensor | None = None
    copied: Event = None
    free: Event = None
    held: list[object] = field(default_factory=list)  # what the device may still read: memory goes back to the stream that it came from

    @property
    def host_name(self) -> tuple[str, int]:
        return ("host", self.number)

    @property
    def device_name(self) -> tuple[str, int]:
        return ("device", self.number)


class Staging:
    """`count` slots, taken in turn. Not for several threads at once, except that each slot's own calls may come from any one thread."""

    def __init__(self, streams: Streams, count: int):
        self.streams, self.slots = streams, [Slot(i) for i in range(count)]
        self._next = 0

    def take(self) -> Slot:
        """The slot whose turn it is."""
        slot = self.slots[self._next]
        self._next = (self._next + 1) % len(self.slots)
        return slot

    def words(self, slot: Slot, count: int) -> Words:
        """uint32 [count] of the slot's host memory to write to, once the device has copied what was there. What was in it is lost."""
        if slot.copied is not None:
            self.streams.join(slot.copied)
            slot.copied = None
        if slot.host is None or slot.host.numel() < 4 * count:
            slot.host = self.streams.pinned(max(_LEAST, 5 * count))  # a quarter more than is needed
        return slot.host.numpy()[: 4 * count].view(np.uint32)

    def grow(self, slot: Slot, words: Words, count: int) -> Words:
        """The same memory, or more of it with the same beginning, where `count` words are needed after all."""
        if slot.host is not None and slot.host.numel() >= 4 * count:
            return slot.host.numpy()[: 4 * count].view(np.uint32)
        slot.host = self.streams.pinned(5 * count)
        wider = slot.host.numpy()[: 4 * count].view(np.uint32)
        wider[: len(words)] = words
        return wider

    def send(self, slot: Slot, count: int, stream: Stream) -> Tensor:
        """int32 [count] on the device: the slot's first words, copied by `stream`."""
        if slot.host is None:
            raise RuntimeError("nothing was staged")
        with self.streams.on(stream, reads=[slot.host_name], writes=[slot.device_name]):
            found = slot.host[: 4 * count].view(torch.int32).to(self.streams.device, non_blocking=True, copy=True)
        slot.copied = self.streams.record(stream)
        return found


class Courier(threading.local):
    """Tensors that the CPU made, to a device through pinned memory, each thread by two buffers of its own: it fills one while the other is copied."""

    def __init__(self) -> None:
        self._stagings: dict[Streams, Staging] = {}

    def send(self, values: Tensor, streams: Streams) -> Tensor:
        """`values` on the device, copied by the stream that the caller works on; they may be changed when this returns."""
        staging = self._stagings.setdefault(streams, Staging(streams, 2))
        slot, nbytes = staging.take(), values.numel() * values.element_size()
        staging.words(slot, -(-nbytes // 4))
        if slot.host is None:
            raise RuntimeError("nothing was staged")
        with streams.on(None, writes=[slot.host_name]):
            slot.host[:nbytes].view(values.dtype).view(values.shape).copy_(values)
        sent = staging.send(slot, -(-nbytes // 4), streams.current())
        return sent.view(torch.uint8)[:nbytes].view(values.dtype).view(values.shape)
