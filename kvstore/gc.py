"""Taking documents out of a store, and collecting what no kept snapshot reaches."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.chain_rows import pruned
from kvstore.collector import Collector, GcReport, GcRules
from kvstore.errors import NotFoundError
from kvstore.manifest import Row
from kvstore.snapshot import Change
from kvstore.store import Store

__all__ = ["GcReport", "collect", "remove", "rows_of"]


def collect(store: Store, *, keep_snapshots: int = 8, grace_seconds: float = 3600.0, rewrite_share: float = 0.2, drop_damaged: bool = False,
            dry_run: bool = False) -> GcReport:  # fmt: skip
    """Remove what neither the newest `keep_snapshots` nor any tag reaches.

    Packs, calibrations and leftovers younger than `grace_seconds` stay: a builder may be about to commit them. A pack of which at least
    `rewrite_share` (of its bytes) is dead is rewritten without it. A pack with damage is left alone and reported; with `drop_damaged`, what is
    intact is copied out of it and the rest goes, so that the next build compiles that again. Calibrations go that no pack is left of and that
    no model's newest link names; with `drop_damaged` damaged ones go, too, and all that is coded with them.
    Raises InputError for values out of range, IntegrityError where a kept snapshot cannot be read: then nothing is removed.
    """
    rules = GcRules(keep_snapshots, grace_seconds, rewrite_share, drop_damaged, dry_run)
    run = Collector(store.storage, rules)
    run.snapshots()
    run.packs()
    run.calibrations()
    run.quality_reports()
    run.leftovers()
    store.refresh()
    return run.report


def remove(store: Store, sources: Sequence[str], **filters: str | None) -> int:
    """A new snapshot without these documents, and without the chains that other documents have after them; its number. Their bytes stay until gc.

    `filters` (`model`, `template`, `encoding`) are keys or their beginnings. Raises NotFoundError, and removes nothing, where one source
    has no such row.
    """
    removed = {r.id for r in rows_of(store, sources, **filters)}
    shorter = pruned(r for r in store.rows() if r.id not in removed)
    return store.snapshots.commit(Change(tuple(shorter), tuple(removed)), "rm")


def rows_of(store: Store, sources: Sequence[str], **filters: str | None) -> list[Row]:
    """The rows that `remove` takes away. Raises NotFoundError naming the first source that has none."""
    found: list[Row] = []
    for source in dict.fromkeys(sources):
        rows = store.rows(source, **filters)
        if not rows:
            raise NotFoundError(f"{source!r} is not in {store.path}", remedy="`kvstore ls` lists what is; nothing was removed")
        found += rows
    return found
