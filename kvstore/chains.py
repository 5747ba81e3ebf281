"""The walk along stored chains: which blocks of a prompt are stored after exactly the tokens that stand before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

from kvstore.artifact import Stored
from kvstore.errors import InputError
from kvstore.identity import Context, segment_key
from kvstore.lookup import Block, View
from kvstore.receipt import DocumentReceipt

if TYPE_CHECKING:
    from kvstore.decode import KV

Order = Literal["given", "cached"]
LEAST_CUT = 16  # tokens: a wrapper that all documents begin with is no hit, and to decode less takes longer than to compute it
_TRIES = 4096  # steps of the search for an order: where all orders are stored there are more than anybody can try


@dataclass(frozen=True)
class Placed:
    """A block at its place in the prompt: from the store (`stored`), or live KV computed in isolation, or neither (left to generation).

    `cut`: so many of its first tokens are `stored`'s, which goes on otherwise; None where all are.
    """

    block: Block
    at: int
    stored: Stored | None
    live: list[KV] | None
    receipt: DocumentReceipt
    cut: int | None = None

    @property
    def held(self) -> int:
        """Tokens from its beginning that go into the cache, where it does at all."""
        return len(self.block.ids) if self.cut is None else self.cut


def walk(view: View, blocks: Sequence[Block], *, cut: bool = False) -> list[Placed]:
    """Longest stored chain from the start; what follows it is left to the first forward pass.

    `cut`: of the first block that is not stored, the longest beginning that some segment stored after the same tokens shares with it.
    """
    placed: list[Placed] = []
    context, at, whole = Context.root(), 0, True
    for block in blocks:
        key = segment_key(view.model, view.layout, context, block.ids)
        stored = view.find(key) if whole else None
        if stored is not None:
            placed.append(Placed(block, at, stored, None, document_receipt(block, "reused", "stored after these tokens", stored)))
        else:
            near = _beginning(view, context, block) if whole and cut else None
            placed.append(Placed(block, at, None, None, _missed(block, at)) if near is None else _cut(block, at, *near))
        whole = whole and stored is not None
        at += len(block.ids)
        context = view.follow(context, key, at, block)
    return placed


def _beginning(view: View, context: Context, block: Block) -> tuple[Stored, int] | None:
    """A stored segment that begins as `block` does in this place, and for how many tokens; of a root the head is compared, which is no document."""
    near = view.prefixes.nearest(context, block.ids) if context.kind != "root" else None
    return near if near is not None and near[1] >= LEAST_CUT else None


def _missed(block: Block, at: int) -> DocumentReceipt:
    return document_receipt(block, "prefilled", block.miss or ("not stored after these tokens" if at else "not stored"), None)


def _cut(block: Block, at: int, stored: Stored, count: int) -> Placed:
    if count == len(block.ids):
        return Placed(block, at, stored, None, document_receipt(block, "reused", "a longer segment stored after these tokens begins so", stored))
    receipt = msgspec.structs.replace(_missed(block, at), fidelity="stored", cut=count)
    return Placed(block, at, stored, None, receipt, count)


def document_receipt(
    block: Block, action: Literal["reused", "moved", "prefilled"], why: str, stored: Stored | None, approximate: bool = False
) -> DocumentReceipt:
    """A receipt before tiers are chosen: no quality, no bytes yet."""
    context: Literal["same prefix", "approximate"] = "approximate" if action == "moved" or approximate else "same prefix"
    fidelity = "live" if stored is None else "stored"
    return DocumentReceipt(block.label, len(block.ids), action, why, context, fidelity, None, 0)


def ordered(view: View, documents: Sequence[Sequence[Block]], order: Order) -> list[int]:
    """Places of `documents` (each its blocks) in the order to use: as given, or `cached`, so that the longest stored chain is reused.

    What no chain holds keeps the given order, behind; of equally long chains the first one in the given order is taken. Raises InputError
    for an unknown order.
    """
    if order not in ("given", "cached"):
        raise InputError(f"unknown order {order!r}", remedy="choose given or cached")
    given = list(range(len(documents)))
    if order == "given" or len(documents) < 2:
        return given
    search = _Search(view, documents)
    first = search.best
    return [*first, *(i for i in given if i not in first)]


class _Search:
    """Depth first through the chains that are stored after the head, in the given order."""

    def __init__(self, view: View, documents: Sequence[Sequence[Block]]):
        self.view, self.documents = view, documents
        self.best: list[int] = []
        self._most, self._tries = 0, 0
        head = view.head()
        key = segment_key(view.model, view.layout, Context.root(), head.ids)
        if view.find(key) is not None:
            self._from([], view.follow(Context.root(), key, len(head.ids), head), 0)

    def _from(self, used: list[int], context: Context, tokens: int) -> None:
        if tokens > self._most:
            self._most, self.best = tokens, used
        if not self.view.prefixes.followed(context):
            return
        for index, blocks in enumerate(self.documents):
            self._tries += 1
            if index not in used and self._tries <= _TRIES:
                self._with([*used, index], blocks, context, tokens)

    def _with(self, used: list[int], blocks: Sequence[Block], context: Context, tokens: int) -> None:
        """`used` with one more document at its end, as far as its passages are stored."""
        for block in blocks:
            key = segment_key(self.view.model, self.view.layout, context, block.ids)
            if self.view.find(key) is None:
                if tokens > self._most:
                    self._most, self.best = tokens, used
                return
            tokens += len(block.ids)
            context = self.view.follow(context, key, context.tokens + len(block.ids), block)
        self._from(used, context, tokens)
