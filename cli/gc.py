"""Delete what neither the newest snapshots nor any tag need. Nothing is encoded again; a killed run loses nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, safe

if TYPE_CHECKING:
    from kvstore.gc import GcReport

USAGE = "[options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", metavar="N", type=int, default=8, help="keep the newest N snapshots (default: 8)")
    parser.add_argument(
        "--grace",
        metavar="SECONDS",
        type=float,
        default=3600.0,
        help="leave alone what is younger: a build may be about to commit it (default: 3600)",
    )
    parser.add_argument("--drop-damaged", action="store_true", help="delete damaged artifacts too, so that the next build compiles them again")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and change nothing")
    options.add_store(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.gc import collect

    report = collect(
        options.open_store(args), keep_snapshots=args.keep, grace_seconds=args.grace, drop_damaged=args.drop_damaged, dry_run=args.dry_run
    )
    out.result(asdict(report), text(report))
    return 0


def text(report: GcReport) -> str:
    would = "would be " if report.dry_run else ""
    packs = f"{count(len(report.packs_removed), 'pack')} {would}removed, {len(report.packs_rewritten)} {would}rewritten, {report.packs_kept} kept"
    snapshots = f"{count(len(report.snapshots_removed), 'snapshot')} {would}removed, {len(report.snapshots_kept)} kept"
    lines = [
        packs,
        f"{count(report.artifacts_dropped, 'artifact')} {would}dropped, {report.artifacts_kept:,} kept",
        snapshots,
        f"{count(report.leftovers_removed, 'leftover')} of crashed builds {would}removed",
        f"{human(report.bytes_freed)} {would}freed",
    ]
    if report.calibrations_removed or report.calibrations_kept:
        lines.insert(-2, f"{count(len(report.calibrations_removed), 'calibration')} {would}removed, {report.calibrations_kept} kept")
    if report.reports_removed:
        lines.insert(-2, f"quality reports of {count(len(report.reports_removed), 'encoding')} {would}removed")
    return "\n".join([*lines, *(f"damaged: {safe(d)}" for d in report.damaged)]) + "\n"
