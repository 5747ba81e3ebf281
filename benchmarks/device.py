"""Decoding on a GPU: how fast, where the time goes, against prefill and a pinned copy of raw values, and what the bytes and FLOPs allow at best.

    python benchmarks/device.py [--device cuda] [--geometry Llama-3.1-8B] [--tokens 512,2048,8192,32768]
    python benchmarks/device.py --device cpu --tiny

Models have random weights, units the statistics that device_data.py describes. `--tiny` runs every line on the CPU, by Triton's interpreter where
Triton is installed, and keeps nothing: its figures say nothing about any device.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

TIERS = ("draft", "standard", "fine")
NO_FIGURES = "These are not figures of a device: a tiny model on the CPU, the kernels by Triton's interpreter, to see that every line runs."


def main() -> None:
    args = options()
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
    transformers.utils.logging.disable_progress_bar()
    import device_data
    import device_measure

    device = device_measure.Device(args.device, args.runs, args.threads)
    chosen = device_data.TINY if args.tiny else [g for g in device_data.GEOMETRIES if not args.geometry or g.name in args.geometry]
    if not chosen:
        raise SystemExit(f"--geometry is one of {', '.join(g.name for g in device_data.GEOMETRIES)}")
    table = Tables(device_measure.rates(device))
    for geometry in chosen:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, device_measure.quiet():
            measure(Path(folder), device, geometry, lengths_of(args, geometry), table, args)
    table.show(args, device.why_not)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--geometry", action="append", help="one of the three (may be repeated; default: all)")
    p.add_argument("--tokens", default="512,2048,8192,32768", help="lengths of documents")
    p.add_argument("--tiny", action="store_true", help="a tiny model and short documents")
    p.add_argument("--runs", type=int, default=7, help="timed repetitions (default: 7)")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--folder", type=Path, help="where the stores are made: the disk that is measured (default: the folder for temporary files)")
    return p.parse_args()


def lengths_of(args: argparse.Namespace, geometry: Any) -> list[int]:
    return [12] if args.tiny else [int(n) for n in args.tokens.split(",")]


def measure(folder: Path, device: Any, geometry: Any, lengths: Sequence[int], table: Tables, args: argparse.Namespace) -> None:
    import device_build
    import device_data
    import device_measure

    from kvstore.families.measure import require_layout

    model = device_data.model_of(geometry, device.device)
    layout = require_layout(model)
    calibration = device_data.calibration_of(geometry, layout)
    stored = device_data.store_of(folder / "kv.zarr", layout, calibration, list(lengths), geometry.block, args.threads)
    for document in stored:
        tokens = document.segment.tokens
        prefill, raw = device_measure.prefill(device, model, tokens), device_measure.copy_of_raw(device, layout, tokens)
        for tier in TIERS:
            print(f"{geometry.name}, {tokens:,} tokens, {tier}", file=sys.stderr, flush=True)
            found = device_measure.load(device, document, tier)
            first = device_measure.first_token(device, model, document, tier)
            table.ready(geometry.name, document, tier, found, first, prefill, raw)
            if device.why_not is None:
                table.steps(geometry.name, document, tier, device_measure.parts(device, document, tier), calibration)
    table.build(geometry.name, device_build.measure(device, model, layout, calibration, geometry.block, args.tiny))


class Tables:
    """The rows of the four tables."""

    def __init__(self, rates: Any):
        self.rates = rates
        self.rows: dict[str, list[list[object]]] = {name: [] for name in ("ready", "first", "steps", "floor", "build")}

    def ready(self, name: str, stored: Any, tier: str, load: Any, first: Any, prefill: float, raw: float) -> None:
        tokens, nbytes = stored.segment.tokens, stored.nbytes(tier)
        bits, output = 8 * nbytes / tokens / stored.pack.layout.values_per_token, 2 * tokens * stored.pack.layout.values_per_token
        self.rows["ready"].append([
            name, tokens, tier, bits, load.warm * 1e3, load.cold * 1e3, load.read / 1e6, prefill * 1e3, raw * 1e3,
            prefill / load.warm, raw / load.warm, output / load.warm / 1e9, load.peak / 2**20,
        ])  # fmt: skip
        row = [name, tokens, tier, first.stored * 1e3, first.prefill * 1e3, first.raw * 1e3, first.prefill / first.stored, first.raw / first.stored]
        self.rows["first"].append(row)

    def steps(self, name: str, stored: Any, tier: str, parts: Any, calibration: Any) -> None:
        tokens, layout = stored.segment.tokens, stored.pack.layout
        output = 2 * tokens * layout.values_per_token
        times = [1e3 * t for t in parts[:6]]
        self.rows["steps"].append([name, tokens, tier, *times, parts.symbols / parts.decode / 1e9, output / parts.both / 1e9])
        level = TIERS.index(tier)
        flops = 0.0
        for group, classes in enumerate(calibration.classes):
            coded = int((classes.astype(int) - 8 * (2 - level) >= calibration.record.least).sum())
            flops += 2.0 * coded * calibration.bases[group].dim * tokens
        floors = [stored.nbytes(tier) / self.rates.link, output / self.rates.memory, flops / self.rates.product]
        row = [name, tokens, tier, *(1e3 * floor for floor in floors), 1e3 * max(floors), parts.both / max(floors)]
        self.rows["floor"].append(row)

    def build(self, name: str, rows: Sequence[Sequence[object]]) -> None:
        self.rows["build"] += [[name, *row] for row in rows]

    def show(self, args: argparse.Namespace, why_not: str | None) -> None:
        from common import RESULTS, show

        if args.device == "cpu":
            print(NO_FIGURES + "\n")
        machine = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
        setting = {"device": machine, "link GB/s": self.rates.link / 1e9, "memory GB/s": self.rates.memory / 1e9,
                   "float16 TFLOP/s": self.rates.product / 1e12, "kernels": why_not or "used"}  # fmt: skip
        with tempfile.TemporaryDirectory() as forgotten:
            for name, (title, header) in TITLES.items():
                folder = Path(forgotten) if args.device == "cpu" else RESULTS
                show(title, header, self.rows[name], f"device_{name}", setting, folder=folder)


DOCUMENT = ["geometry", "tokens", "tier"]
TITLES: dict[str, tuple[str, list[str]]] = {
    "ready": (
        "A ready cache (ms): from the page cache and from disk, against a prefill and a pinned copy of raw bfloat16",
        [
            *DOCUMENT,
            "bits a value",
            "page cache",
            "disk",
            "MB read from disk",
            "prefill",
            "raw copy",
            "prefill /",
            "raw copy /",
            "GB/s of output",
            "peak MiB",
        ],
    ),
    "first": (
        "First token of a question of 32 tokens (ms), logits on the host",
        [*DOCUMENT, "stored", "prefill", "raw copy", "prefill /", "raw copy /"],
    ),
    "steps": (
        "Where the time goes: each step of all groups by itself (ms); decode and fill together from units on the device",
        [*DOCUMENT, "stage", "plan", "copy", "decode", "fill", "decode + fill", "G symbols/s", "GB/s of output"],
    ),
    "floor": (
        "The floor (ms): bytes over the link, output in memory, 2 x rank FLOP a value",
        [*DOCUMENT, "link", "memory", "product", "the largest", "decode + fill /"],
    ),
    "build": (
        "Prefill during a build against a bare forward pass of the same batch (ms)",
        ["geometry", "documents", "tokens each", "bare", "captured", "overhead %", "with encoding beside", "overhead %"],
    ),
}


if __name__ == "__main__":
    main()
