"""What a build costs beyond a bare prefill of the same ids, and how much memory it takes beside the model.

    python benchmarks/build_overhead.py [--corpus DIR] [--tokens 1024] [--count 24]

The bare prefill runs the model over each rendered document after its head, batch 1, without gradients, keeping the cache as transformers does.
Both sides run in one process, alternately; the build side includes rendering, encoding, packing, syncing and the snapshot.
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import psutil
import torch
from common import documents, median, model_of, paired, parser, ratio, show
from transformers import DynamicCache

import kvstore
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
            for codec, lossless in (("raw", False), ("lossless", False), ("scalar", False), ("scalar", True))
        ]
    setting = {"model": source.identity.name, "documents": len(found), "tokens each": args.tokens}
    show(
        "Build against a bare prefill",
        ["codec", "build s", "bare prefill s", "overhead %", "memory beside the model MiB"],
        rows,
        "build_overhead",
        setting,
    )


def measure(folder: Path, source: kvstore.models.ModelSource, found: list[kvstore.Document], codec: str, lossless: bool, runs: int) -> list[object]:
    kvstore.build(found[:1], folder / "warm", source, codec=codec, lossless=lossless)
    ids = rendered(folder / "warm", source, found)
    before = psutil.Process().memory_info().rss
    peak = Peak()
    numbers = iter(range(10_000))

    def build() -> None:
        kvstore.build(found, folder / f"{codec}-{lossless}-{next(numbers)}", source, codec=codec, lossless=lossless)

    with peak:
        build()
    seconds = paired({"build": build, "bare": lambda: bare(source.model, ids)}, runs, warmup=1)
    name = f"{codec} + lossless" if lossless else codec
    return [name, median(seconds["build"]), median(seconds["bare"]), (ratio(seconds, "build", "bare") - 1) * 100, (peak.rss - before) / 2**20]


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
