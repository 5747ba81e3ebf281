"""Kill builders and collectors at random and at chosen moments; nothing that was reported as stored may be lost or damaged.

    python -m tests.faults.kill --rounds 500     at random calls and at random times, spread over the phases
    python -m tests.faults.kill --every          one build with gc, killed before and after every single call

Each round kills one process of a build (SIGKILL), looks at the store, lets the same build finish, and looks again. SIGKILL keeps what
the system has buffered: the order of fsync before rename and link is tested in test_storage.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.errors import KvstoreError, StorageError
from kvstore.store import Store
from kvstore.verify import verify
from tests.faults.workload import Trap, build, collect_often, corpus
from tests.synthetic import Document, missing, problems_with

PHASES = ("encode", "fsync", "rename", "link", "unlink", "gc", "time", "crowd")
GAVE_UP = 75  # exit status of a builder whose segments were collected under its hands: it reported an error, and nothing as stored


class Child:
    """A forked process whose words are read once it has ended."""

    def __init__(self, work: Callable[[Callable[[str], None], Trap], None], trap: Trap):
        reading, writing = os.pipe()
        self.started = time.monotonic()
        self.pid, self.pipe = os.fork(), reading
        if self.pid == 0:
            os.close(reading)
            os._exit(_run(work, trap, writing))
        os.close(writing)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> tuple[int, list[str]]:
        """Exit status (negative: the signal), and the lines it said."""
        with open(self.pipe, "rb") as pipe:
            words = pipe.read().decode()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, words.splitlines()


def _run(work: Callable[[Callable[[str], None], Trap], None], trap: Trap, pipe: int) -> int:
    def say(line: str) -> None:
        os.write(pipe, line.encode() + b"\n")

    try:
        work(say, trap)
    except StorageError:
        return GAVE_UP
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@dataclass
class Tally:
    """Kills and what was wrong after them, of one phase."""

    kills: int = 0
    lost: int = 0
    corrupt: int = 0
    redone: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return self.lost == self.corrupt == self.redone == 0


class Harness:
    """One store through many rounds. `acked` is what was reported as stored: source -> document."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.generation = folder, random.Random(seed), 0
        self.acked: dict[str, Document] = {}
        self.tallies = {phase: Tally() for phase in PHASES}
        self.counts: dict[str, int] = {}
        self.seconds = 0.2

    def round(self, phase: str, trap: Trap | None = None) -> bool:
        """One kill in `phase`, with all checks. False where the process ended before the moment came."""
        self.generation += 1
        killed, lines = self._crowd() if phase == "crowd" else self._single(phase, trap or self._random_trap(phase))
        tally = self.tallies[phase]
        tally.kills += killed
        self._hear(lines)
        self._check(tally, self._news())
        lacking = self._lacking()
        status, lines = Child(lambda say, trap: build(self.folder, self.generation, say, trap, 0), Trap()).wait()
        if status != 0:
            tally.corrupt += 1
            tally.details.append(f"generation {self.generation}: the same build again ended with {status}")
        made = [line.split()[1] for line in lines if line.startswith("made ")]
        tally.redone += len(set(made) ^ lacking) + len(made) - len(set(made))
        self.acked = self._target()  # it ended well: all of it is stored, and what is gone from the corpus is removed
        self._check(tally, {})
        return killed

    def keep(self, folder: Path) -> None:
        """Put the store aside as it is."""
        shutil.copytree(self.folder, folder)

    def back(self, folder: Path) -> Harness:
        """A harness in the same state over the store that was put aside, in the same place."""
        shutil.rmtree(self.folder)
        shutil.copytree(folder, self.folder)
        again = Harness(self.folder, 0)
        again.generation, again.acked, again.counts = self.generation, dict(self.acked), self.counts
        return again

    def profile(self, into: dict[str, int] | None = None) -> None:
        """A build that is left alone, to learn how many calls there are to be killed at."""
        self.generation += 1
        child = Child(lambda say, trap: build(self.folder, self.generation, say, trap, 2), Trap())
        status, lines = child.wait()
        self.seconds = time.monotonic() - child.started
        if status != 0:
            raise RuntimeError(f"a build that nobody disturbed ended with {status}")
        self.acked = self._target()
        counts = self.counts if into is None else into
        counts |= {k: int(v) for k, v in (pair.split("=") for pair in lines[-1].split()[1:])}

    def _random_trap(self, phase: str) -> Trap:
        if phase == "time":
            return Trap()
        return Trap(phase, self.rng.randint(1, max(1, self.counts[phase])), self.rng.random() < 0.5)

    def _single(self, phase: str, trap: Trap) -> tuple[bool, list[str]]:
        child = Child(lambda say, trap: build(self.folder, self.generation, say, trap, 2), trap)
        if phase == "time":
            time.sleep(self.rng.uniform(0, self.seconds))
            child.kill()
        status, lines = child.wait()
        return self._judged(status), lines

    def _crowd(self) -> tuple[bool, list[str]]:
        """Two builders of one corpus and a collector; one of them is killed."""
        victim, kind = self.rng.randrange(3), self.rng.choice(["fsync", "rename", "gc"])
        traps = [Trap(kind, self.rng.randint(1, 20), self.rng.random() < 0.5) if i == victim else Trap() for i in range(3)]
        children = [Child(lambda say, trap: build(self.folder, self.generation, say, trap, 2), t) for t in traps[:2]]
        children.append(Child(lambda say, trap: collect_often(self.folder, say, trap), traps[2]))
        ended = [child.wait() for child in children]
        return any(self._judged(status) for status, _ in ended), [line for _, lines in ended for line in lines]

    @staticmethod
    def _judged(status: int) -> bool:
        """Whether it was killed. Raises RuntimeError where it failed in another way."""
        if status not in (0, GAVE_UP, -signal.SIGKILL):
            raise RuntimeError(f"the process ended with {status}")
        return status == -signal.SIGKILL

    def _hear(self, lines: Sequence[str]) -> None:
        """Take note of what was reported as stored."""
        for word, *sources in map(str.split, lines):
            if word == "stored":
                self.acked |= {s: self._target()[s] for s in sources}
            elif word == "removed":
                self.acked = {s: d for s, d in self.acked.items() if s not in sources}

    def _target(self) -> dict[str, Document]:
        return {d.source: d for d in corpus(self.generation)}

    def _news(self) -> dict[str, Document | None]:
        """What a killed build may have stored without having said so: source -> its new document, None where it is to be removed."""
        target = self._target()
        return {s: target.get(s) for s in target.keys() | self.acked.keys() if target.get(s) != self.acked.get(s)}

    def _check(self, tally: Tally, news: dict[str, Document | None]) -> None:
        """Everything acknowledged is there, as it was written, or as the killed build was about to write it."""
        report = verify(self.folder / "kv.zarr")
        errors = [f"{p.where}: {p.what}" for p in report.problems if p.severity == "error"]
        store = Store(self.folder / "kv.zarr", cache=self.folder / "cache")
        rows = {r.source: r for r in store.rows()}
        lost, wrong = [], []
        for source in self.acked.keys() | news.keys() | rows.keys():
            allowed = [self.acked.get(source), *([news[source]] if source in news else [])]
            present = [d for d in allowed if (d.row() if d else None) == rows.get(source)]
            if not present:
                lost.append(f"{source}: another row than was stored")
            wrong += [problem for d in present[:1] if d is not None for problem in self._content(store, d)]
        store.index.close()
        tally.lost, tally.corrupt = tally.lost + len(lost), tally.corrupt + len(errors) + len(wrong)
        tally.details += [f"generation {self.generation}: {d}" for d in lost + wrong + errors]

    @staticmethod
    def _content(store: Store, document: Document) -> list[str]:
        try:
            return problems_with(store, [document])
        except KvstoreError as error:
            return [str(error)]

    def _lacking(self) -> set[str]:
        """What the same build still has to make."""
        store = Store(self.folder / "kv.zarr", cache=self.folder / "cache")
        found = set(missing(store, corpus(self.generation)))
        store.index.close()
        return found


