"""The demonstration: the sample corpus built by the bundled model, inspected, loaded, and asked; every stored answer beside the live one."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvstore import __version__, bundled
from kvstore.answering import FirstToken, answer, first_token, live_answer
from kvstore.api import OpenStore
from kvstore.build_report import BuildReport
from kvstore.builder import build
from kvstore.bundled import Question
from kvstore.errors import KvstoreError, StorageError
from kvstore.index import cache_folder
from kvstore.inventory import EncodingTotal, Listed, Stats, documents, stats
from kvstore.models import BUNDLED

PREFIX_TOKENS = 1000  # the first token is timed after so many stored ones, or a few more
MAX_ANSWER = 12  # tokens
PROMISED = ("fine", "lossless")  # tiers whose answers are to be the live ones
ASKED = ("standard", *PROMISED)  # draft is there to look ahead, not to answer
STOP = ".\n"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """One question. `stored` has an answer for each tier that was tried; answers end before the first full stop or newline."""

    source: str
    question: str
    expected: str
    live: str
    stored: dict[str, str]

    @property
    def same(self) -> bool:
        """Whether the tiers that are to answer as the live model do."""
        return all(self.stored[tier] == self.live for tier in PROMISED)


@dataclass
class DemoReport:
    """What the demonstration saw. `stats` are the whole store's, `encoding` what the documents listed are stored in.

    `first_token` is by tier, at one prompt of several documents side by side.
    """

    store: str
    build: BuildReport
    documents: list[Listed]
    stats: Stats
    asked: list[Asked] = field(default_factory=list)
    first_token: dict[str, FirstToken] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def encoding(self) -> EncodingTotal:
        return next(e for e in self.stats.encodings if e.id == self.documents[0].encoding)

    @property
    def ok(self) -> bool:
        """Whether every answer at a promised tier is the live one."""
        return all(a.same for a in self.asked)

    @property
    def right(self) -> int:
        """Live answers that are what the document says."""
        return sum(a.live == a.expected for a in self.asked)


def demo(store: str | Path | None = None, progress: Progress | None = None) -> DemoReport:
    """Build the sample corpus into `store`, by default in the user's cache folder, where the next run finds it; then use it.

    Raises what `build` and `open` do; a default store that another version left behind, or that is damaged, is made again.
    """
    started, say = time.perf_counter(), progress or (lambda text: None)
    report = _run_default(say) if store is None else _run(Path(store), say)
    report.seconds = time.perf_counter() - started
    return report


def _run_default(say: Progress) -> DemoReport:
    place = cache_folder() / f"demo-{__version__}" / "kv.zarr"
    try:
        return _run(place, say)
    except StorageError:  # no cache folder that can be written
        return _run(Path(tempfile.mkdtemp(prefix="kvstore-demo-")) / "kv.zarr", say)
    except KvstoreError:
        shutil.rmtree(place, ignore_errors=True)
        return _run(place, say)


def _run(path: Path, say: Progress) -> DemoReport:
    with _threads(1):
        report = _build(path, say)
    opened = OpenStore(path, BUNDLED)
    found = DemoReport(str(path), report, documents(opened), stats(opened))
    tiers, asked = found.documents[0].tiers, bundled.questions()
    with _threads(_faster(lambda: _ask(opened, asked[0], tiers[:1]))):
        for number, question in enumerate(asked, 1):
            say(f"asking: {number} of {len(asked)}, {question.source}")
            found.asked.append(_ask(opened, question, ASKED))
    for tier in tiers:
        say(f"timing the first token at tier {tier}")
        found.first_token[tier] = first_token(opened, _long_prefix(found.documents), asked[0].question, reuse="blocks", tier=tier)
    return found


def _build(path: Path, say: Progress) -> BuildReport:
    def progress(report: BuildReport, name: str) -> None:
        say(f"building: {report.documents} documents, {name}")

    with _calmly():
        return build(bundled.corpus_path(), path, BUNDLED, regime="both", lossless=True, progress=progress)


@contextmanager
def _calmly() -> Iterator[None]:
    """Without the log's warnings: the report has them as notes, and this corpus is known to be unlike what the calibration learnt from."""
    log = logging.getLogger("kvstore")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _faster(work: Callable[[], Any]) -> int:
    """One thread, or as many as torch has now: with a model this small they wait for each other, on a busy machine ten times as long as they work."""
    took: dict[int, float] = {}
    for number in (1, 1, torch.get_num_threads()):  # the first run warms up
        started = time.perf_counter()
        with _threads(number):
            work()
        took[number] = time.perf_counter() - started
    return min(took, key=lambda n: took[n])


def _ask(store: OpenStore, asked: Question, tiers: tuple[str, ...]) -> Asked:
    stored = {}
    for tier in tiers:
        prompt = store.compose([asked.source], asked.question, tier=tier)
        stored[tier] = short(answer(store, prompt, MAX_ANSWER, STOP))
    return Asked(asked.source, asked.question, asked.answer, short(live_answer(store, prompt, MAX_ANSWER, STOP)), stored)


def short(text: str) -> str:
    """The answer proper, before the first full stop or newline."""
    return text.strip().split("\n")[0].split(".")[0].strip()


def _long_prefix(listed: list[Listed]) -> list[str]:
    """As many documents as make a prefix of `PREFIX_TOKENS`."""
    names, tokens = [], 0
    for document in listed:
        if tokens < PREFIX_TOKENS:
            names.append(document.source)
            tokens += document.tokens
    return names
