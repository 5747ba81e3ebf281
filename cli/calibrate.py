"""Learn from a sample of the documents what the transform codec needs, and make it what new builds of the model use.

PATH is a folder or file as for `kvstore build`. A build calibrates by itself where the store has no calibration for the model;
this command makes a new one, with other choices or for other documents. What is stored already stays as it is.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, safe, table

if TYPE_CHECKING:
    from kvstore.calibrator import CalibrationReport

USAGE = "PATH... [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="+", help="folder or file")
    options.add_store(parser)
    options.add_model(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="run the model in this dtype (default: its own)")
    parser.add_argument("--template", metavar="NAME|FILE", default="auto", help="auto, plain, or a file, as for build (default: auto)")
    parser.add_argument("--system", metavar="FILE", help="the system prompt, as for build")
    options.add_calibration(parser)
    parser.add_argument("--tokens", metavar="N", type=int, help="learn from so many (default: 16 per dimension of a group, 32,768 at least)")
    parser.add_argument("--group-layers", metavar="N", type=int, help="code so many layers together (default: what 8,192 values a token allow)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="which documents, which draws (default: 0)")
    parser.add_argument("--include", metavar="PATTERN", action="append", help="files to read in folders, such as '*.md' (may be repeated)")


def run(args: argparse.Namespace, out: Output) -> int:
    import kvstore

    report = kvstore.calibrate(
        [Path(p) for p in args.path],  # a mistyped name is no text
        options.store_path(args),
        options.model_to_build(args),
        tokens=args.tokens,
        group_layers=args.group_layers,
        seed=args.seed,
        template=args.template,
        system=None if args.system is None else options.text_file(args.system),
        include=args.include,
        progress=lambda stage, share: out.progress(f"{stage} {share:.0%}"),
        **options.calibration_of(args),
    )
    out.result(to_json(report), text(report))
    return 0


def text(report: CalibrationReport) -> str:
    learnt = f"learnt from {count(report.tokens, 'token')}, of {count(report.documents, 'document')}"
    written = f" and of {count(report.sampled, 'token')} that the model wrote, the documents being too little" if report.sampled else ""
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in report.seconds.items() if name != "total")
    groups = f"{count(len(report.ranks), 'group')} of up to {count(report.group_layers, 'layer')}, {sum(report.ranks):,} coefficients"
    rows = [(name, f"{bits:.3f}", f"{16 / bits:.1f}x" if bits else "-", f"{kl:.2g}") for name, bits, kl in _tiers(report)]
    lines = [
        f"calibration {report.digest[:12]} ({report.metric}): {learnt}{written}",
        f"{groups}, {human(report.nbytes)}, {report.seconds['total']:.1f} s ({seconds})",
        table(("tier", "bits/value", "smaller", "KL"), rows).rstrip("\n"),
    ]
    return "\n".join([*lines, "KL in nats a token, on text held out of the sample", _current(report)]) + "\n"


def _tiers(report: CalibrationReport) -> list[tuple[str, float, float]]:
    names = ("draft", "standard", "fine")[3 - len(report.kl) :]
    return list(zip(names, report.bits, report.kl, strict=True))


def _current(report: CalibrationReport) -> str:
    if report.current == report.digest:
        return f"new builds into {safe(report.store)} use it"
    return f"new builds into {safe(report.store)} use {report.current[:12]}: another process was faster"


def to_json(report: CalibrationReport) -> dict[str, Any]:
    """The --json object."""
    return asdict(report)
