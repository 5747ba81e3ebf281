"""Answer a question from stored documents, or write one document's KV to a file.

With --query the prompt is composed of SOURCE... and the question; the answer, the receipt and the time
to the first token are printed, from the store against a cold prefill of the same prompt in this process.
With --out no model is loaded: the file holds layers.N.keys and layers.N.values [1, heads, tokens, head_dim]
at position 0, token_ids, and the receipt as JSON in its metadata.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, human, safe, safe_lines

if TYPE_CHECKING:
    from kvstore.answering import FirstToken

USAGE = "SOURCE[#N]... (--query TEXT | --out FILE.safetensors) [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE[#N]", nargs="+", help="a document, or its passage N, counted from 0")
    purpose = parser.add_mutually_exclusive_group(required=True)
    purpose.add_argument("--query", metavar="TEXT", help="the question")
    purpose.add_argument("--out", metavar="FILE", help="write the KV of one SOURCE as safetensors")
    parser.add_argument(
        "--reuse",
        choices=("prefix", "blocks"),
        default="prefix",
        help="prefix: the longest stored beginning, exact; blocks: documents stored alone, side by side, approximate (default: prefix)",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="length of the answer at most (default: 64)")
    options.add_quality(parser)
    options.add_store(parser)
    options.add_model(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="run the model in this dtype (default: its own)")
    options.add_versions(parser, model=False)


def run(args: argparse.Namespace, out: Output) -> int:
    return _answer(args, out) if args.query is not None else _write(args, out)


def _answer(args: argparse.Namespace, out: Output) -> int:
    from kvstore import answering

    store, quality = options.open_with_model(args), options.quality_of(args)
    prompt = store.compose(args.source, args.query, reuse=args.reuse, **quality)
    answer = answering.answer(store, prompt, args.max_new_tokens)
    took = answering.first_token(store, args.source, args.query, reuse=args.reuse, **quality)
    value = {"query": args.query, "answer": answer, "receipt": prompt.receipt.to_dict(), "first_token": {**asdict(took), "ratio": took.ratio}}
    out.result(value, f"{safe_lines(answer.strip())}\n\n{safe_lines(str(prompt.receipt))}\n{first_token_line(took)}\n")
    return 0


def first_token_line(took: FirstToken) -> str:
    """One line for people."""
    return (
        f"first token: {took.stored:.1f} ms from the store, {took.cold:.1f} ms by a cold prefill of {took.tokens:,} tokens "
        f"({took.ratio:.1f} times faster; best of {took.runs})"
    )


def _write(args: argparse.Namespace, out: Output) -> int:
    from kvstore.errors import InputError
    from kvstore.export import export

    if len(args.source) > 1:
        raise InputError("--out takes one document", remedy="write one file each", code="usage")
    store = options.open_with_model(args)
    done = export(store, args.source[0], args.out, **options.quality_of(args))
    receipt = done.receipt
    value: dict[str, Any] = {"out": str(done.path), "nbytes": done.nbytes, "receipt": receipt}
    out.result(
        value,
        f"{safe(str(done.path))}: {receipt['tokens']:,} tokens of {safe(receipt['source'])} at tier {receipt['tier']}, "
        f"{human(done.nbytes)} from {human(receipt['nbytes'])} stored, in {receipt['milliseconds']:.0f} ms\n",
    )
    return 0
