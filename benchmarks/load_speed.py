"""Loading: `raw` against safetensors on the same payload, `scalar` decoding against constriction on one core, memory of a load.

    python benchmarks/load_speed.py [--corpus DIR] [--tokens 2048]

raw: `store.read` (map, digests, un-transpose, rotate) against `safetensors.torch.load_file` of the same tensors, both into memory of their own.
The first read of an artifact in a process compares its sha256; later ones do not: both are shown.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import documents, median, model_of, paired, parser, ratio, show
from safetensors.torch import load_file, save_file

import kvstore
from kvstore.artifact import Stored
from kvstore.codecs import get_codec


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tokens", type=int, default=2048)
    args = p.parse_args()
    source = model_of(args)
    found = documents(args.corpus, source.tokenizer, args.tokens, 1)
    setting = {"model": source.identity.name, "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for codec in ("raw", "scalar"):
            kvstore.build(found, folder / codec, source, codec=codec, lossless=codec == "scalar")
        rows = against_safetensors(folder, found[0].source, args.runs)
        show("raw against safetensors", ["side", "ms", "GB/s", "share of safetensors' throughput"], rows, "raw_against_safetensors", setting)
        rows = [against_constriction(folder / "scalar", found[0].source, tier, args.runs) for tier in ("standard", "fine")]
        show(
            "scalar decoding against constriction, one thread",
            ["tiers", "ours Msymbol/s", "constriction Msymbol/s", "times faster"],
            rows,
            "scalar_against_constriction",
            setting,
        )
        rows = [memory(folder / c, found[0].source, tier) for c, tier in (("raw", "raw"), ("scalar", "standard"), ("scalar", "lossless"))]
        show("Memory of a load beside the decoded cache", ["tier", "cache MiB", "peak beside it MiB"], rows, "load_memory", setting)


def against_safetensors(folder: Path, name: str, runs: int) -> list[list[object]]:
    store = kvstore.open(folder / "raw")
    _, layers, _ = store.read(name)
    file = folder / "payload.safetensors"
    save_file({f"layers.{i}.{kind}": t.contiguous() for i, kv in enumerate(layers) for kind, t in zip(("keys", "values"), kv, strict=True)}, file)
    size = sum(k.nbytes + v.nbytes for k, v in layers)

    def first() -> None:
        kvstore.open(folder / "raw").read(name)

    opening = {"open": lambda: kvstore.open(folder / "raw")}

    def safetensors() -> list[torch.Tensor]:
        return [t.clone() for t in load_file(file).values()]  # load_file alone maps lazily: touch what a model would read

    seconds = paired({"first": first, "later": lambda: store.read(name), "safetensors": safetensors} | opening, runs)
    rows: list[list[object]] = [["safetensors", median(seconds["safetensors"]) * 1e3, size / median(seconds["safetensors"]) / 1e9, 1.0]]
    alone = [f - o for f, o in zip(seconds["first"], seconds["open"], strict=True)]
    seconds["first, digests compared"] = alone
    for side in ("first, digests compared", "later"):
        rows.append([side, median(seconds[side]) * 1e3, size / median(seconds[side]) / 1e9, ratio(seconds, "safetensors", side)])
    return rows


def against_constriction(path: Path, name: str, tier: str, runs: int) -> list[object]:
    """Whole units (symbols to float32) on one thread, against constriction decoding as many symbols of the same entropy with one table."""
    store = kvstore.open(path)
    stored = store.artifact(name).stored[0]
    arrays = [t.array for t in stored.encoding.tiers if t.name in ("standard", tier)]
    values, ours = decoder_of(stored, arrays)
    theirs = constriction_decoder(values, stored, arrays)
    seconds = paired({"ours": ours, "constriction": theirs}, runs)
    symbols = values * len(arrays) / 1e6
    return [" + ".join(arrays), symbols / median(seconds["ours"]), symbols / median(seconds["constriction"]), ratio(seconds, "constriction", "ours")]


def decoder_of(stored: Stored, arrays: list[str]) -> tuple[int, Any]:
    spec = stored.encoding.codec("scalar")
    codec = get_codec(spec.name, spec.version, spec.params)
    units = [stored.pack.units(stored.segment, a) for a in arrays]
    cells = [[u[g][b] for u in units] for g in range(len(units[0])) for b in range(len(units[0][0]))]
    outs = [np.empty((1, 2, codec.peek_tokens(c[0]), stored.pack.layout.channels), np.float32) for c in cells]

    def run() -> None:
        for records, out in zip(cells, outs, strict=True):
            codec.decode(records, out)

    return sum(o.size for o in outs), run


def constriction_decoder(values: int, stored: Stored, arrays: list[str]) -> Any:
    """constriction's AnsCoder over 4,096-symbol streams whose entropy is that of our units."""
    import constriction

    bits = 8 * sum(stored.segment.ranges[a][1] for a in arrays) / (values * len(arrays))
    sigma = max(0.3, 2 ** (bits - 2.05))
    alphabet = np.arange(-15, 16)
    p = np.exp(-0.5 * (alphabet / sigma) ** 2)
    model = constriction.stream.model.Categorical((p / p.sum()).astype(np.float64), perfect=False)
    rng = np.random.default_rng(0)
    streams = []
    for _ in range(-(-values * len(arrays) // 4096)):
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(rng.choice(31, 4096, p=p / p.sum()).astype(np.int32), model)
        streams.append(coder.get_compressed())

    def run() -> None:
        for words in streams:
            constriction.stream.stack.AnsCoder(words).decode(model, 4096)

    return run


def memory(path: Path, name: str, tier: str) -> list[object]:
    store = kvstore.open(path)
    store.read(name, tier=tier)
    process = psutil.Process(os.getpid())
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.0005)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    _, layers, _ = store.read(name, tier=tier)
    done.set()
    thread.join()
    size = sum(k.nbytes + v.nbytes for k, v in layers)
    return [tier, size / 2**20, max(0, peak[0] - before - size) / 2**20]


if __name__ == "__main__":
    main()
