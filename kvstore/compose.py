"""Prompts from artifacts: which stored segments stand where, what is computed live, and the inputs for generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from kvstore.artifact import Stored, tier_chain
from kvstore.chains import Placed, document_receipt, walk
from kvstore.decode import KV, Decoder, Piece, allocate
from kvstore.errors import IncompatibleError, InputError, NotFoundError
from kvstore.families.rope import rotate
from kvstore.identity import segment_key
from kvstore.lookup import Block, View
from kvstore.models import ModelSource
from kvstore.prefill import Prefiller
from kvstore.prompt import Prompt
from kvstore.quality import Quality
from kvstore.receipt import DocumentReceipt, Receipt
from kvstore.store import Store

Reuse = Literal["prefix", "blocks"]


class Composer:
    """Puts prompts together from one view of a store."""

    def __init__(self, view: View, source: ModelSource, decoder: Decoder):
        self.view, self.source, self.decoder = view, source, decoder
        self._state = source.state()
        self._prefiller: Prefiller | None = None

    def compose(self, documents: Sequence[Any], query: str, reuse: Reuse, quality: Quality) -> Prompt:
        """Head, documents, query. Raises InputError, NotFoundError, IncompatibleError, IntegrityError, ResourceError."""
        if reuse not in ("prefix", "blocks"):
            raise InputError(f"unknown reuse mode {reuse!r}", remedy="choose prefix or blocks")
        started = time.perf_counter()
        self._require_unchanged()
        blocks = [self.view.head(), *(b for d in documents for b in self.view.blocks(d))]
        tail = self.view.renderer.query(query)
        self.require_room(sum(len(b.ids) for b in blocks) + len(tail))
        placed = walk(self.view, blocks) if reuse == "prefix" else self._blocks(blocks)
        return self._finish(placed, tail, reuse, quality, started)

    def prefix(self, block: Block, quality: Quality) -> Prompt:
        """The head and one stored passage, without a query."""
        started = time.perf_counter()
        self._require_unchanged()
        placed = walk(self.view, [self.view.head(), block])
        if placed[-1].stored is None:
            raise NotFoundError(
                f"{block.label!r} is not stored after the head, only alone" if self._alone(block) else f"{block.label!r}: {placed[-1].receipt.why}",
                remedy="use compose(reuse='blocks'), or build with --regime both",
            )
        return self._finish(placed, [], "prefix", quality, started)

    def _alone(self, block: Block) -> bool:
        return self.view.find(segment_key(self.view.model, self.view.layout, self.view.anchor_context, block.ids)) is not None

    def _require_unchanged(self) -> None:
        """The model's identity was checked when the store was opened: it must still be that model."""
        if self.source.state() != self._state:
            raise IncompatibleError("the model was changed since the store was opened", remedy="open the store again with it", code="changed")

    def require_room(self, tokens: int) -> None:
        if tokens >= self.source.context_tokens:
            raise InputError(
                f"the prompt takes {tokens} tokens, the model was made for {self.source.context_tokens}",
                remedy="give fewer documents, or passages of them",
            )

    def _blocks(self, blocks: Sequence[Block]) -> list[Placed]:
        """The chain as far as it is exact, then isolated artifacts moved to their places; what is not stored is prefilled alone, here."""
        placed = walk(self.view, blocks)
        return [p if p.stored is not None else self._moved(p) for p in placed]

    def _moved(self, p: Placed) -> Placed:
        key = segment_key(self.view.model, self.view.layout, self.view.anchor_context, p.block.ids)
        stored = self.view.find(key)
        if stored is not None:
            return Placed(p.block, p.at, stored, None, document_receipt(p.block, "moved", f"stored alone, moved to position {p.at}", stored))
        chain = (tuple(self.view.renderer.anchor_ids),) if p.at else ()
        live = self._running().run(p.block.ids, chain)
        why = p.block.miss or "not stored in the isolated regime"
        return Placed(p.block, p.at, None, live, document_receipt(p.block, "prefilled", f"{why}; computed alone", None, approximate=bool(p.at)))

    def _running(self) -> Prefiller:
        if self._prefiller is None:
            self._prefiller = Prefiller(self.source.model, self.view.layout)
        return self._prefiller

    def _finish(self, placed: Sequence[Placed], tail: Sequence[int], reuse: str, quality: Quality, started: float) -> Prompt:
        """Decode what is stored into one cache, put live blocks beside it, and write the receipt."""
        cached = [p for p in placed if p.stored is not None or p.live is not None]
        ids = [i for p in placed for i in p.block.ids] + list(tail)
        device = self.source.model.device
        layers = allocate(self.view.layout, sum(len(p.block.ids) for p in cached), device)
        tiers = quality.choose(_stored(placed), self.view.store.quality, _stored(placed[1:]))
        masked = self._masked([p for p in cached if p.stored is not None and p.stored.drops(tiers[p.stored.pack.manifest.encoding_id])])
        for p in cached:
            self._fill(p, tiers, layers, masked)
        receipts = tuple(_priced(p, tiers, self.view.store) for p in placed)
        receipt = Receipt(
            self.view.snapshot,
            self.view.model.key,
            self.view.renderer.record.id,
            self.view.encoding_id,
            reuse,
            receipts,
            len(ids),
            sum(len(p.block.ids) for p in cached),
            sum(r.nbytes for r in receipts),
            (time.perf_counter() - started) * 1e3,
        )
        return Prompt(torch.tensor([ids], device=device), receipt, tuple(layers), self.source.model.config, masked)

    def _masked(self, dropping: Sequence[Placed]) -> bool:
        """Whether tokens may be missing; then the model's attention must mask them."""
        if dropping:
            self.source.require_masking(dropping[-1].block.label)
        return bool(dropping)

    def _fill(self, p: Placed, tiers: dict[str, str], layers: Sequence[KV], masked: bool) -> None:
        if p.stored is not None:
            tier, stored = tiers[p.stored.pack.manifest.encoding_id], p.stored
            try:
                self.decoder.decode(Piece(stored, tier, len(p.block.ids), p.at, p.at), layers, masked=masked)
            except NotFoundError:  # gc moved it to another pack meanwhile
                self.decoder.decode(Piece(self.view.moved(stored), tier, len(p.block.ids), p.at, p.at), layers, masked=masked)
            return
        positions = torch.arange(p.at, p.at + len(p.block.ids))
        for index, ((keys, values), (into_k, into_v)) in enumerate(zip(p.live or (), layers, strict=True)):
            rope = self.view.layout.rope_of[index]
            slot = slice(p.at, p.at + len(p.block.ids))
            into_k[0, :, slot] = keys if rope is None else rotate(keys, positions, self.view.layout.ropes[rope])
            into_v[0, :, slot] = values


def _stored(placed: Sequence[Placed]) -> list[Stored]:
    return [p.stored for p in placed if p.stored is not None]


def _priced(p: Placed, tiers: dict[str, str], store: Store) -> DocumentReceipt:
    """The receipt with the tier that was chosen, what is known of its quality, and the bytes that it read."""
    if p.stored is None:
        return p.receipt
    name = tiers[p.stored.pack.manifest.encoding_id]
    (*_, tier) = tier_chain(p.stored.encoding, name)
    known, r = store.known(p.stored, tier), p.receipt
    fidelity = "lossless" if tier.exact else name
    return DocumentReceipt(r.source, r.tokens, r.action, r.why, r.context, fidelity, known.kl, p.stored.nbytes(name), known.source)
