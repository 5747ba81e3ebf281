"""Take documents out of the newest snapshot. Earlier snapshots keep them; their bytes go when gc finds them unneeded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, safe

if TYPE_CHECKING:
    from kvstore.manifest import Row

USAGE = "SOURCE... [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="a document's name")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and change nothing")
    options.add_store(parser)
    options.add_versions(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.gc import remove, rows_of

    store = options.open_store(args)
    wanted = options.versions_of(args, store)
    rows = rows_of(store, args.source, **wanted)
    number = store.number if args.dry_run else remove(store, args.source, **wanted)
    value: dict[str, Any] = {"snapshot": number, "dry_run": args.dry_run, "removed": [_to_json(r) for r in rows]}
    verb = "would be removed" if args.dry_run else "removed"
    lines = [f"{verb}: {safe(r.source)} (model {r.model[:12]} template {r.template[:12]} encoding {r.encoding[:12]})" for r in rows]
    out.result(value, "\n".join([*lines, f"snapshot {number}: {count(len({r.source for r in rows}), 'document')} {verb}"]) + "\n")
    return 0


def _to_json(row: Row) -> dict[str, str]:
    return {"source": row.source, "model": row.model, "template": row.template, "encoding": row.encoding}
