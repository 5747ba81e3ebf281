"""Compare two snapshots: documents that came, went, or changed, and in what."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, safe

if TYPE_CHECKING:
    from kvstore.diff import Diff
    from kvstore.manifest import Row
    from kvstore.store import Store

USAGE = "A [B] [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="number or tag of a snapshot; 0 is the empty store before the first")
    parser.add_argument("b", metavar="B", nargs="?", help="another one (default: the newest)")
    options.add_store(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.diff import diff

    store = options.open_store(args)
    found = diff(store, _number(store, args.a), store.number if args.b is None else _number(store, args.b))
    out.result(to_json(found), text(found))
    return 0


def _number(store: Store, given: str) -> int:
    """Raises NotFoundError for a tag that is not there."""
    from kvstore.errors import NotFoundError
    from kvstore.tags import list_tags

    tags = list_tags(store.storage)
    if given not in tags and not given.isdigit():
        raise NotFoundError(f"there is no tag {safe(given)!r}", remedy="`kvstore snapshots` lists them")
    return tags[given] if given in tags else int(given)


def text(found: Diff) -> str:
    """A line a document, then the sums."""
    lines = [f"+ {_shown(r)}" for r in found.added] + [f"- {_shown(r)}" for r in found.removed]
    for c in found.changed:
        before, after = c.tokens
        length = f", {before:,} -> {after:,} tokens" if before != after else ""
        chains = f", {len(c.before.chained)} -> {count(len(c.after.chained), 'chain')}" if "chains" in c.fields else ""
        lines.append(f"~ {_shown(c.after)}: {', '.join(c.fields)}{length}{chains}")
    total = f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed; {found.tokens:+,} tokens"
    return "\n".join([*lines, f"snapshot {found.a} to {found.b}: {total}"]) + "\n"


def _shown(row: Row) -> str:
    return f"{safe(row.source)} (model {row.model[:12]} template {row.template[:12]} encoding {row.encoding[:12]})"


def to_json(found: Diff) -> dict[str, Any]:
    """The --json object."""
    changed = [{**_row(c.after), "fields": list(c.fields), "tokens_before": c.tokens[0]} for c in found.changed]
    return {
        "a": found.a,
        "b": found.b,
        "added": [_row(r) for r in found.added],
        "removed": [_row(r) for r in found.removed],
        "changed": changed,
        "tokens": found.tokens,
    }


def _row(row: Row) -> dict[str, Any]:
    from kvstore.diff import row_tokens

    return {
        "source": row.source,
        "model": row.model,
        "template": row.template,
        "encoding": row.encoding,
        "tokens": row_tokens(row),
        "chains": len(row.chained),
    }
