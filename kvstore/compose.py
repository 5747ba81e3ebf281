"""Prompts from artifacts: which stored segments stand where, what is computed live, and the inputs for generation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import torch

from kvstore.artifact import Stored, tier_chain
from kvstore.chains import Order, Placed, document_receipt, ordered, walk
from kvstore.decode import KV, Decoder, Piece, allocate, stored_states
from kvstore.device.ready import Pending, Ready
from kvstore.errors import IncompatibleError, NotFoundError
from kvstore.families.latent import cached
from kvstore.families.recompute import Recomputer
from kvstore.families.states import States, require_no_state
from kvstore.hot import Recent
from kvstore.identity import segment_key
from kvstore.lookup import Block, View
from kvstore.models import ModelSource
from kvstore.prefill import Prefiller
from kvstore.prompt import Dialogue, Prompt
from kvstore.quality import Quality
from kvstore.receipt import DocumentReceipt, Receipt
from kvstore.reuse import mode_of
from kvstore.reuse.base import Budget, Mode
from kvstore.reuse.scene import LiveScene, recompute_chosen
from kvstore.store import Store


class Composer:
    """Puts prompts together from one view of a store."""

    def __init__(self, view: View, source: ModelSource, decoder: Decoder, hot: Recent[Sequence[KV]]):
        self.view, self.source, self.decoder, self.hot = view, source, decoder, hot
        self.dialogue = Dialogue(view.turns, source.context_tokens, view.layout.rope_regime)
        self._state = source.state()
        self._prefiller: Prefiller | None = None
        self._recomputer: Recomputer | None = None

    def compose(
        self,
        documents: Sequence[Any],
        query: str | Sequence[Mapping[str, Any]],
        reuse: str,
        quality: Quality,
        recompute: Budget = None,
        order: Order = "given",
    ) -> Prompt:
        """Head, documents, query. Raises InputError, NotFoundError, IncompatibleError, IntegrityError, ResourceError."""
        mode = mode_of(reuse, recompute)
        started = time.perf_counter()
        self._require_unchanged()
        found = [self.view.blocks(d) for d in documents]
        places = ordered(self.view, found, order)
        blocks = [self.view.head(), *(b for i in places for b in found[i])]
        tail = self.view.tail(query)
        self.dialogue.require_room(sum(len(b.ids) for b in blocks) + len(tail))
        prompt = self._finish(self._placed(blocks, mode), tail, mode, quality, started)
        given = tuple(b.label for blocks in found for b in blocks) if places != sorted(places) else None
        return replace(prompt, receipt=msgspec.structs.replace(prompt.receipt, order=order, given=given))

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
        return self._finish(placed, [], mode_of("prefix"), quality, started)

    def _alone(self, block: Block) -> bool:
        return self.view.find(segment_key(self.view.model, self.view.layout, self.view.anchor_context, block.ids)) is not None

    def _require_unchanged(self) -> None:
        """The model's identity was checked when the store was opened: it must still be that model."""
        if self.source.state() != self._state:
            raise IncompatibleError("the model was changed since the store was opened", remedy="open the store again with it", code="changed")

    def _placed(self, blocks: Sequence[Block], mode: Mode) -> list[Placed]:
        """The chain as far as it is exact; then, in modes that move, isolated artifacts at their places."""
        if not mode.moves:
            return walk(self.view, blocks, cut=True)
        require_no_state(self.view.layout, f"reuse={mode.name!r}", "use reuse='prefix'")
        return [p if p.stored is not None else self._moved(p, mode) for p in walk(self.view, blocks)]

    def _moved(self, p: Placed, mode: Mode) -> Placed:
        """What is not stored is prefilled alone, here; modes that compute tokens anew compute it among the others, in place."""
        key = segment_key(self.view.model, self.view.layout, self.view.anchor_context, p.block.ids)
        stored = self.view.find(key)
        if stored is not None:
            return Placed(p.block, p.at, stored, None, document_receipt(p.block, "moved", f"stored alone, moved to position {p.at}", stored))
        why = p.block.miss or "not stored in the isolated regime"
        if mode.recomputes:
            return Placed(p.block, p.at, None, None, document_receipt(p.block, "prefilled", why, None))
        chain = (tuple(self.view.renderer.anchor_ids),) if p.at else ()
        live = self._running().run(p.block.ids, chain)
        return Placed(p.block, p.at, None, live, document_receipt(p.block, "prefilled", f"{why}; computed alone", None, approximate=bool(p.at)))

    def _running(self) -> Prefiller:
        if self._prefiller is None:
            self._prefiller = Prefiller(self.source.model, self.view.layout)
        return self._prefiller

    def _finish(self, placed: Sequence[Placed], tail: Sequence[int], mode: Mode, quality: Quality, started: float) -> Prompt:
        """Decode what is stored into one cache, put live blocks beside it, compute anew what the mode chooses, and write the receipt."""
        held, ids = _held(placed), [i for p in placed for i in p.block.ids] + list(tail)
        device, tokens = self.source.model.device, sum(p.held for p in held)
        tiers = quality.choose(_stored(placed), self.view.store.quality, _stored(placed[1:]))
        masked = self._masked([p for p in held if p.stored is not None and p.stored.drops(tiers[p.stored.pack.manifest.encoding_id])])
        layers = self._filled(held, tokens, tiers, masked, shared=not mode.recomputes)
        counts = self._recompute(mode, held, ids, len(tail), layers, masked)
        last = held[-1].at if held else 0
        receipts = tuple(_priced(p, tiers, self.view.store, ends=p.at == last) for p in _said(placed, counts))
        receipt = Receipt(
            self.view.snapshot,
            self.view.model.key,
            self.view.renderer.record.id,
            self.view.encoding_id,
            mode.name,
            receipts,
            len(ids),
            tokens,
            sum(r.nbytes for r in receipts),
            (time.perf_counter() - started) * 1e3,
            mode.recompute,
            layers.peak_nbytes if isinstance(layers, Pending) else 0,
        )
        states = self._states(held)
        return Prompt(torch.tensor([ids], device=device), receipt, layers, self.source.model.config, masked, self.dialogue, states)

    def _filled(self, held: Sequence[Placed], tokens: int, tiers: dict[str, str], masked: bool, shared: bool) -> Sequence[KV]:
        """Keys and values of all pieces at their places: those that an earlier prompt left in the device cache, where nobody will write to them."""
        shared = shared and bool(self.hot.budget) and all(p.stored is not None for p in held)
        key = tuple((p.stored.id, tiers[p.stored.pack.manifest.encoding_id], p.at, p.held) for p in held if p.stored is not None)
        if shared and (kept := self.hot.get(key)) is not None and not getattr(kept, "damaged", False):
            return kept
        layers: Sequence[KV] = tuple(allocate(self.view.layout, tokens, self.source.model.device))
        readies = self._decode([p for p in held if p.stored is not None], tiers, layers, masked)
        for p in held:
            self._put_live(p, layers)
        if readies:
            layers = Pending(layers, readies)
        if shared:
            self.hot.put(key, layers)
        return layers

    def _recompute(self, mode: Mode, held: Sequence[Placed], ids: Sequence[int], asked: int, layers: Sequence[KV], masked: bool) -> list[int]:
        """How many tokens of each piece were computed anew, after doing so."""
        spans = [range(p.at, p.at + len(p.block.ids)) for p in held]
        moved = tuple(span for p, span in zip(held, spans, strict=True) if p.receipt.action == "moved")
        absent = [i for p, span in zip(held, spans, strict=True) if p.stored is None and p.live is None for i in span]
        if not mode.recomputes or not (moved or absent):
            return [0] * len(held)
        if self._recomputer is None or not self._recomputer.current:
            self._recomputer = Recomputer(self.source.model)
        known, at = torch.tensor(ids[: spans[-1].stop]), len(ids) - asked
        scene = LiveScene(self._recomputer, known, tuple(layers), moved, torch.tensor(absent, dtype=torch.long), tuple(ids[at:]), at, masked)
        rows = recompute_chosen(mode, scene)
        return [int(((rows >= span.start) & (rows < span.stop)).sum()) for span in spans]

    def _states(self, held: Sequence[Placed]) -> States:
        """What recurrent layers hold at the end of the cached tokens: it is stored with the last segment of a chain, and with nothing else."""
        if not self.view.layout.state or not held:
            return ()
        after = [p for p in held if p.receipt.context == "same prefix"]
        whole = [p.stored for p in after if p.stored is not None and p.held == p.stored.segment.tokens]
        if len(whole) < len(held):
            require_no_state(self.view.layout, "tokens that are no chain of whole stored segments", "use reuse='prefix'")
        try:
            return stored_states(whole[-1], self.source.model.device)
        except NotFoundError:  # gc moved it to another pack meanwhile
            return stored_states(self.view.moved(whole[-1]), self.source.model.device)

    def _masked(self, dropping: Sequence[Placed]) -> bool:
        """Whether tokens may be missing; then the model's attention must mask them."""
        if dropping:
            self.source.require_masking(dropping[-1].block.label)
        return bool(dropping)

    def _decode(self, held: Sequence[Placed], tiers: dict[str, str], layers: Sequence[KV], masked: bool) -> list[Ready]:
        """What is stored, at its places. What is returned is still on its way to a GPU."""

        def piece(p: Placed, stored: Stored) -> Piece:
            return Piece(stored, tiers[stored.pack.manifest.encoding_id], p.held, p.at, p.at)

        try:
            return self.decoder.start([piece(p, p.stored) for p in held if p.stored is not None], layers, masked=masked)
        except NotFoundError:  # gc moved some to another pack meanwhile
            return self.decoder.start([piece(p, self.view.moved(p.stored)) for p in held if p.stored is not None], layers, masked=masked)

    def _put_live(self, p: Placed, layers: Sequence[KV]) -> None:
        if p.live is None:  # stored, or computed in place when all others are there
            return
        slot = slice(p.at, p.at + len(p.block.ids))
        for pair, slots in zip(cached(self.view.layout, p.live, p.at), layers, strict=True):
            for computed, into in zip(pair, slots, strict=True):
                into[..., slot, :] = computed


