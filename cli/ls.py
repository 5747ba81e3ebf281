"""List the documents of the newest snapshot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, table

if TYPE_CHECKING:
    from kvstore.inventory import Listed

USAGE = "[SOURCE] [options]"
_HEADER = ("source", "passages", "tokens", "bytes", "tiers", "regime")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="list this document alone")
    parser.add_argument("--all", action="store_true", help="one line for each model, template and encoding that a document is stored in")
    options.add_store(parser)
    options.add_versions(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.inventory import documents

    store = options.open_store(args)
    found = documents(store, args.source, **options.versions_of(args, store))
    out.result(
        {"store": str(store.path), "snapshot": store.number, "documents": [to_json(d) for d in found]},
        text(found, every=args.all) + _total(found, store.number),
    )
    return 0


def text(found: Sequence[Listed], every: bool = False) -> str:
    """The table: a line a document, or with `every` a line a version."""
    if every:
        rows = [(*_cells([d]), d.model[:12], d.template[:12], d.encoding[:12]) for d in found]
        return table((*_HEADER, "model", "template", "encoding"), rows)
    return table(_HEADER, [_cells(list(group)) for _, group in groupby(found, lambda d: d.source)])


def _cells(versions: Sequence[Listed]) -> tuple[Any, ...]:
    """One document; of several versions the first one's length, all their tiers, and their bytes together."""
    first = versions[0]
    tiers = dict.fromkeys(t for v in versions for t in v.tiers)
    regimes = {r for v in versions for r in v.regimes}
    chains = sum(v.chains for v in versions)
    contexts = regime(regimes) + (f", {count(chains, 'chain')}" if chains else "")
    return (first.source, first.passages, first.tokens, human(sum(v.nbytes for v in versions)), ", ".join(tiers), contexts)


def regime(regimes: Sequence[str] | set[str]) -> str:
    """`prefix`, `isolated` or `both`."""
    return "both" if len(set(regimes)) == 2 else next(iter(regimes), "-")


def _total(found: Sequence[Listed], snapshot: int) -> str:
    documents = {d.source: d for d in found}
    tokens = sum(d.tokens for d in documents.values())
    versions = f" in {len(found)} versions" if len(found) > len(documents) else ""
    return f"snapshot {snapshot}: {count(len(documents), 'document')}{versions}, {count(tokens, 'token')}, {human(sum(d.nbytes for d in found))}\n"


def to_json(listed: Listed) -> dict[str, Any]:
    return {**asdict(listed), "tiers": list(listed.tiers), "regimes": list(listed.regimes)}
