"""Calibrating and coding the geometry of an 8B model (32 layers, 8 KV heads of 128), one group of layers on this machine, no weights needed.

    python benchmarks/large_geometry.py [--group-layers 4] [--tokens 8192] [--block 512]

Activations are synthetic: a spectrum i ** -decay in a random orthonormal basis, of which the metric is a random one with a spectrum of its own.
What is printed for the whole model follows from the group by the formulas beside it; statistics need 16 tokens a dimension, here fewer are timed.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from common import show

from kvstore.calibration import files
from kvstore.calibration.learn import PER_DIMENSION
from kvstore.calibration.record import Calibration, CalibrationRecord
from kvstore.calibration.solve import Solved, solve, stored_metric, truncated
from kvstore.calibration.statistics import Grouping, moments, ordinary
from kvstore.calibration.target import choose_step
from kvstore.calibration.trial import Held, Trials, kept_order
from kvstore.codecs import get_codec
from kvstore.manifest import FORMAT

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
MODEL_BYTES, PIECE, TIERS = 16e9, 1024, 3
CHANNELS = KV_HEADS * HEAD_DIM


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--group-layers", type=int, default=4, help="1, 2 or 4")
    p.add_argument("--tokens", type=int, default=8192, help="tokens of statistics that are timed")
    p.add_argument("--block", type=int, default=512, help="tokens of the unit that is coded")
    p.add_argument("--decay", type=float, default=1.5, help="the spectrum falls as i ** -decay (default: 1.5; the bundled model, whitened: 1.6)")
    p.add_argument("--target-ratio", type=float, default=16.0)
    args = p.parse_args()
    run = Run(args.group_layers, args.decay)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        calibration, rank = run.calibrate(args.tokens, args.target_ratio)
        files.write(Path(folder), calibration)
        run.sizes["on disk"] = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        run.code(calibration, args.block)
    report(run, args, rank)


class Run:
    """Times (seconds) and sizes of one group."""

    def __init__(self, layers: int, decay: float):
        self.layers, self.dim = layers, layers * 2 * CHANNELS
        self.seconds: dict[str, float] = {}
        self.sizes: dict[str, float] = {}
        self.chance = torch.Generator().manual_seed(0)
        self.signs = torch.randint(0, 2, (self.dim,), generator=self.chance) * 2.0 - 1
        self.spread = torch.arange(1, self.dim + 1) ** (-decay / 2)

    def values(self, tokens: int) -> torch.Tensor:
        """float32 [tokens, layers, 2, channels]."""
        z = torch.randn(tokens, self.dim, generator=self.chance) * self.spread
        return hadamard(z * self.signs).view(tokens, self.layers, 2, CHANNELS)

    def pieces(self, tokens: int) -> Iterator[torch.Tensor]:
        return (self.values(min(PIECE, tokens - start)) for start in range(0, tokens, PIECE))

    def calibrate(self, tokens: int, ratio: float) -> tuple[Calibration, int]:
        grouping = Grouping(self.layers, self.layers)
        with self.timed("metric, shrunk and rounded"):
            metric = stored_metric(self.blocks())
        weights = metric.wide.diagonal(dim1=-2, dim2=-1).float().view(self.layers, 2, CHANNELS)
        chosen = ordinary(self.values(PIECE), grouping, weights)
        with self.timed("statistics"):
            sums = moments(self.pieces(tokens), chosen)
        energy = float((metric.wide.diagonal(dim1=-2, dim2=-1).flatten() * sums[0].covariance.diagonal()).sum())
        with self.timed("solve"):
            solved = solve(sums[0], metric, slice(0, 2 * self.layers))
        trials = self.trials(grouping, solved)
        with self.timed("step and tables"):
            step = choose_step(trials, None, ratio)
            done, classes = trials.fit(step, rounds=4)
        order = kept_order(classes[0], done.least)
        record = CalibrationRecord(
            FORMAT, "calibration", "0" * 64, self.layers, KV_HEADS, HEAD_DIM, "fisher", self.layers, TIERS, step, done.least, (0.0,) * TIERS,
            chosen.limit, (energy,), (len(order),), sums[0].tokens, 0, (), (), {}, {},
        )  # fmt: skip
        coded = np.minimum(classes[0][order], 255).astype(np.uint8)
        return Calibration("", record, (truncated(solved.basis, order),), (coded,), done.weights, done.thirds), len(order)

    def blocks(self) -> torch.Tensor:
        """A metric float64 [layers, 2, channels, channels] with a decaying spectrum."""
        count = 2 * self.layers
        g = torch.randn(count, CHANNELS, 2 * CHANNELS, generator=self.chance) * torch.arange(1, CHANNELS + 1)[:, None] ** -0.5
        return (g @ g.mT).double().view(self.layers, 2, CHANNELS, CHANNELS)

    def trials(self, grouping: Grouping, solved: Solved) -> Trials:
        """Held-out tokens for step and tables; no model runs, so the target is a ratio."""
        live: Any = SimpleNamespace(device=torch.device("cpu"), layout=None)
        trials = Trials(live, grouping, [solved], TIERS)
        x = self.values(2 * PIECE).flatten(1)
        c = (x - torch.from_numpy(solved.basis.mean)) @ torch.tensor(solved.basis.analysis())
        trials.held.append(Held(tuple(range(2 * PIECE)), PIECE, [c], torch.ones(2 * PIECE, 1, dtype=torch.bool)))
        return trials

    def code(self, calibration: Calibration, tokens: int) -> None:
        codec = get_codec("transform", 1, {}, calibration=calibration)
        kv = np.ascontiguousarray(self.values(tokens).permute(1, 2, 0, 3).numpy())
        out = np.empty_like(kv)
        for _ in range(2):  # the second time without compiling
            with self.timed("encode"):
                records = codec.encode(kv.view(np.uint32), "float32", 0)
            with self.timed("decode, all tiers"):
                codec.decode(records, out)
            with self.timed("decode, draft"):
                codec.decode(records[:1], out)
        self.sizes["records"] = sum(map(len, records))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of rows; their length is a power of two."""
    size, step = x.shape[1], 1
    while step < size:
        pairs = x.view(len(x), -1, 2, step)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(len(x), size)
        step *= 2
    return x / size**0.5


