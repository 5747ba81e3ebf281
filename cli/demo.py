"""Build the bundled sample corpus with the bundled model, inspect it, load it, and answer from it.

Every question about the corpus is answered live and from the store, at the tiers standard, fine and lossless.
Exit status 1 where an answer at fine or lossless differs from the live one.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, safe, table

if TYPE_CHECKING:
    from kvstore.demo import Asked, DemoReport

USAGE = "[options]"
_SHOWN = 8


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="DIR", help="build it here (default: in the user's cache folder, where the next run finds it)")
    options.add_json(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.demo import demo

    report = demo(args.store, out.progress)
    out.result(to_json(report), text(report))
    return 0 if report.ok else 1


def text(report: DemoReport) -> str:
    return "\n".join([_built(report), _documents(report), _tiers(report), _first_token(report), _answers(report), _next(report)])


def _built(report: DemoReport) -> str:
    b = report.build
    return (
        f"store      {safe(report.store)}\n"
        f"compiled   {b.compiled} of {count(b.documents, 'document')} ({b.unchanged} stored already) in {b.seconds['total']:.1f} s\n"
        f"           {b.serves}\n"
    )


def _documents(report: DemoReport) -> str:
    shown = report.documents[:: max(1, len(report.documents) // _SHOWN)][:_SHOWN]
    rows = [(d.source, d.tokens, human(d.nbytes), f"{d.nbytes / d.tokens:,.0f}") for d in shown]
    tokens, nbytes = sum(d.tokens for d in report.documents), sum(d.nbytes for d in report.documents)
    rows.append((f"all {len(report.documents)}", tokens, human(nbytes), f"{nbytes / tokens:,.0f}"))
    return table(("document", "tokens", "stored", "bytes/token"), rows)


def _tiers(report: DemoReport) -> str:
    total = report.encoding
    rows = [(t.name, f"{t.load_nbytes / total.tokens:,.0f}", f"{t.raw_ratio:.1f}x", _kl(t.kl, t.exact), _kl(t.upper, t.exact)) for t in total.tiers]
    return table(("a load at", "bytes/token", "smaller", "KL", "up to"), rows) + _about_tiers(report)


def _kl(value: float | None, exact: bool) -> str:
    return "0 (exact)" if exact else "not measured" if value is None else f"{value:.2g}"


def _about_tiers(report: DemoReport) -> str:
    """What the table leaves out."""
    learnt = [c for c in report.stats.calibrations if c.current]
    size = f"; the calibration, {human(learnt[0].nbytes)} once a model, is not counted" if learnt else ""
    fit = f"{count(len(report.build.poor_fit), 'document')} measured at more than twice the usual KL: the calibration learnt from other text\n"
    about = f"KL in nats a token, measured by the build on a sample{size}\n"
    return about + (fit if report.build.poor_fit else "") + "the model is tiny: sizes do not carry over to large ones\n"


def _first_token(report: DemoReport) -> str:
    rows = [(tier, f"{t.stored:.1f} ms", f"{t.cold:.1f} ms", f"{t.ratio:.1f}x") for tier, t in report.first_token.items()]
    some = next(iter(report.first_token.values()))
    head = f"the first token of an answer after {some.cached_tokens:,} stored tokens (a prompt of {some.tokens:,}):\n"
    return head + table(("tier", "stored", "cold prefill", "sooner"), rows)


def _answers(report: DemoReport) -> str:
    rows = [_row(a) for a in report.asked[:: max(1, len(report.asked) // _SHOWN)][:_SHOWN]]
    wrong = [_row(a) for a in report.asked if not a.same]
    tiers = list(report.asked[0].stored)
    same = ", ".join(f"{sum(a.stored[t] == a.live for a in report.asked)} at {t}" for t in tiers)
    total = f"{len(report.asked)} questions: {report.right} live answers are what the document says; stored answers equal to the live ones: {same}\n"
    head = ("document", "question", "expected", "live", *tiers)
    return table(head, rows) + total + ("\nthese differ:\n" + table(head, wrong) if wrong else "")


def _row(asked: Asked) -> tuple[str, ...]:
    return (asked.source, asked.question, asked.expected, asked.live, *asked.stored.values())


def _next(report: DemoReport) -> str:
    first = report.asked[0]
    return (
        f"took {report.seconds:.1f} s. Go on with this store:\n"
        f"  kvstore show {safe(first.source)} --store {safe(report.store)}\n"
        f'  kvstore load {safe(first.source)} --query "{safe(first.question)}" --tier standard --store {safe(report.store)}\n'
        f"  kvstore plot --store {safe(report.store)}\n"
        "or with your own documents and a model of your own (a folder, or an id on the hub):\n"
        "  kvstore doctor MODEL\n"
        "  kvstore build PATH... --model MODEL --store kv.zarr          # learns a calibration first; --lossless adds an exact tier\n"
        "  kvstore eval QUESTIONS.jsonl --store kv.zarr                 # which tier is good enough for your questions\n"
        '  kvstore load SOURCE --query "..." --store kv.zarr\n'
    )


def to_json(report: DemoReport) -> dict[str, Any]:
    """The --json object."""
    from kvstore.cli import build, ls, stats

    return {
        "store": report.store,
        "ok": report.ok,
        "right": report.right,
        "seconds": report.seconds,
        "build": build.to_json(report.build),
        "stats": stats.to_json(report.stats),
        "documents": [ls.to_json(d) for d in report.documents],
        "first_token": {tier: {**asdict(t), "ratio": t.ratio} for tier, t in report.first_token.items()},
        "asked": [{**asdict(a), "same": a.same} for a in report.asked],
    }
