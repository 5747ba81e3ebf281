"""Answer your own questions live and from the store, at every tier and reuse mode that applies, and say which tier to use.

FILE has a JSON object a line: {"query": "...", "documents": ["a.md", "b.md#3"], "answer": "..."}; `answer` may be a list of right ones.
Answers are greedy. Exact match and F1 are counted over words, as SQuAD does; `same` is the share of answers equal to the live one,
KL is over the live answer's tokens, and times are to the first token, from the store against a full prefill.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, safe, table

if TYPE_CHECKING:
    from kvstore.evaluate import Evaluation, Total

USAGE = "FILE.jsonl [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", metavar="FILE", help="the questions, as JSON lines")
    parser.add_argument("--limit", metavar="N", type=int, help="ask the first N questions alone")
    parser.add_argument("--tier", metavar="NAME", action="append", help="this tier alone (may be repeated; default: all)")
    options.add_reuse(parser, None, "prefix, and blocks for questions that it does not cover")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="length of an answer at most (default: 64)")
    options.add_store(parser)
    options.add_model(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="run the model in this dtype (default: its own)")
    options.add_versions(parser, model=False)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.asking import read_cases

    cases = read_cases(args.questions, args.limit)  # before the model is loaded
    from kvstore.evaluate import evaluate

    found = evaluate(
        options.open_with_model(args),
        cases,
        tiers=args.tier or (),
        reuse=args.reuse,
        recompute=args.recompute,
        max_new_tokens=args.max_new_tokens,
        progress=lambda number, case: out.progress(f"asking: {number} of {len(cases)}, {case.query}"),
    )
    out.result(to_json(found), text(found))
    return 0


def text(found: Evaluation) -> str:
    live = ("full prefill", "-", count(found.live.questions, "question"), _share(found.live.exact), _share(found.live.f1), "-", "-")
    rows = [(*live, f"{found.live.milliseconds:.1f} ms", "-", "-"), *map(_row, found.totals)]
    head = ("answers", "tier", "asked", "exact", "F1", "same", "KL", "first token", "sooner", "reads")
    return table(head, rows) + f"\n{safe(found.advice)}\n"


def _row(t: Total) -> tuple[str, ...]:
    shares = _share(t.exact), _share(t.f1) + ("*" if t.differs else ""), _share(t.agreement)
    return (t.reuse, t.tier, count(t.questions, "question"), *shares, f"{t.kl:.2g}", f"{t.milliseconds:.1f} ms", f"{t.ratio:.1f}x", human(t.nbytes))


def _share(value: float) -> str:
    return f"{value:.1%}"


def to_json(found: Evaluation) -> dict[str, Any]:
    """The --json object."""
    return asdict(found)
