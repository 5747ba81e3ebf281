"""Running the model: a segment after its context, batch 1, as a live prefix of batch 1 would be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvstore.errors import InputError
from kvstore.families.assemble import share
from kvstore.families.capture import prefill
from kvstore.manifest import Layout

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Chain = tuple[tuple[int, ...], ...]
KV = tuple[torch.Tensor, torch.Tensor]


class Prefiller:
    """Prefills segments after chains of other segments; the caches of chains are kept, and never come from a lossy decode."""

    def __init__(self, model: PreTrainedModel, layout: Layout):
        self.model, self.layout = model, layout
        self._caches: dict[Chain, Cache | None] = {(): None}

    def context(self, chain: Chain) -> Cache | None:
        """The live cache after `chain`, prefilled segment by segment; None before the first."""
        if chain not in self._caches:
            before = self.context(chain[:-1])
            self._caches[chain] = prefill(self.model, self.layout, chain[-1], _fresh(before))[1]
        return self._caches[chain]

    def run(self, ids: Sequence[int], chain: Chain) -> list[KV]:
        """Per layer K (before RoPE) and V [kv_heads, tokens, head_dim] of `ids` after `chain`. Raises InputError for ids the model lacks."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise InputError(f"token id {max(ids)} is beyond the model's {vocabulary}", remedy="pass the model's own tokenizer")
        return prefill(self.model, self.layout, ids, _fresh(self.context(chain)))[0]


def _fresh(cache: Cache | None) -> Cache | None:
    return None if cache is None else share(cache)
