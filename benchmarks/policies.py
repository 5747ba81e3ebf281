"""What token policies buy: divergence and fact recall at the bytes of the uniform policy, and bytes at its divergence.

    python benchmarks/policies.py --corpus DIR [--quick]

DIR as for `rate_quality.py`. Fact-recall documents and prose that calibrated nothing. Every policy is coded by the transform codec at several global
steps, so that each has a curve, and compared with the curve of `uniform` at the bytes of uniform's own tiers. Everything counts: records, masks,
checksums, rows, ids. Attention is measured on each document alone, before any question is known.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import transformers
from common import show
from harness import Continuations, Questions, Runner, Score, Setting
from ours import BLOCK, ROW_BYTES, TIER_ROW_BYTES, TIERS, Shelf, coarser, sized
from peers.base import Floats, Method, Version
from texts import Texts

from kvstore.calibration.record import Calibration
from kvstore.codecs import get_codec
from kvstore.codecs.base import Codec
from kvstore.families.masking import masking
from kvstore.manifest import Layout
from kvstore.models import ModelSource
from kvstore.parts import Parts, encode_part, policy_params
from kvstore.policies import Assignment, Policy, parse
from kvstore.prefill import Prefiller
from kvstore.tokens import TextEncoder
from kvstore.viewing import Kinds, SegmentView

POLICIES = (
    "uniform",
    "sink+recent", "sink+recent:keep=-1,rest=0",
    "h2o", "h2o:keep=-1,rest=0", "h2o:budget=60", "h2o:budget=10,keep=-1,rest=0",
    "kvzip", "kvzip:budget=30,rest=1", "kvzip:budget=30,keep=-1,rest=1", "kvzip:budget=30,keep=-1,rest=0", "kvzip:budget=10,keep=-1,rest=0",
    "sink+recent:recent=256,rest=drop", "fastgen", "h2o:budget=60,rest=drop", "kvzip:budget=60,rest=drop",
)  # fmt: skip
Point = tuple[float, float, float]
"""(bytes a token, KL, recall): recall is NaN for prose."""


@dataclass(frozen=True)
class Assigned(Method):
    """The transform codec under one policy, at one calibration's tiers. `found`: what the policy says of each document."""

    policy: Policy
    calibration: Calibration
    layout: Layout
    found: dict[tuple[int, ...], Assignment]

    @property
    def name(self) -> str:
        return self.policy.spec

    @property
    def settings(self) -> Sequence[str]:
        return TIERS[-self.calibration.record.tiers :]

    @cached_property
    def codec(self) -> Codec:
        return get_codec("transform", 1, policy_params(self.policy, "transform"), self.calibration)

    def code(self, kv: Floats, ids: Sequence[int]) -> list[Version]:
        tiers, size, parts = self.calibration.record.tiers, self.calibration.record.group_layers, Parts(self.found[tuple(ids)], self.layout)
        outs, sizes = [np.empty_like(kv) for _ in range(tiers)], np.zeros(tiers)
        for group in range(len(self.calibration.bases)):
            for start in range(0, kv.shape[2], BLOCK):
                where = (slice(group * size, (group + 1) * size), slice(None), slice(start, start + BLOCK))
                bits = np.ascontiguousarray(kv[where]).view(np.uint32)
                records = encode_part(self.codec, bits, "float32", group, parts.cell(group * size, size, start, BLOCK))
                sizes += sized(records)
                for tier, out in enumerate(outs):
                    values = np.empty(bits.shape, np.float32)
                    self.codec.decode(records[: tier + 1], values)
                    out[where] = values
        rest = len(zlib.compress(np.array(ids, "<u4").tobytes(), 9)) + ROW_BYTES
        return [Version(out, {"all": sizes[t] + rest + TIER_ROW_BYTES * (t + 1)}) for t, out in enumerate(outs)]


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    source = ModelSource(args.model, dtype="float32")
    texts, shelf = Texts(args.corpus, source.tokenizer), Shelf(source, args.work)
    calibration = shelf.calibration(texts.calibration(("prose", "facts"), 16 if args.quick else 60))
    runner, documents = Runner(source), args.documents or (6 if args.quick else 48)
    tasks = {"facts": Questions(texts.recall(documents), source.tokenizer), "prose": Continuations(texts.passages("prose", 512, documents))}
    for kind, task in tasks.items():
        if not args.text or kind == args.text:
            with masking(source.model):
                measure(kind, Setting(runner, task, args.threads), calibration, args)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", type=Path, required=True, help="folder with prose/ and technical/")
    p.add_argument("--model", help="path of a model (default: the bundled one)")
    p.add_argument("--text", choices=("facts", "prose"), help="only these documents")
    p.add_argument("--documents", type=int, help="documents of each kind (default: 48)")
    p.add_argument("--policy", action="append", help="only uniform and this policy (may be repeated)")
    p.add_argument("--quick", action="store_true", help="few documents and steps, to try it out")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kvstore-rate-quality", help="where calibrations are kept between runs")
    return p.parse_args()


