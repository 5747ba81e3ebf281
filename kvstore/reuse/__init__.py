"""The registry of reuse modes. What is done with stored documents that stand elsewhere in the prompt than they were built; one mode a file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Literal

from kvstore.errors import InputError

if TYPE_CHECKING:
    from kvstore.reuse.base import Mode

__all__ = ["NAMES", "Reuse", "mode_of"]
Reuse = Literal["prefix", "blocks", "epic", "cacheblend", "query"]
REGISTRY = {
    "prefix": "kvstore.reuse.prefix:Prefix",
    "blocks": "kvstore.reuse.blocks:Blocks",
    "epic": "kvstore.reuse.epic:Epic",
    "cacheblend": "kvstore.reuse.cacheblend:CacheBlend",
    "query": "kvstore.reuse.query:Query",
}
NAMES = tuple(REGISTRY)


def mode_of(name: str, recompute: int | float | None = None) -> Mode:
    """The mode of that name; `recompute` None means its own default. Raises InputError for an unknown name or a budget it does not take."""
    if name not in REGISTRY:
        raise InputError(f"unknown reuse mode {name!r}", remedy=f"choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    module, _, attribute = REGISTRY[name].partition(":")
    kind: type[Mode] = getattr(import_module(module), attribute)
    return kind(recompute)
