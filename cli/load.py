"""Answer a question from stored documents, or write one document's KV to a file.

With --query the prompt is composed of SOURCE... and the question, with --messages of SOURCE... and a dialogue that
ends with one. The answer is printed as it comes, then the receipt and the time to the first token, from the store
against a cold prefill of the same prompt in this process.
With --out no model is loaded: the file holds layers.N.keys and layers.N.values [1, heads, tokens, head_dim]
at position 0, token_ids, and the receipt as JSON in its metadata.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, human, safe, safe_lines

if TYPE_CHECKING:
    from kvstore.answering import FirstToken

MESSAGES = 'write a JSON list: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, {"role": "user", "content": "..."}]'
USAGE = "SOURCE[#N]... (--query TEXT | --messages FILE | --out FILE.safetensors) [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE[#N]", nargs="+", help="a document, or its passage N, counted from 0")
    purpose = parser.add_mutually_exclusive_group(required=True)
    purpose.add_argument("--query", metavar="TEXT", help="the question")
    purpose.add_argument(
        "--messages", metavar="FILE", help='several turns that end with the question: JSON, [{"role": "user", "content": "..."}, ...]'
    )
    purpose.add_argument("--out", metavar="FILE", help="write the KV of one SOURCE as safetensors")
    options.add_reuse(parser, "prefix", "prefix")
    parser.add_argument(
        "--order",
        choices=("given", "cached"),
        default="given",
        help="cached: documents may be put in another order, so that a longer stored chain is reused (default: given)",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="length of the answer at most (default: 64)")
    options.add_quality(parser)
    options.add_store(parser)
    options.add_model(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="run the model in this dtype (default: its own)")
    options.add_versions(parser, model=False)


def run(args: argparse.Namespace, out: Output) -> int:
    return _write(args, out) if args.out is not None else _answer(args, out)


def _answer(args: argparse.Namespace, out: Output) -> int:
    from kvstore import answering

    store, asked = options.open_with_model(args), _asked(args)
    chosen = {**asked, "reuse": args.reuse, "recompute": args.recompute, "order": args.order, **options.quality_of(args)}
    prompt = store.compose(args.source, **chosen)
    answer = _said(answering.stream(store, prompt, args.max_new_tokens), out)
    took = answering.first_token(store, args.source, **chosen)
    value = {**asked, "answer": answer, "receipt": prompt.receipt.to_dict(), "first_token": {**asdict(took), "ratio": took.ratio}}
    out.result(value, f"\n\n{safe_lines(str(prompt.receipt))}\n{first_token_line(took)}\n")
    return 0


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The question, or the messages that end with it, as `compose` takes them."""
    from kvstore.errors import InputError

    if args.messages is None:
        return {"query": args.query}
    try:
        found = json.loads(options.text_file(args.messages))
    except ValueError as error:
        raise InputError(f"{args.messages}: not JSON ({error})", remedy=MESSAGES) from error
    if not isinstance(found, list):
        raise InputError(f"{args.messages}: not a list of messages", remedy=MESSAGES)
    return {"messages": found}


def _said(pieces: Iterator[str], out: Output) -> str:
    """The whole answer; people see it as it comes, without white space around it."""
    answer = shown = ""
    for piece in pieces:
        answer += piece
        now = answer.strip()
        if not out.as_json and now != shown:
            out.write(safe_lines(now[len(shown) :]))
            out.flush()
        shown = now
    return answer


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
