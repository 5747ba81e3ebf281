"""Bytes at equal quality: kvstore's codec against the field, on held-out prose, fact recall and technical text.

    python benchmarks/rate_quality.py --corpus DIR [--second MODEL] [--stage NAME ...] [--quick]
    python benchmarks/rate_quality.py --tables

DIR has folders prose/ and technical/ of .md or .txt files: the first third of each calibrates, the rest scores. Every stage appends its rows to
results/rate_quality.jsonl as it goes; tables, bars and plots are made from what is there, the newest row of each setting counting.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rate_tables
import torch
import transformers
from common import RESULTS
from harness import Continuations, Questions, Runner, Score, Setting, Task
from ours import Shelf
from stages import CALIBRATION_DOCUMENTS, STAGES, Methods, Stage
from texts import Texts

from kvstore.models import ModelSource

Row = dict[str, object]


def main() -> None:
    args = options()
    results = args.work / "quick" if args.quick else RESULTS
    if not args.tables:
        bench = Bench(args)
        results.mkdir(parents=True, exist_ok=True)
        with (results / "rate_quality.jsonl").open("a", encoding="utf-8") as out:
            for stage in STAGES:
                if (not args.stage or stage.name in args.stage) and (args.second or not stage.second):
                    for row in bench.run(stage):
                        out.write(json.dumps(row) + "\n")
                        out.flush()
    rate_tables.write(results, "rate_quality")


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", type=Path, help="folder with prose/ and technical/")
    p.add_argument("--model", help="path of a model (default: the bundled one)")
    p.add_argument("--second", help="path of a second model of another geometry")
    p.add_argument("--stage", action="append", choices=[s.name for s in STAGES], help="only this stage (may be repeated)")
    p.add_argument("--family", action="append", help="only these methods of each stage (may be repeated)")
    p.add_argument("--quick", action="store_true", help="a few documents, to try it out; results go below --work")
    p.add_argument("--tables", action="store_true", help="only make tables and plots of what was measured")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "kvstore-rate-quality",
        help="where calibrations are kept between runs (default: the temporary folder)",
    )
    args = p.parse_args()
    if not (args.tables or args.corpus):
        p.error("--corpus is needed to measure")
    return args


class Bench:
    """Models, texts and settings, each made once."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.set_num_threads(args.threads)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()

    @cache  # noqa: B019  lives as long as the process
    def methods(self, second: bool) -> Methods:
        """float32, in which the model's own noise is far below what is measured."""
        source = ModelSource(self.args.second if second else self.args.model, dtype="float32")
        runner, texts = Runner(source), Texts(self.args.corpus, source.tokenizer)
        return Methods(runner, texts, Shelf(source, self.args.work), 16 if self.args.quick else CALIBRATION_DOCUMENTS)

    def setting(self, stage: Stage) -> Setting:
        methods, count = self.methods(stage.second), self.documents(stage)
        task: Task
        if stage.text == "facts":
            task = Questions(methods.texts.recall(count), methods.texts.tokenizer)
        else:
            task = Continuations(methods.texts.passages(stage.text, stage.tokens, count))
        return Setting(methods.runner, task, self.args.threads)

    def documents(self, stage: Stage) -> int:
        return min(8, stage.documents) if self.args.quick else stage.documents

    def run(self, stage: Stage) -> Iterator[Row]:
        started = time.perf_counter()
        print(f"{stage.name}: {self.documents(stage)} documents", flush=True)
        setting, methods = self.setting(stage), self.methods(stage.second)
        yield self.row(stage, setting, "noise floor", "two live runs", "all", 0.0, setting.noise())
        for family in stage.families:
            if self.args.family and family not in self.args.family:
                continue
            for method in methods.of(family, stage.calibration):
                for at, nbytes, score in setting.measure(method):
                    yield from (self.row(stage, setting, method.name, at, way, size, score) for way, size in nbytes.items())
            print(f"  {family}: {time.perf_counter() - started:.0f} s", flush=True)

    def row(self, stage: Stage, setting: Setting, method: str, at: str, way: str, nbytes: float, score: Score) -> Row:
        methods = self.methods(stage.second)
        row: Row = {"stage": stage.name, "model": methods.shelf.source.identity.name, "values": methods.geometry.values}
        row |= {"text": stage.text, "tokens": stage.tokens, "documents": len(score.kl), "calibration": "+".join(stage.calibration)}
        row |= {"method": method, "setting": at, "way": way, "bytes": nbytes} | spread("kl", score.kl) | spread("agree", score.agree)
        if score.recall is not None and setting.live_recall is not None:
            row |= spread("recall", score.recall) | spread("recall_change", score.recall - setting.live_recall)
            row |= {"live_recall": float(setting.live_recall.mean())}
        return row


def spread(name: str, values: npt.NDArray[np.float64]) -> Row:
    """Mean over documents, and half the 95 % interval."""
    return {name: float(values.mean()), f"{name}_half": float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))}


if __name__ == "__main__":
    main()