def report(run: Run, args: argparse.Namespace, rank: int) -> None:
    d, groups, s = run.dim, LAYERS // run.layers, run.seconds
    wanted = PER_DIMENSION * d
    calibration = groups * run.sizes["on disk"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def timed(what: str, formula: str, per: float = 1.0, unit: str = "s") -> list[object]:
        each = s[what] / per * (1 if unit == "s" else 1e3)
        return [f"{what}, {unit}", each, formula, groups * each, "groups x"]

    rows: list[list[object]] = [
        timed("statistics", f"16 x D tokens ({wanted:,}) x 2 D^2 flop", args.tokens / wanted),
        timed("metric, shrunk and rounded", "eigenvalues of 2 x layers blocks of channels"),
        timed("solve", "whitening and eigenvectors: about 9 D^3 flop"),
        timed("step and tables", "up to 7 fits on 2,048 held-out tokens"),
        ["covariances, GB", 8 * d * d / 1e9, "8 D^2", groups * 8 * d * d / 1e9, "groups x, all at once"],
        ["peak memory of this process, GB", peak / 1e9, "", (peak + (groups - 1) * 8 * d * d) / 1e9, "+ (groups - 1) x 8 D^2"],
        ["rank", rank, f"of D = {d:,}", rank * groups, "groups x"],
        ["calibration, MB", run.sizes["on disk"] / 1e6, "2 x rank x D + 4 x layers x channels^2", calibration / 1e6, "groups x"],
        ["share of the weights (16 GB), %", "", "", 100 * calibration / MODEL_BYTES, ""],
        timed("encode", "2 x D x rank flop a token, and coding", args.block, "ms a token"),
        timed("decode, all tiers", "the same", args.block, "ms a token"),
        timed("decode, draft", "only the coefficients that it codes", args.block, "ms a token"),
        ["bits a value", 8 * run.sizes["records"] / args.block / d, f"asked: {16 / args.target_ratio:g}", "", ""],
    ]
    setting = {"layers": LAYERS, "KV heads": KV_HEADS, "head_dim": HEAD_DIM, "layers a group": run.layers, "groups": groups} | vars(args)
    show("An 8B model's geometry", ["what", "one group", "formula", "whole model", "from the group by"], rows, "large_geometry", setting)


if __name__ == "__main__":
    main()
