"""List the snapshots; with --tag or --untag name them. gc keeps what a tag names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from kvstore.cli import options
from kvstore.cli.output import Output, table

USAGE = "[--tag NAME [NUMBER] | --untag NAME] [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--tag", metavar="NAME", help="name snapshot NUMBER, the newest by default")
    parser.add_argument("number", metavar="NUMBER", nargs="?", type=int, help="the snapshot that --tag names")
    change.add_argument("--untag", metavar="NAME", help="forget a name")
    options.add_store(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.errors import InputError
    from kvstore.tags import add_tag, list_tags, remove_tag

    if args.number is not None and args.tag is None:
        raise InputError("NUMBER goes with --tag NAME", remedy="`kvstore snapshots` alone lists them all", code="usage")
    store = options.open_store(args)
    if args.tag is not None:
        add_tag(store.storage, args.tag, args.number)
    if args.untag is not None:
        remove_tag(store.storage, args.untag)
    tags = list_tags(store.storage)
    rows = [_row(store, number, tags) for number in store.snapshots.numbers()]
    header = ("snapshot", "created", "changed", "removed", "note", "tags")
    out.result(
        {"store": str(store.path), "newest": store.number, "snapshots": rows},
        table(header, [(str(r["number"]), r["created"], r["changed"], r["removed"], r["note"], ", ".join(r["tags"])) for r in rows]),
    )
    return 0


def _row(store: Any, number: int, tags: Mapping[str, int]) -> dict[str, Any]:
    """`changed` counts the rows in the file: all of them where it is a full list."""
    snapshot = store.snapshots.read(number)
    return {
        "number": number,
        "created": snapshot.created,
        "note": snapshot.note,
        "full": snapshot.full,
        "changed": len(snapshot.rows),
        "removed": len(snapshot.removed),
        "tags": [name for name, tagged in tags.items() if tagged == number],
    }
