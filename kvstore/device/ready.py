"""A cache on its way: which groups of layers are there, and who may read them already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from kvstore.device.streams import Event, Streams
from kvstore.errors import KvstoreError

KV = tuple[torch.Tensor, torch.Tensor]
Verify = Callable[[], None]


@dataclass
class Ready:
    """The groups of one load, in order. `group_of[layer]` is a layer's group.

    A group is usable on the caller's stream after `follow` (the device waits), and on the host's word after `join`, which also has its flags read:
    a damaged unit is told from them alone. Nobody can have drawn a conclusion from a cache before its last group was followed, and that joins all.
    """

    streams: Streams
    group_of: Sequence[int]
    peak_nbytes: int = 0  # on the device at most: the cache and what was there to decode it
    checks: list[Future[None]] = field(default_factory=list)  # digests of what was read, on other threads
    done: Callable[[], None] = lambda: None
    events: list[Event] = field(default_factory=list)
    verifies: list[Verify] = field(default_factory=list)
    _joined: set[int] = field(default_factory=set)
    _finished: bool = False
    damaged: bool = False

    def add(self, event: Event, verify: Verify) -> None:
        """The next group: `event` occurs when it is in the cache; `verify` then raises IntegrityError where a unit of it was damaged."""
        self.events.append(event)
        self.verifies.append(verify)

    def follow(self, layer: int) -> None:
        """What the caller launches from now on finds this layer's values. Raises IntegrityError, at the latest for the last layer."""
        group = self.group_of[layer]
        if group == len(self.events) - 1:
            self.finish()
        elif group in self._joined or self.streams.occurred(self.events[group]):
            self.join(group)
        else:
            self.streams.wait(self.streams.current(), self.events[group])

    def join(self, group: int) -> None:
        """The host waits for a group. Raises IntegrityError where a unit of it was damaged."""
        if group not in self._joined:
            self.streams.join(self.events[group])
            self.verifies[group]()
            self._joined.add(group)

    def finish(self) -> None:
        """The host waits for everything. Raises IntegrityError."""
        if self._finished:
            return
        try:
            for check in self.checks:
                check.result()
            for group in range(len(self.events)):
                self.join(group)
        except KvstoreError:
            self.damaged = True
            raise
        self.done()
        self._finished = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Ready:
        return self


class Pending(Sequence[KV]):
    """The layers of a cache on its way, (keys, values) each: taking one waits until all are there and sound. `tensors`: not waited for."""

    def __init__(self, tensors: Sequence[KV], readies: Sequence[Ready]):
        self.tensors, self.readies = tuple(tensors), tuple(readies)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, at: Any) -> Any:
        return tuple(self)[at]  # what is taken leaves our hands: all digests must have been compared

    def __iter__(self) -> Iterator[KV]:
        for ready in self.readies:
            ready.finish()
        return iter(self.tensors)

    @property
    def damaged(self) -> bool:
        """Whether someone who waited was told so."""
        return any(ready.damaged for ready in self.readies)

    @property
    def peak_nbytes(self) -> int:
        return max(ready.peak_nbytes for ready in self.readies)

    def follow(self, layer: int) -> None:
        """See `Ready.follow`."""
        for ready in self.readies:
            ready.follow(layer)
