"""Tasks to units. One by one; or in batches of one context and like length, on a GPU encoded in the background while the next batch is prefilled.

Whatever the order of the work, documents leave in the order in which they came: packs and snapshots are the same, and a kill costs no more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from kvstore.device.streams import Event, Streams, streams_of
from kvstore.encode import Encoder, Units
from kvstore.families.states import state_bytes
from kvstore.plan import Planned, Task
from kvstore.policies import Assignment
from kvstore.prefill import KV, Chain, Prefiller
from kvstore.viewing import Assign

BATCH_TOKENS = 16384  # of a GPU's batch, padding and context included
WINDOW = 4  # batches' worth of tasks that are looked over for like lengths
AHEAD = 2  # batches whose values may wait for the encoder
Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Compiled:
    """A segment, ready to be written: its units, and the bytes of the recurrent states at its end."""

    units: Units
    state: bytes | None


class Compiler:
    """One task after the other: prefill, policy, encoding."""

    def __init__(self, prefiller: Prefiller, encoder: Encoder, assign: Assign, timed: Timed):
        self.prefiller, self.encoder, self.assign, self.timed = prefiller, encoder, assign, timed

    def one(self, task: Task) -> Compiled:
        with self.timed("prefill"):
            captured = self.prefiller.capture(task.ids, task.chain, keep=task.followed)
        with self.timed("policy"):
            assigned = self.assign(task.ids, task.chain)
        with self.timed("encode"):
            units = self.encoder.encode_values(captured.layers, assigned)
        return Compiled(units, state_bytes(self.prefiller.layout, captured.states))


Write = Callable[[Task, Compiled], None]
Finish = Callable[[Planned], None]


class Line:
    """Documents one by one: each task is written as soon as it is compiled, and the document finished after its last one."""

    def __init__(self, compiler: Compiler, write: Write, finish: Finish):
        self.compiler, self.write, self.finish = compiler, write, finish

    def put(self, planned: Planned) -> None:
        for task in planned.tasks:
            self.write(task, self.compiler.one(task))
        self.finish(planned)

    def end(self) -> None:
        """Everything that was put in is done when this returns."""

    def close(self) -> None:
        """Forget what is not done."""


class BatchLine(Line):
    """Documents in batches of at most `tokens` tokens. K and V equal those of `Line` up to rounding.

    `background`: another thread encodes. Where the CPU prefills it would only take its cores away.
    """

    def __init__(self, compiler: Compiler, write: Write, finish: Finish, tokens: int, background: bool):
        super().__init__(compiler, write, finish)
        self.tokens, self.background = tokens, background
        self._documents: deque[Planned] = deque()
        self._fresh: list[Task] = []
        self._results: dict[str, Future[Compiled]] = {}
        self._encoding: deque[list[Future[Compiled]]] = deque()
        self._devices: dict[torch.device, Streams] = {}
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="kvstore-encode")

    def put(self, planned: Planned) -> None:
        self._documents.append(planned)
        self._fresh += planned.tasks
        if sum(len(task.ids) for task in self._fresh) >= WINDOW * self.tokens:
            self._compile()
        self._leave(waiting=False)

    def end(self) -> None:
        self._compile()
        self._leave(waiting=True)
        self.close()

    def close(self) -> None:
        self._encoder.shutdown(wait=True, cancel_futures=True)

    def _compile(self) -> None:
        """Prefill all that came in since the last time. Values of `AHEAD` batches at most wait for the encoder."""
        fresh, self._fresh = self._fresh, []
        for batch in batches(fresh, self.tokens):
            while len(self._encoding) >= AHEAD:
                with self.compiler.timed("encode"):
                    wait(self._encoding.popleft())
            self._encoding.append(self._prefill(batch))

    def _prefill(self, batch: Sequence[Task]) -> list[Future[Compiled]]:
        prefiller, timed = self.compiler.prefiller, self.compiler.timed
        with timed("prefill"):
            rows = prefiller.run_rows([task.ids for task in batch], batch[0].chain)
            devices = [self._streams(device) for device in {keys.device for keys, _ in rows[0]}]
            there = [streams.record(streams.current()) for streams in devices]
        with timed("policy"):
            assigned = [self.compiler.assign(task.ids, task.chain) for task in batch]
        done = [self._submit(partial(self._encode, *job, there)) for job in zip(rows, assigned, strict=True)]
        self._results |= {task.key: future for task, future in zip(batch, done, strict=True)}
        return done

    def _submit(self, job: Callable[[], Compiled]) -> Future[Compiled]:
        if self.background:
            return self._encoder.submit(job)
        done: Future[Compiled] = Future()
        with self.compiler.timed("encode"):
            done.set_result(job())
        return done

    def _streams(self, device: torch.device) -> Streams:
        if device not in self._devices:
            self._devices[device] = streams_of(device)
        return self._devices[device]

    def _encode(self, layers: list[KV], assigned: Assignment | None, there: Sequence[Event]) -> Compiled:
        """On the encoder's thread and, on a GPU, its own stream; the device is done with `layers` when this returns."""
        streams = self._streams(layers[0][0].device)
        stream = streams.open("encode")
        for event in there:
            streams.wait(stream, event)
        with torch.no_grad(), streams.on(stream):
            units = self.compiler.encoder.encode_values(layers, assigned)
            streams.join(streams.record(stream))
        return Compiled(units, None)

    def _leave(self, waiting: bool) -> None:
        """Write and finish the documents at the head of the line that are done, or, `waiting`, all."""
        while self._documents:
            tasks = self._documents[0].tasks
            done = [self._results.get(task.key) for task in tasks]
            if not waiting and not all(future is not None and future.done() for future in done):
                return
            for task in tasks:
                with self.compiler.timed("encode"):
                    found = self._results.pop(task.key).result()
                self.write(task, found)
            self.finish(self._documents.popleft())


def batches(tasks: Iterable[Task], tokens: int) -> Iterator[list[Task]]:
    """Tasks of one chain and like length, together with it and padding at most `tokens` long, but at least one a batch."""
    by_chain: dict[Chain, list[Task]] = {}
    for task in tasks:
        by_chain.setdefault(task.chain, []).append(task)
    for chain, mine in by_chain.items():
        mine.sort(key=lambda task: len(task.ids))
        before = sum(map(len, chain))
        while mine:
            width = before + len(mine[-1].ids)
            count = max(1, tokens // width)
            yield mine[-count:]
            del mine[-count:]