def _held(placed: Sequence[Placed]) -> Sequence[Placed]:
    """The pieces that go into the cache: all up to the last that has keys and values. Those after it are left to the first forward pass."""
    return placed[: 1 + max((i for i, p in enumerate(placed) if p.stored is not None or p.live is not None), default=-1)]


def _said(placed: Sequence[Placed], counts: Sequence[int]) -> list[Placed]:
    """The pieces with what was computed anew in their receipts. What comes after approximate tokens, and saw them, is approximate."""
    found, exact = [], True
    for p, count in zip(placed, [*counts, *[0] * (len(placed) - len(counts))], strict=True):
        r = p.receipt
        if count and r.action == "moved":
            r = msgspec.structs.replace(r, action="recomputed", why=f"{r.why}, {count} tokens computed anew in place", recomputed=count)
        elif r.action == "prefilled" and p.live is None:
            where = "; computed in place" if count else ""
            r = msgspec.structs.replace(r, why=r.why + where, context=r.context if exact else "approximate")
        exact = exact and r.context == "same prefix"
        found.append(replace(p, receipt=r))
    return found


def _stored(placed: Sequence[Placed]) -> list[Stored]:
    return [p.stored for p in placed if p.stored is not None]


def _priced(p: Placed, tiers: dict[str, str], store: Store, ends: bool) -> DocumentReceipt:
    """The receipt with the tier that was chosen, what is known of its quality, and the bytes that it read: a state where the chain `ends`."""
    if p.stored is None:
        return p.receipt
    name = tiers[p.stored.pack.manifest.encoding_id]
    (*_, tier) = tier_chain(p.stored.encoding, name)
    known, r = store.known(p.stored, tier), p.receipt
    fidelity, nbytes = "lossless" if tier.exact else name, p.stored.nbytes(name) - (0 if ends else p.stored.state_nbytes)
    return msgspec.structs.replace(r, fidelity=fidelity, kl=known.kl, nbytes=nbytes, kl_from=known.source)
