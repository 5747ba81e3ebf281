"""Time to the first token: from `compose` to the first logits, against a cold prefill of the same ids. And the first load in a fresh process.

python benchmarks/first_token.py [--corpus DIR] [--model PATH]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import documents, median, model_of, paired, parser, ratio, result_name, show

import kvstore

QUERY = "What is this text about?"
CODECS = {"raw": {"codec": "raw"}, "scalar": {"codec": "scalar"}, "transform": {"codec": "transform", "lossless": True}}
SIDES = (("raw", "raw"), ("transform", "lossless"), ("transform", "fine"), ("transform", "standard"), ("transform", "draft"), ("scalar", "standard"))
FIRST = (("raw", "raw"), ("transform", "lossless"), ("transform", "standard"))
FRESH = """
import sys, time, torch, transformers, kvstore
transformers.utils.logging.disable_progress_bar()
store = kvstore.open(sys.argv[1], sys.argv[4] or None, dtype=sys.argv[5] or None)
model = store.model
model(torch.ones((1, 8), dtype=torch.long))
def once():
    started = time.perf_counter()
    store.compose([sys.argv[2]], "What is this text about?", tier=sys.argv[3])
    return time.perf_counter() - started
print(once(), min(once() for _ in range(3)))
"""


def stored(store: kvstore.OpenStore, name: str, tier: str) -> torch.Tensor:
    prompt = store.compose([name], QUERY, tier=tier)
    inputs, cached = prompt.inputs, prompt.receipt.cached_tokens
    return store.model(inputs["input_ids"][:, cached:], past_key_values=inputs["past_key_values"], use_cache=True, logits_to_keep=1).logits


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    source = model_of(args)
    rows, fresh = [], []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        stores = {}
        for name, options in CODECS.items():
            path = Path(folder) / name
            for tokens in (256, 1024, 2048):
                kvstore.build(documents(args.corpus, source.tokenizer, tokens, 1), path, source, certify="none", **options)
            stores[name] = kvstore.open(path, source.model, source.tokenizer)
        for tokens in (256, 1024, 2048):
            for name, tier in SIDES:
                rows.append([*row(stores[name], f"{tokens}/000.txt", tier, args.runs), name])
        for name, tier in FIRST:
            fresh.append(first_load(Path(folder) / name, tier, args.model or "", args.dtype or ""))
    setting = {"model": source.identity.name, "corpus": str(args.corpus or "pydoc topics"), "query": QUERY, "dtype": source.identity.dtype}
    show(
        "First token, stored against cold prefill",
        ["prompt tokens", "tier", "stored ms", "cold ms", "times faster", "codec"],
        rows,
        result_name("first_token", args),
        setting,
    )
    show("First load in a fresh process", ["tier", "first ms", "later ms", "slower by ms"], fresh, result_name("first_load", args), setting)


def row(store: kvstore.OpenStore, name: str, tier: str, runs: int) -> list[object]:
    ids = store.compose([name], QUERY, tier=tier).input_ids
    seconds = paired({"stored": lambda: stored(store, name, tier), "cold": lambda: store.model(ids, logits_to_keep=1).logits}, runs)
    return [ids.shape[1], tier, median(seconds["stored"]) * 1e3, median(seconds["cold"]) * 1e3, ratio(seconds, "cold", "stored")]


def first_load(path: Path, tier: str, model: str, dtype: str) -> list[object]:
    """In a new process each, after one that has filled the caches on disk."""
    command = [sys.executable, "-c", FRESH, str(path), "1024/000.txt", tier, model, dtype]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(4)][1:]
    first, later = (median([float(r[i]) * 1e3 for r in runs]) for i in (0, 1))
    return [tier, first, later, first - later]


if __name__ == "__main__":
    main()
