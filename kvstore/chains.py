"""The walk along stored chains: which blocks of a prompt are stored after exactly the tokens that stand before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvstore.artifact import Stored
from kvstore.identity import Context, segment_key
from kvstore.lookup import Block, View
from kvstore.receipt import DocumentReceipt

if TYPE_CHECKING:
    from kvstore.decode import KV


@dataclass(frozen=True)
class Placed:
    """A block at its place in the prompt: from the store (`stored`), or live KV computed in isolation, or neither (left to generation)."""

    block: Block
    at: int
    stored: Stored | None
    live: list[KV] | None
    receipt: DocumentReceipt


def walk(view: View, blocks: Sequence[Block]) -> list[Placed]:
    """Longest stored chain from the start; what follows it is left to the first forward pass."""
    placed: list[Placed] = []
    context, at, whole = Context.root(), 0, True
    for block in blocks:
        key = segment_key(view.model, view.layout, context, block.ids)
        stored = view.find(key) if whole else None
        whole = whole and stored is not None
        why = "stored after these tokens" if stored else block.miss or ("not stored after these tokens" if at else "not stored")
        placed.append(Placed(block, at, stored, None, document_receipt(block, "reused" if stored else "prefilled", why, stored)))
        at += len(block.ids)
        context = view.follow(context, key, at, block)
    return placed


def document_receipt(
    block: Block, action: Literal["reused", "moved", "prefilled"], why: str, stored: Stored | None, approximate: bool = False
) -> DocumentReceipt:
    """A receipt before tiers are chosen: no quality, no bytes yet."""
    context: Literal["same prefix", "approximate"] = "approximate" if action == "moved" or approximate else "same prefix"
    fidelity = "live" if stored is None else "stored"
    return DocumentReceipt(block.label, len(block.ids), action, why, context, fidelity, None, 0)
