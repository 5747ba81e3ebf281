"""What the killed process does: build a corpus that changes from generation to generation, and collect in between.

It follows the builder's order: add segments, close the pack, commit the rows, and only then report them as stored.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvstore.gc import collect
from kvstore.manifest import Row
from kvstore.snapshot import Change
from kvstore.store import Store
from tests.synthetic import ENCODING, Document, Task, make_store, make_units, new_writer

SEGMENTS = 4  # a pack closes at so many
CALLS = {"fsync": ("fsync",), "rename": ("rename",), "link": ("link",), "unlink": ("unlink", "rmdir")}
Say = Callable[[str], None]


def corpus(generation: int) -> list[Document]:
    """A dozen documents, of which a third is edited, one is gone and one is new in every generation."""
    return [Document(f"d{n}", (generation + n) // 3, (17,) if n % 3 else (9, 20)) for n in range(generation, generation + 12)]


class Trap:
    """Kills this process at the n-th call of one kind, before or after it does its work; counts the calls of every kind."""

    def __init__(self, kind: str = "", nth: int = 0, after: bool = False):
        self.kind, self.nth, self.after = kind, nth, after
        self.counts: dict[str, int] = dict.fromkeys((*CALLS, "encode", "gc"), 0)
        self.collecting = False

    def arm(self) -> None:
        for kind, names in CALLS.items():
            for name in names:
                setattr(os, name, self.watched(kind, getattr(os, name)))

    def watched(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            fatal = self._hit(kind)
            if fatal and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def _hit(self, kind: str) -> bool:
        kinds = {kind, "gc"} if self.collecting else {kind}
        for each in kinds:
            self.counts[each] += 1
        return self.kind in kinds and self.counts[self.kind] == self.nth

    @contextmanager
    def gc(self) -> Iterator[None]:
        self.collecting = True
        try:
            yield
        finally:
            self.collecting = False


class Builder:
    """One build of one generation. `say` reports what is made and what is stored."""

    def __init__(self, folder: Path, generation: int, say: Say, trap: Trap, gc_every: int):
        self.store = make_store(folder / "kv.zarr")
        self.documents, self.say, self.trap, self.gc_every = corpus(generation), say, trap, gc_every
        self.writer, self.waiting, self.flushes = new_writer(self.store.storage), list[Row](), 0
        self.taken: set[str] = set()
        self.encode = trap.watched("encode", self._encode)

    def run(self) -> None:
        self.store.refresh()
        before = {r.id: r for r in self.store.rows()}
        for document in self.documents:
            for task in document.tasks():
                self._compile(task)
            if document.row() != before.get(document.row().id):
                self.waiting.append(document.row())
            if len(self.writer.rows) >= SEGMENTS:
                self._flush(())
        wanted = {d.source for d in self.documents}
        self._flush(tuple(i for i in before if i[0] not in wanted))

    def _compile(self, task: Task) -> None:
        if task.key not in self.taken and not self.store.index.has(task.key, ENCODING.id):
            self.writer.add(task.key, task.context, task.ids, self.encode(task))
            self.say(f"made {task.key}")
        self.taken.add(task.key)

    @staticmethod
    def _encode(task: Task) -> dict[str, list[list[bytes]]]:
        hashlib.pbkdf2_hmac("sha256", b"as if", b"it were work", 300)
        return make_units(task.key, len(task.ids))

    def _flush(self, removed: tuple[tuple[str, str, str, str], ...]) -> None:
        self.writer.close()
        self.store.commit(Change(tuple(self.waiting), removed), "kill test")
        self.say("stored " + " ".join(r.source for r in self.waiting))
        if removed:
            self.say("removed " + " ".join(i[0] for i in removed))
        self.writer, self.waiting, self.flushes = new_writer(self.store.storage), [], self.flushes + 1
        if self.gc_every and self.flushes % self.gc_every == 0:
            self.collect()

    def collect(self) -> None:
        with self.trap.gc():
            collect(self.store, keep_snapshots=2, grace_seconds=0, rewrite_share=0.1)
        self.taken.clear()  # what was planned but not committed may be gone


def build(folder: Path, generation: int, say: Say, trap: Trap, gc_every: int) -> None:
    """Everything once; at the end `counts` says how often each kind of call was made."""
    trap.arm()
    Builder(folder, generation, say, trap, gc_every).run()
    say("counts " + " ".join(f"{k}={v}" for k, v in trap.counts.items()))


def collect_often(folder: Path, say: Say, trap: Trap, times: int = 6) -> None:
    """A collector beside builders, without any grace."""
    trap.arm()
    store = Store(folder / "kv.zarr", cache=folder / f"cache of {os.getpid()}")
    rng = random.Random(os.getpid())
    for _ in range(times):
        with trap.gc():
            collect(store, keep_snapshots=rng.randrange(1, 4), grace_seconds=0, rewrite_share=0.1)
    say("collected")