def run(rounds: int, seed: int, folder: Path, phases: Sequence[str] = PHASES, show: Callable[[str], None] | None = None) -> dict[str, Tally]:
    """`rounds` kills, spread evenly over the phases."""
    harness, done = Harness(folder, seed), 0
    harness.profile()
    harness.profile()  # from the second generation on there is something to collect
    while done < rounds:
        done += harness.round(phases[done % len(phases)])
        if show is not None and done % 20 == 0:
            show(f"{done} kills")
    return harness.tallies


def every(folder: Path, show: Callable[[str], None] | None = None) -> dict[str, Tally]:
    """The same build from the same store, killed before and after each of its calls in turn."""
    first = Harness(folder / "first", 0)
    first.folder.mkdir()
    first.profile()
    first.profile()
    first.keep(folder / "kept")
    first.back(folder / "kept").profile(first.counts)
    tallies = {kind: Tally() for kind in first.counts if kind != "gc"}
    for kind, tally in tallies.items():
        for nth in range(1, first.counts[kind] + 1):
            for after in (False, True):
                again = first.back(folder / "kept")
                again.tallies[kind] = tally
                again.round(kind, Trap(kind, nth, after))
        if show is not None:
            show(f"{kind}: {tally.kills} kills")
    return tallies


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--every", action="store_true", help="kill at every call in turn instead of at random ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the store is made (default: a temporary folder, in memory where there is one)")
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    chosen = parser.parse_args(arguments)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="kvstore-kill-", dir=memory))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tallies = every(folder, _show) if chosen.every else run(chosen.rounds, chosen.seed, folder, show=_show)
    finally:
        if chosen.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    _print(tallies, chosen.json)
    return 0 if all(t.clean for t in tallies.values()) else 1


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(tallies: dict[str, Tally], as_json: bool) -> None:
    if as_json:
        print(json.dumps({phase: vars(t) for phase, t in tallies.items()}))
        return
    print(f"{'phase':8} {'kills':>6} {'lost':>6} {'corrupt':>8} {'redone':>7}")
    total = Tally()
    for phase, t in tallies.items():
        print(f"{phase:8} {t.kills:6} {t.lost:6} {t.corrupt:8} {t.redone:7}")
        total = Tally(total.kills + t.kills, total.lost + t.lost, total.corrupt + t.corrupt, total.redone + t.redone, total.details + t.details)
    print(f"{'all':8} {total.kills:6} {total.lost:6} {total.corrupt:8} {total.redone:7}")
    for line in total.details[:50]:
        print(line)


if __name__ == "__main__":
    sys.exit(main())
