"""Running the model: a segment after its context, batch 1, as a live prefix of batch 1 would be; or several at once, equal up to rounding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstore.errors import InputError
from kvstore.families.assemble import share
from kvstore.families.batch import batchable, prefill_rows
from kvstore.families.capture import prefill
from kvstore.families.states import States, take_states
from kvstore.manifest import Layout

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Chain = tuple[tuple[int, ...], ...]
KV = tuple[torch.Tensor, torch.Tensor]
KEPT = 1 << 30  # bytes of caches of chains
_SHORT = 16  # a chain of up to this share of a batch's longest row costs less to compute again than an explicit mask does


@dataclass(frozen=True)
class Captured:
    """What is stored of one segment: per layer K (before RoPE) and V, and the recurrent states at its end, of models that have them."""

    layers: list[KV]
    states: States = ()


class Prefiller:
    """Prefills segments after chains of other segments. Caches of chains never come from a lossy decode.

    They are kept, `kept` bytes of them, least recently used out first; the last two stay whatever they take.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, kept: int = KEPT):
        self.model, self.layout, self.kept = model, layout, kept
        self._caches: OrderedDict[Chain, Cache] = OrderedDict()

    def context(self, chain: Chain) -> Cache | None:
        """The live cache after `chain`, prefilled segment by segment from its longest beginning that is kept; None before the first."""
        known = next((n for n in range(len(chain), 0, -1) if chain[:n] in self._caches), 0)
        cache = self._caches.get(chain[:known])
        for n in range(known, len(chain)):
            cache = prefill(self.model, self.layout, chain[n], _fresh(cache))[1]
            self._keep(chain[: n + 1], cache)
        if chain:
            self._caches.move_to_end(chain)
        return cache

    def _keep(self, chain: Chain, cache: Cache) -> None:
        self._caches[chain] = cache
        while len(self._caches) > 2 and sum(map(self._nbytes, self._caches)) > self.kept:
            self._caches.popitem(last=False)

    def _nbytes(self, chain: Chain) -> int:
        values = self.layout.values_per_token * sum(map(len, chain))
        return values * (4 if self.layout.dtype == "float32" else 2) + self.layout.state_nbytes

    def run(self, ids: Sequence[int], chain: Chain) -> list[KV]:
        """Per layer K (before RoPE) and V [kv_heads, tokens, head_dim] of `ids` after `chain`. Raises InputError for ids the model lacks."""
        return self.capture(ids, chain).layers

    def capture(self, ids: Sequence[int], chain: Chain, *, keep: bool = False) -> Captured:
        """`run`, with the recurrent states at the end of `ids`. `keep`: segments after these will follow."""
        self._require_known(ids)
        layers, cache = prefill(self.model, self.layout, ids, _fresh(self.context(chain)))
        if keep:
            self._keep((*chain, tuple(ids)), cache)
        return Captured(layers, take_states(cache) if self.layout.state else ())

    def run_rows(self, rows: Sequence[Sequence[int]], chain: Chain) -> list[list[KV]]:
        """`run` of several segments after one chain in one pass, equal to it up to rounding; one by one where the layout forbids (`batchable`).

        A chain that is short beside the rows is computed with them: after a cache, attention takes an explicit mask and its slower kernels.
        """
        if not batchable(self.layout):
            return [self.run(ids, chain) for ids in rows]
        for ids in rows:
            self._require_known(ids)
        before = [i for ids in chain for i in ids]
        if len(before) * _SHORT <= max(map(len, rows)):
            return prefill_rows(self.model, self.layout, rows, before=before)
        return prefill_rows(self.model, self.layout, rows, past=self.context(chain))

    def _require_known(self, ids: Sequence[int]) -> None:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise InputError(f"token id {max(ids)} is beyond the model's {vocabulary}", remedy="pass the model's own tokenizer")


def _fresh(cache: Cache | None) -> Cache | None:
    return None if cache is None else share(cache)
