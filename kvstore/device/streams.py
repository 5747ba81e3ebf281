"""Queues of work on a device behind one small interface: CUDA's streams, or none at all, where everything is done at once.

Everything that the pipeline tells a stream also says which buffers are read and written. CUDA ignores that; a test's streams check by it that no
buffer is used again before the work on it has ended.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

Stream = Any
Event = Any


class Streams(Protocol):
    """Streams of one device. `None` as a stream is the host itself."""

    device: torch.device

    def open(self, name: str) -> Stream:
        """The stream of that name, made at the first call."""

    def current(self) -> Stream:
        """The one on which the caller works."""

    @contextmanager
    def on(self, stream: Stream | None, *, reads: Sequence[Hashable] = (), writes: Sequence[Hashable] = ()) -> Iterator[None]:
        """What is launched within goes to `stream`."""

    def record(self, stream: Stream) -> Event:
        """An event that occurs when all that was launched on `stream` is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is launched on `stream` from now on begins after `event`. The host goes on."""

    def lend(self, tensor: Tensor, stream: Stream) -> None:
        """When nobody holds `tensor` any more, its memory goes to others only after what was launched on `stream` until then."""

    def occurred(self, event: Event) -> bool: ...

    def join(self, event: Event) -> None:
        """The host waits for `event`."""

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory that the device copies from and to by itself."""


class InlineStreams:
    """The CPU: nothing is queued, every event has occurred."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def open(self, name: str) -> Stream:
        return name

    def current(self) -> Stream:
        return "current"

    @contextmanager
    def on(self, stream: Stream | None, *, reads: Sequence[Hashable] = (), writes: Sequence[Hashable] = ()) -> Iterator[None]:
        yield

    def record(self, stream: Stream) -> Event:
        return None

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def lend(self, tensor: Tensor, stream: Stream) -> None:
        pass

    def occurred(self, event: Event) -> bool:
        return True

    def join(self, event: Event) -> None:
        pass

    def pinned(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # the buffer outlives the caller's mode
            return torch.empty(nbytes, dtype=torch.uint8)


class CudaStreams:
    """Streams of a CUDA device; they belong to this object and are kept as long as it."""

    def __init__(self, device: torch.device | str):
        found = torch.device(device)
        self.device = torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
        self._streams: dict[str, Stream] = {}

    def open(self, name: str) -> Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(self.device)
        return self._streams[name]

    def current(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    @contextmanager
    def on(self, stream: Stream | None, *, reads: Sequence[Hashable] = (), writes: Sequence[Hashable] = ()) -> Iterator[None]:
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield

    def record(self, stream: Stream) -> Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(event)

    def lend(self, tensor: Tensor, stream: Stream) -> None:
        tensor.record_stream(stream)

    def occurred(self, event: Event) -> bool:
        return bool(event.query())

    def join(self, event: Event) -> None:
        event.synchronize()

    def pinned(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # the buffer outlives the caller's mode
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else InlineStreams(device)