def measure(kind: str, setting: Setting, calibration: Calibration, args: argparse.Namespace) -> None:
    """One table: each policy's curve against uniform's."""
    started, rows, curves = time.perf_counter(), [], {}
    views = {ids: view_of(setting.runner, ids) for ids in setting.task.documents}
    for policy in map(parse, wanted(args)):
        found = {ids: policy.assign(view) for ids, view in views.items()}
        curves[policy.spec] = [
            point for eighths in ((0, 4) if args.quick else (-8, -4, 0, 4, 8))
            for point in points(setting, Assigned(policy, coarser(calibration, eighths), setting.runner.layout, found))
        ]  # fmt: skip
        rows += against(policy, curves[policy.spec], curves["uniform"], calibration.record.tiers, args.quick)
        print(f"  {policy.spec}: {time.perf_counter() - started:.0f} s", flush=True)
    live = setting.live_recall
    header = ["policy", "at uniform's", "bytes a token", "KL", "KL / uniform's", "recall", "bytes at its KL / uniform's"]
    facts = {"documents": len(views), "tokens": len(setting.task.documents[0]), "live recall": None if live is None else round(float(live.mean()), 4)}
    show(f"Token policies, {kind}", header, rows, f"policies_{kind}" + ("_quick" if args.quick else ""), facts)


def wanted(args: argparse.Namespace) -> Iterable[str]:
    """Uniform first: the others are compared with it."""
    if args.policy:
        return dict.fromkeys(["uniform", *args.policy])
    return POLICIES


def view_of(runner: Runner, ids: tuple[int, ...]) -> SegmentView:
    """Of a document that starts the sequence, as the benchmark's documents do. Measured once, whatever policies ask."""
    source = runner.source
    return SegmentView(Prefiller(source.model, runner.layout), Kinds(TextEncoder(source.tokenizer)), ids, (), source.context_tokens)


def points(setting: Setting, method: Assigned) -> list[Point]:
    """One a tier."""

    def point(nbytes: dict[str, float], score: Score) -> Point:
        return nbytes["all"], float(score.kl.mean()), float("nan") if score.recall is None else float(score.recall.mean())

    return [point(nbytes, score) for _, nbytes, score in setting.measure(method)]


def against(policy: Policy, mine: list[Point], uniform: list[Point], tiers: int, quick: bool) -> list[list[object]]:
    """One row a tier of uniform's at the calibration's own step, interpolated in log-log; a dash outside the curve."""
    own = (0 if quick else 2) * tiers  # where the steps' list has 0
    rows: list[list[object]] = []
    for tier, (nbytes, kl, _) in zip(TIERS[-tiers:], uniform[own : own + tiers], strict=True):
        there, recall, size = at(mine, 0, 1, nbytes), at(mine, 0, 2, nbytes, logarithmic=False), at(mine, 1, 0, kl)
        ratios = [None if found is None else found / of for found, of in ((there, kl), (size, nbytes))]
        rows.append([policy.spec, tier, nbytes, *("-" if v is None else v for v in (there, ratios[0], recall, ratios[1]))])
    return rows


def at(curve: list[Point], x: int, y: int, value: float, logarithmic: bool = True) -> float | None:
    """Coordinate y where coordinate x has `value`."""
    ordered = sorted(curve, key=lambda p: p[x])
    xs, ys = np.log([p[x] for p in ordered]), np.array([p[y] for p in ordered])
    if not xs[0] - 1e-9 <= np.log(value) <= xs[-1] + 1e-9 or np.isnan(ys).any():
        return None
    return float(np.exp(np.interp(np.log(value), xs, np.log(ys))) if logarithmic else np.interp(np.log(value), xs, ys))


if __name__ == "__main__":
    main()
