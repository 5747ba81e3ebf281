"""A prompt whose beginning is in a cache: the inputs for generation, and batches of prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvstore.decode import KV
from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import dynamic_cache, share, static_cache
from kvstore.families.masking import require_masking
from kvstore.receipt import Receipt

if TYPE_CHECKING:
    from transformers import Cache


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
