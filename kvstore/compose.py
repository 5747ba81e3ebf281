"""Prompts from artifacts: which stored segments stand where, what is computed live, and the inputs for generation."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvstore.artifact import Stored, tier_chain
from kvstore.decode import KV, Decoder, Piece, allocate
from kvstore.errors import IncompatibleError, InputError, NotFoundError
from kvstore.families.assemble import dynamic_cache, share, static_cache
from kvstore.families.masking import require_masking
from kvstore.families.rope import rotate
from kvstore.identity import Context, segment_key
from kvstore.lookup import Block, View
from kvstore.models import ModelSource
from kvstore.prefill import Prefiller
from kvstore.quality import Quality
from kvstore.receipt import DocumentReceipt, Receipt
from kvstore.store import Store

if TYPE_CHECKING:
    from transformers import Cache

Reuse = Literal["prefix", "blocks"]


@dataclass(frozen=True)
class Prompt:
    """A prompt whose beginning is in a cache. `inputs` is fresh at each access: generating twice gives the same.

    `masked`: tokens may be missing from the cache (their keys are NaN); only attention that masks them may have it.
    """

    input_ids: torch.Tensor
    receipt: Receipt
    layers: tuple[KV, ...]
    config: Any
    masked: bool = False

    @property
    def cache(self) -> Cache:
        """A DynamicCache of the cached tokens, over shared tensors that generation never changes.

        Raises IncompatibleError where tokens were dropped and the model does not mask them (any more).
        """
        self._require_masking()
        return share(dynamic_cache(self.config, self.layers))

    @property
    def inputs(self) -> dict[str, Any]:
        """For `model.generate(**prompt.inputs)`: all ids [1, tokens], a full mask, and a cache shorter than the prompt.

        One access, one generation: generating makes the cache longer. Beams and several sequences want
        `inputs["past_key_values"].batch_repeat_interleave(n)` first.
        """
        return _inputs(self.input_ids.clone(), torch.ones_like(self.input_ids), self.cache)

    def _require_masking(self) -> None:
        if self.masked:
            require_masking(self.config, "the cache")

    def static(self, max_new_tokens: int) -> dict[str, Any]:
        """The same with a preallocated StaticCache, which does not copy the prefix at each step."""
        self._require_masking()
        cache = static_cache(self.config, self.layers, self.input_ids.shape[1] + max_new_tokens)
        return {**self.inputs, "past_key_values": cache}


@dataclass(frozen=True)
class Placed:
    """A block at its place in the prompt: from the store (`stored`), or live KV computed in isolation, or neither (left to generation)."""

    block: Block
    at: int
    stored: Stored | None
    live: list[KV] | None
    receipt: DocumentReceipt


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
        placed = self._chain(blocks) if reuse == "prefix" else self._blocks(blocks)
        return self._finish(placed, tail, reuse, quality, started)

    def prefix(self, block: Block, quality: Quality) -> Prompt:
        """The head and one stored passage, without a query."""
        started = time.perf_counter()
        self._require_unchanged()
        placed = self._chain([self.view.head(), block])
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

    def _chain(self, blocks: Sequence[Block]) -> list[Placed]:
        """Longest stored chain from the start; what follows it is left to the first forward pass."""
        placed: list[Placed] = []
        context, at, whole = Context.root(), 0, True
        for block in blocks:
            key = segment_key(self.view.model, self.view.layout, context, block.ids)
            stored = self.view.find(key) if whole else None
            whole = whole and stored is not None
            why = "stored after these tokens" if stored else block.miss or ("not stored after these tokens" if at else "not stored")
            placed.append(Placed(block, at, stored, None, self._receipt(block, "reused" if stored else "prefilled", why, stored)))
            at += len(block.ids)
            context = self.view.follow(context, key, at, block)
        return placed

    def _blocks(self, blocks: Sequence[Block]) -> list[Placed]:
        """The chain as far as it is exact, then isolated artifacts moved to their places; what is not stored is prefilled alone, here."""
        placed = self._chain(blocks)
        return [p if p.stored is not None else self._moved(p) for p in placed]

    def _moved(self, p: Placed) -> Placed:
        key = segment_key(self.view.model, self.view.layout, self.view.anchor_context, p.block.ids)
        stored = self.view.find(key)
        if stored is not None:
            return Placed(p.block, p.at, stored, None, self._receipt(p.block, "moved", f"stored alone, moved to position {p.at}", stored))
        chain = (tuple(self.view.renderer.anchor_ids),) if p.at else ()
        live = self._running().run(p.block.ids, chain)
        why = p.block.miss or "not stored in the isolated regime"
        return Placed(p.block, p.at, None, live, self._receipt(p.block, "prefilled", f"{why}; computed alone", None, approximate=bool(p.at)))

    def _running(self) -> Prefiller:
        if self._prefiller is None:
            self._prefiller = Prefiller(self.source.model, self.view.layout)
        return self._prefiller

    def _receipt(
        self, block: Block, action: Literal["reused", "moved", "prefilled"], why: str, stored: Stored | None, approximate: bool = False
    ) -> DocumentReceipt:
        context: Literal["same prefix", "approximate"] = "approximate" if action == "moved" or approximate else "same prefix"
        fidelity = "live" if stored is None else "stored"
        return DocumentReceipt(block.label, len(block.ids), action, why, context, fidelity, None, 0)

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


def _inputs(ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> dict[str, Any]:
    """`use_cache` is said aloud: where a model's generation config says otherwise, generate would read the cached ids twice."""
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}


def collate(prompts: Iterable[Prompt], pad_token_id: int | None = 0) -> dict[str, Any]:
    """One batch of prompts over different documents, for `model.generate(**collate(prompts))`.

    Columns are [padding, cached, padding, rest] per row, so caches and rests of different lengths end together; padding is masked and takes
    no position. For full attention only, which is what kvstore loads. Raises InputError for an empty list, IncompatibleError for two models.
    """
    given = list(prompts)
    if not given:
        raise InputError("nothing to collate", remedy="give at least one prompt")
    if len({p.receipt.model for p in given}) > 1:
        raise IncompatibleError("the prompts belong to different models", remedy="collate those of one model")
    cached = max(p.receipt.cached_tokens for p in given)
    rest = max(p.input_ids.shape[1] - p.receipt.cached_tokens for p in given)
    rows = [_padded_row(p, cached, rest, pad_token_id or 0) for p in given]
    for p in given:
        p._require_masking()
    keys, values = ([torch.cat([_left(p.layers[i][j], cached) for p in given]) for i in range(len(given[0].layers))] for j in (0, 1))
    cache = dynamic_cache(given[0].config, list(zip(keys, values, strict=True)))
    return _inputs(torch.stack([ids for ids, _ in rows]), torch.stack([mask for _, mask in rows]), cache)


def _padded_row(prompt: Prompt, cached: int, rest: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, n = prompt.input_ids[0], prompt.receipt.cached_tokens
    row, mask = ids.new_full((cached + rest,), pad), ids.new_zeros(cached + rest)
    for part, end in ((ids[:n], cached), (ids[n:], cached + rest)):
        row[end - len(part) : end], mask[end - len(part) : end] = part, 1
    return row, mask


def _left(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros before the tokens, up to `length` of them; zeros, not garbage: masked scores must stay finite."""
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))
