"""Compile documents into a store and commit a snapshot.

PATH is a folder (text, Markdown, reStructuredText, JSONL, Parquet; deep), or one such file.
What is stored already is not computed again; sources gone from PATH leave the snapshot.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, safe

if TYPE_CHECKING:
    from kvstore.build_report import BuildReport
    from kvstore.chain_plan import ChainReport

USAGE = "PATH... [options]"
INTERRUPTED = 130


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", nargs="+", help="folder or file")
    options.add_store(parser)
    options.add_model(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="run the model in this dtype (default: its own)")
    parser.add_argument(
        "--template",
        metavar="NAME|FILE",
        default="auto",
        help="auto (the tokenizer's chat template), plain, or a file with {system}, {document} and {query} (default: auto)",
    )
    parser.add_argument("--system", metavar="FILE", help="a system prompt, compiled once before all documents")
    parser.add_argument(
        "--regime",
        choices=("prefix", "isolated", "both"),
        default="prefix",
        help="prefix: exact after the system prompt; isolated: usable anywhere, approximate (default: prefix)",
    )
    parser.add_argument("--passage-tokens", metavar="N", type=int, help="cut documents into passages of at most N tokens")
    parser.add_argument(
        "--long", choices=("split", "skip", "error"), default="split", help="what to do with documents beyond the model's context (default: split)"
    )
    parser.add_argument(
        "--codec",
        choices=("transform", "scalar", "lossless", "raw", "cachegen"),
        default="transform",
        help="how values become bytes (default: transform)",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME[:K=V,...]",
        default="uniform",
        help="which tokens count: uniform, sink+recent, h2o, kvzip (finer or coarser steps, or rest=drop), fastgen (default: uniform)",
    )
    parser.add_argument(
        "--chains",
        metavar="FILE",
        help='a query log of lines {"documents": ["a.md", "b.md"], "count": 3}: orders asked for twice are stored, each document after those before',
    )
    parser.add_argument(
        "--chain-budget", metavar="TOKENS", type=int, help="how many tokens these may have together (default: as many as the documents have)"
    )
    parser.add_argument(
        "--batch-tokens",
        metavar="N",
        type=int,
        help="prefill segments of like length together, N tokens at a time: quicker on a GPU, and equal to a live prefix only up to rounding; "
        "0: one by one (default: 16384 on a GPU, 0 on the CPU)",
    )
    parser.add_argument("--lossless", action="store_true", help="store a lossless tier as well")
    options.add_calibration(parser)
    parser.add_argument("--recalibrate", action="store_true", help="learn anew what the transform codec needs, from these documents")
    parser.add_argument(
        "--certify",
        choices=("none", "sample", "all"),
        default="sample",
        help="measure what the tiers lose on a sample of the new documents, on all, or not at all (default: sample)",
    )
    parser.add_argument("--certify-documents", metavar="N", type=int, default=8, help="documents in that sample (default: 8)")
    parser.add_argument("--include", metavar="PATTERN", action="append", help="files to read in folders, such as '*.md' (may be repeated)")
    parser.add_argument("--strict", action="store_true", help="a document that cannot be compiled is an error")
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled, and write nothing")


def run(args: argparse.Namespace, out: Output) -> int:
    import kvstore

    report = kvstore.build(
        [Path(p) for p in args.path],  # a mistyped name is no text
        options.store_path(args),
        options.model_to_build(args),
        template=args.template,
        system=None if args.system is None else options.text_file(args.system),
        regime=args.regime,
        passage_tokens=args.passage_tokens,
        long=args.long,
        codec=args.codec,
        policy=args.policy,
        lossless=args.lossless,
        batch_tokens=args.batch_tokens,
        chains=_log(args),
        chain_budget=args.chain_budget,
        certify=args.certify,
        certify_documents=args.certify_documents,
        include=args.include,
        recalibrate=args.recalibrate,
        strict=args.strict,
        dry_run=args.dry_run,
        progress=lambda r, name: out.progress(_doing(r, name)),
        **options.calibration_of(args),
    )
    learns = args.dry_run and args.codec == "transform" and not report.calibration
    out.result(to_json(report, args.dry_run), summary(report, args.dry_run, learns))
    if report.interrupted:
        stored = "nothing was written" if args.dry_run else _stored(report)
        out.say(f"interrupted: {stored}; run the same command again to go on")
    return INTERRUPTED if report.interrupted else 0


def _log(args: argparse.Namespace) -> str | None:
    """Raises InputError for a budget without a log."""
    from kvstore.errors import InputError

    if args.chain_budget is not None and args.chains is None:
        raise InputError("--chain-budget without --chains", remedy="name the query log", code="usage")
    found: str | None = args.chains
    return found


def _doing(report: BuildReport, name: str) -> str:
    return f"{count(report.documents, 'document')}, {report.compiled} compiled, {count(report.tokens, 'token')}: {name}"


def _stored(report: BuildReport) -> str:
    """As the store itself says it."""
    from kvstore.store import Store

    store = Store(report.store)
    return f"snapshot {store.number} holds {count(len(store), 'document')}" if store.number else "nothing is stored"


def summary(report: BuildReport, dry_run: bool = False, learns: bool = False) -> str:
    """What `build` prints at its end. `learns`: a dry run for which the real one would calibrate first."""
    done, removed = ("to compile", "to remove") if dry_run else ("compiled", "removed")
    counts = f"{report.compiled} {done}, {report.unchanged} unchanged, {report.removed} {removed}, {len(report.skipped)} skipped"
    lines = [f"{count(report.documents, 'document')}: {counts}"]
    lines += [f"  skipped {safe(s.source)}: {safe(s.reason)}" for s in report.skipped]
    verb = "would be compiled" if dry_run else "compiled"
    lines.append(f"{count(report.segments, 'segment')} and {count(report.tokens, 'token')} {verb} in {report.seconds['total']:.1f} s{_parts(report)}")
    lines += ["a calibration would be learnt from them first"] * learns
    if report.tokens and report.nbytes:
        lines.append("bytes a token: " + ", ".join(f"{tier} {n / report.tokens:,.0f}" for tier, n in report.nbytes.items()))
    if report.quality:
        lines.append(_quality(report))
    lines += [safe(note) for note in report.notes if note.startswith("no quality report")]  # the others were warned of
    if report.chains is not None:
        lines += _chains(report.chains, dry_run)
    where = f"{safe(report.store)}, snapshot {report.snapshot}" if not dry_run else "nothing was written"
    return "\n".join([*lines, f"{where}: {report.serves}"]) + "\n"


def _chains(chains: ChainReport, dry_run: bool) -> list[str]:
    """What the query log is worth: with the chains, and without."""
    size = f"{count(chains.segments, 'segment')} and {count(chains.tokens, 'token')}, {'at most' if dry_run else f'{chains.compiled} of them new'}"
    served, before = chains.served, chains.before
    lines = [
        f"chains: {size}" + ("" if chains.segments else ": no order was asked for twice, or none fits --chain-budget"),
        f"  of {count(chains.requests, 'request')} in the log {served.requests:.0%} are stored to their last document (without chains "
        f"{before.requests:.0%}), and {served.tokens:.0%} of their documents' tokens (without {before.tokens:.0%})",
    ]
    if chains.unknown:
        first = f", the first {chains.missing!a}" if chains.missing is not None else ""
        lines.append(f"  {count(chains.unknown, 'request')} not served whole: documents that are not there{first}, or more than the context holds")
    return lines


def _quality(report: BuildReport) -> str:
    """Measured means, and the upper bounds that `max_kl` goes by."""
    some = next(iter(report.quality.values()))
    bounds = (f"{tier} {q['kl']:.2g}" + ("" if q["upper"] is None else f" (up to {q['upper']:.2g})") for tier, q in report.quality.items())
    return f"KL, nats a token, over {count(some['documents'], 'document')}: {', '.join(bounds)}"


def _parts(report: BuildReport) -> str:
    parts = [f"{name} {seconds:.1f}" for name, seconds in report.seconds.items() if name != "total"]
    return f" ({', '.join(parts)})" if report.nbytes else ""


def to_json(report: BuildReport, dry_run: bool = False) -> dict[str, Any]:
    """The --json object."""
    skipped = [{"source": s.source, "reason": s.reason} for s in report.skipped]
    per_token = {tier: n / report.tokens for tier, n in report.nbytes.items()} if report.tokens else {}
    return {**asdict(report), "skipped": skipped, "bytes_per_token": per_token, "dry_run": dry_run}
