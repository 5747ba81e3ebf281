"""Find the stored run that shares the longest beginning with a text, and where the two part.

The text is rendered as a document, as `build` does it, and compared token by token.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output

if TYPE_CHECKING:
    from kvstore.api import OpenStore
    from kvstore.match import Match

USAGE = "(FILE | --text TEXT) [options]"
_AROUND = 12  # tokens shown on each side


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", help="the text, as a file")
    parser.add_argument("--text", metavar="TEXT", help="the text itself")
    parser.add_argument("--source", metavar="SOURCE", help="compare with this document first")
    options.add_store(parser)
    options.add_model(parser)
    options.add_versions(parser, model=False)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.errors import InputError

    if (args.file is None) == (args.text is None):
        raise InputError("give either FILE or --text TEXT", code="usage")
    given: str = args.text if args.text is not None else options.text_file(args.file)
    store = options.open_with_model(args)
    found = store.match(given, args.source)
    sides = _sides(store, found, given)
    out.result(
        {**asdict(found), "sources": list(found.sources), "chains": [list(c) for c in found.chains], "exact": found.exact, **sides},
        text(found, sides),
    )
    return 0


def _sides(store: OpenStore, found: Match, given: str) -> dict[str, Any]:
    """What stands around the first difference, decoded."""
    view, at = store.view, found.matched
    ids = view.renderer.document(given)
    stored = [int(i) for i in store.stored(found.key, view.encoding_id).ids] if found.key else []
    decode = store.source.tokenizer.decode
    return {
        "before": decode(ids[max(0, at - _AROUND) : at]),
        "given_text": decode(ids[at : at + _AROUND]),
        "found_text": decode(stored[at : at + _AROUND]),
    }


def text(found: Match, sides: dict[str, Any]) -> str:
    """The verdict in a line; below it, where the two part."""
    if found.key is None:
        return f"nothing stored begins as this text does ({found.total:,} tokens)\n"
    where = ", ".join(map(ascii, found.sources)) or f"segment {found.key[:12]}, which no document of the newest snapshot uses"
    where += "".join(f", also after {', '.join(map(ascii, names))}" for names in found.chains)
    if found.exact:
        return f"stored: all {found.total:,} tokens are {where}\n"
    lines = [
        f"{found.matched:,} of {found.total:,} tokens match {where} ({found.stored:,} tokens stored)",
        f"after   {sides['before']!a}",
        f"given   {_side(found.given, sides['given_text'])}",
        f"stored  {_side(found.found, sides['found_text'])}",
    ]
    return "\n".join(lines) + "\n"


def _side(token: int | None, shown: str) -> str:
    return "ends here" if token is None else f"{shown!a} (token {token})"
