"""Check every digest in the store: packs, units, token ids, keys, models, templates, snapshots, tags.

With --logits a sample is also prefilled again with the live model: exact tiers must be equal bit for bit (or, on
another machine, to rounding), and of every tier the KL divergence of what the model says next is measured.
Exit status 6 where anything is damaged.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, safe, table

if TYPE_CHECKING:
    from kvstore.relogits import LogitsReport
    from kvstore.verify import VerifyReport

USAGE = "[options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--logits", metavar="N", nargs="?", type=int, const=4, help="prefill N stored segments again and compare (4 without N)")
    options.add_store(parser)
    options.add_model(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.errors import InputError, IntegrityError
    from kvstore.verify import verify

    if args.logits is not None and args.logits < 1:
        raise InputError("--logits needs at least one segment", code="usage")
    report = verify(options.store_path(args), progress=lambda r, where: out.progress(f"{count(r.packs, 'pack')}, {human(r.bytes)}: {where}"))
    logits = _logits(args, out) if args.logits is not None and report.ok else None
    out.result(to_json(report, logits), text(report, logits))
    return 0 if report.ok and not (logits and logits.problems) else IntegrityError.exit_status


def _logits(args: argparse.Namespace, out: Output) -> LogitsReport:
    from kvstore.relogits import relogits

    return relogits(options.open_with_model(args), args.logits, out.progress)


def text(report: VerifyReport, logits: LogitsReport | None) -> str:
    packs = f"{count(report.packs, 'pack')}, {count(report.segments, 'segment')} ({human(report.bytes)})"
    calibrations = f"{count(report.calibrations, 'calibration')}, " if report.calibrations else ""
    read = f"{packs}, {calibrations}{count(report.snapshots, 'snapshot')} read"
    lines = [f"{p.severity}: {safe(p.where)}: {safe(p.what)}" for p in report.problems]
    errors = sum(p.severity == "error" for p in report.problems)
    verdict = f"{read}: every digest matches" if report.ok else f"{read}: {count(errors, 'problem')}"
    return "\n".join([*lines, verdict]) + "\n" + ("" if logits is None else "\n" + _table(logits))


def _table(logits: LogitsReport) -> str:
    rows = [
        (c.source, str(c.passage), c.regime, c.tier, "yes" if c.equal else "no", f"{c.kl:.2g}", f"{100 * c.agreement:.0f} %") for c in logits.checks
    ]
    lines = "".join(f"error: {safe(p)}\n" for p in logits.problems)
    head = f"{logits.segments} of {count(logits.of, 'segment')} prefilled again\n"
    return head + table(("source", "passage", "regime", "tier", "bit for bit", "KL", "agreement"), rows) + lines


def to_json(report: VerifyReport, logits: LogitsReport | None) -> dict[str, Any]:
    """The --json object."""
    found = None if logits is None else {**asdict(logits), "problems": logits.problems}
    return {"ok": report.ok and not (logits and logits.problems), **asdict(report), "logits": found}
