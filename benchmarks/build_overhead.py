"""What a build costs beyond a bare prefill of the same ids, and how much memory it takes beside the model.

    python benchmarks/build_overhead.py [--corpus DIR] [--tokens 1024] [--count 24]

The bare prefill runs the model over each rendered document after its head, batch 1, without gradients, keeping the cache as transformers does.
Both sides run in one process, alternately; the build side includes rendering, encoding, packing, syncing and the snapshot, not the calibration
and the quality report, whose seconds are shown apart.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import psutil
import torch
from common import documents, median, model_of, paired, parser, ratio, result_name, show
from transformers import DynamicCache

import kvstore
from kvstore.calibration import shelf
from kvstore.records import create
from kvstore.store import Store


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--count", type=int, default=24)
    args = p.parse_args()
    source = model_of(args)
    found = documents(args.corpus, source.tokenizer, args.tokens, args.count)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(Path(folder), source, found, codec, lossless, args.runs)
            for codec, lossless in (("transform", False), ("transform", True), ("raw", False), ("lossless", False), ("scalar", False))
        ]
    setting = {"model": source.identity.name, "documents": len(found), "tokens each": args.tokens}
    show(
        "Build against a bare prefill",
        ["codec", "build s", "bare prefill s", "overhead %", "memory beside the model MiB", "calibration s", "quality report s"],
        rows,
        result_name("build_overhead", args),
        setting | {"dtype": source.identity.dtype},
    )


def measure(folder: Path, source: kvstore.models.ModelSource, found: list[kvstore.Document], codec: str, lossless: bool, runs: int) -> list[object]:
    warm = folder / f"warm-{codec}-{lossless}"
    apart = kvstore.build(found, warm, source, codec=codec, lossless=lossless, certify="sample").seconds
    ids = rendered(warm, source, found)
    stores = iter([calibrated(folder / f"{codec}-{lossless}-{n}", warm) for n in range(runs + 2)])
    before = psutil.Process().memory_info().rss
    peak = Peak()

    def build() -> None:
        kvstore.build(found, next(stores), source, codec=codec, lossless=lossless, certify="none")

    with peak:
        build()
    seconds = paired({"build": build, "bare": lambda: bare(source.model, ids)}, runs, warmup=1)
    name = f"{codec} + lossless" if lossless else codec
    overhead = (ratio(seconds, "build", "bare") - 1) * 100
    parts = [apart.get("calibrate", 0.0), apart.get("certify", 0.0)]
    return [name, median(seconds["build"]), median(seconds["bare"]), overhead, (peak.rss - before) / 2**20, *parts]


def calibrated(path: Path, other: Path) -> Path:
    """A new store with the calibrations of another."""
    create(path)
    storage, there = Store(path).storage, Store(other)
    for model in there.models():
        if (digest := there.current_calibration(model.model.key)) is not None:
            shelf.publish(storage, there.calibration(digest))
            shelf.set_current(storage, model.model.key, digest, replacing=None)
    return path


def rendered(path: Path, source: kvstore.models.ModelSource, found: list[kvstore.Document]) -> list[list[list[int]]]:
    from kvstore.template import Renderer
    from kvstore.tokens import TextEncoder

    renderer = Renderer(Store(path).templates()[0], TextEncoder(source.tokenizer))
    return [[list(renderer.head_ids), renderer.document(d.text)] for d in found]


def bare(model: torch.nn.Module, ids: list[list[list[int]]]) -> None:
    with torch.inference_mode():
        for head, document in ids:
            cache = DynamicCache(config=model.config)
            for part in (head, document):
                model(torch.tensor([part]), past_key_values=cache, use_cache=True, logits_to_keep=1)


class Peak:
    """Largest resident size while in the `with`, sampled every 5 ms."""

    def __enter__(self) -> None:
        self.rss, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.005):
            self.rss = max(self.rss, process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    main()
