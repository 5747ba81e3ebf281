"""A prompt whose beginning is in a cache: the inputs for generation, the next turn of a dialogue, and batches of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from transformers.cache_utils import DynamicLayer

from kvstore.decode import KV
from kvstore.device.layer import waiting_cache
from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import dynamic_cache, static_cache
from kvstore.families.masking import require_masking
from kvstore.families.slots import slides
from kvstore.families.states import States, joined
from kvstore.receipt import Receipt
from kvstore.turns import Turns

if TYPE_CHECKING:
    from transformers import Cache


REMEDY = "pass what model.generate(**prompt.inputs) returned: its ids, or with return_dict_in_generate=True all of it"


@dataclass(frozen=True)
class Dialogue:
    """How a prompt goes on: its template's turns, and the tokens that the model was made for, or that the RoPE regime `short` reaches."""

    turns: Turns
    context_tokens: int
    rope_regime: str = "static"

    def require_room(self, tokens: int) -> None:
        """Raises InputError for a prompt that leaves no room for an answer."""
        if tokens >= self.context_tokens:
            raise InputError(
                f"the prompt takes {tokens} tokens, {self._end()} {self.context_tokens}",
                remedy="give fewer documents, or passages of them; begin a new dialogue",
            )

    def _end(self) -> str:
        if self.rope_regime == "static":
            return "the model was made for"
        return f"and what is stored in the RoPE regime {self.rope_regime!r} holds below the model's change of frequencies at"


@dataclass(frozen=True)
class Prompt:
    """A prompt whose beginning is in a cache. `inputs` is fresh at each access: generating twice gives the same.

    `states`: what recurrent layers hold at the end of the cached tokens. `masked`: tokens may be missing from the cache (their keys are NaN);
    only attention that masks them may have it.
    """

    input_ids: torch.Tensor
    receipt: Receipt
    layers: Sequence[KV]
    config: Any
    masked: bool = False
    dialogue: Dialogue | None = None
    states: States = ()

    @property
    def cache(self) -> Cache:
        """A DynamicCache of the cached tokens, over shared tensors that generation never changes, and a copy of the states, which it does.

        Raises IncompatibleError where tokens were dropped and the model does not mask them (any more).
        """
        self._require_masking()
        return waiting_cache(self.config, self.layers, self.states)

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
        cache = static_cache(self.config, self.layers, self.input_ids.shape[1] + max_new_tokens, self.states)
        return {**self.inputs, "past_key_values": cache}

    def follow(self, output: Any, query: str) -> Prompt:
        """This prompt, the answer in `output`, and `query` after it, as the template writes a second turn.

        `output`: int64 ids [tokens] or [1, tokens] of prompt and answer, or what `generate(..., return_dict_in_generate=True)` returned: then the
        cache that grew with the answer is taken over without a copy, else the last question and its answer are computed again by the next forward
        pass. What the receipt says of the documents stays. Raises InputError for the output of another prompt, of several sequences, too long.
        """
        if self.dialogue is None:
            raise InputError("this prompt was not composed from a store", remedy="compose() makes prompts that can be followed")
        ids, asked = _ids_of(output, self), self.input_ids.shape[1]
        answer, tail = self.dialogue.turns.next(ids[asked:].tolist(), query)
        kept = ids[: asked + len(answer)]
        whole = torch.cat([kept, torch.tensor(tail, device=kept.device)])[None]
        self.dialogue.require_room(whole.shape[1])
        layers = _grown(getattr(output, "past_key_values", None), len(kept), len(ids), self)
        receipt = msgspec.structs.replace(self.receipt, prompt_tokens=whole.shape[1], cached_tokens=layers[0][0].shape[-2])
        return replace(self, input_ids=whole, receipt=receipt, layers=layers)


def _ids_of(output: Any, prompt: Prompt) -> torch.Tensor:
    """int64 [tokens] of prompt and answer."""
    ids = getattr(output, "sequences", output)
    if not isinstance(ids, torch.Tensor) or ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != 1):
        raise InputError("the output is not the ids of one sequence", remedy=REMEDY)
    ids, asked = ids.reshape(-1).to(prompt.input_ids.device), prompt.input_ids[0]
    if not torch.equal(ids[: len(asked)], asked):
        raise InputError("the output does not begin with the prompt", remedy=REMEDY)
    return ids


def _grown(cache: Any, tokens: int, generated: int, prompt: Prompt) -> Sequence[KV]:
    """Keys and values of at most `tokens` tokens from the cache that generation left; the prompt's own where that one is none to take.

    Rows that are not the output's tokens one by one show in their number: drafts of assisted decoding that were left in are more than it has.
    """
    least = prompt.receipt.cached_tokens
    found = getattr(cache, "layers", [])
    whole = all(type(layer) is DynamicLayer and layer.keys.shape[0] == 1 for layer in found)  # others keep a window, or a state
    if not whole or len(found) != len(prompt.layers) or any(not least <= layer.keys.shape[-2] <= generated for layer in found):
        return prompt.layers
    held = min(tokens, *(layer.keys.shape[-2] for layer in found))
    return tuple((layer.keys[..., :held, :], layer.values[..., :held, :]) for layer in found)


def _assisted(*given: Any, **more: Any) -> None:
    raise InputError(
        "assisted decoding reads the cached tokens a second time", remedy="leave out assistant_model and prompt_lookup_num_tokens", code="assisted"
    )


def _inputs(ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> dict[str, Any]:
    """`use_cache` is said aloud: where a model's generation config says otherwise, generate would read the cached ids twice.

    Assisted decoding and prompt look-up do so in any case (transformers 5.23), with wrong answers: they are refused when they first touch the cache.
    """
    vars(cache)["activate_past_recording"] = _assisted
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}


def collate(prompts: Iterable[Prompt], pad_token_id: int | None = 0) -> dict[str, Any]:
    """One batch of prompts over different documents, for `model.generate(**collate(prompts))`.

    Columns are [padding, cached, padding, rest] per row, so caches and rests of different lengths end together; padding is masked and takes
    no position. Where layers slide, padding between would use up their window: there the last cached tokens of rows with a short rest are
    computed again in its place. Raises InputError for an empty list, IncompatibleError for two models.
    """
    given = list(prompts)
    if not given:
        raise InputError("nothing to collate", remedy="give at least one prompt")
    if len({p.receipt.model for p in given}) > 1:
        raise IncompatibleError("the prompts belong to different models", remedy="collate those of one model")
    kept = _kept(given)
    cached = max(kept)
    rest = max(p.input_ids.shape[1] - n for p, n in zip(given, kept, strict=True))
    _require_one_length(given, kept)
    rows = [_padded_row(p.input_ids[0], n, cached, rest, pad_token_id or 0) for p, n in zip(given, kept, strict=True)]
    for p in given:
        p._require_masking()
    pairs = list(zip(given, kept, strict=True))
    keys, values = ([torch.cat([_left(p.layers[i][j][..., :n, :], cached) for p, n in pairs]) for i in range(len(given[0].layers))] for j in (0, 1))
    cache = dynamic_cache(given[0].config, list(zip(keys, values, strict=True)), joined([p.states for p in given]))
    return _inputs(torch.stack([ids for ids, _ in rows]), torch.stack([mask for _, mask in rows]), cache)


def _kept(prompts: list[Prompt]) -> list[int]:
    """Cached tokens that each row of a batch takes over."""
    cached = [p.receipt.cached_tokens for p in prompts]
    if not slides(prompts[0].config):
        return cached
    rest = max(p.input_ids.shape[1] - n for p, n in zip(prompts, cached, strict=True))
    return [max(0, p.input_ids.shape[1] - rest) for p in prompts]


def _require_one_length(prompts: list[Prompt], kept: list[int]) -> None:
    """Raises IncompatibleError where a recurrent state would have to take in padding, which transformers does not keep out of it."""
    lengths = {(n, p.input_ids.shape[1] - n) for p, n in zip(prompts, kept, strict=True)}
    if any(p.states for p in prompts) and len(lengths) > 1:
        raise IncompatibleError(
            "prompts of different lengths need padding, which a model with a recurrent state cannot have",
            remedy="generate from each prompt alone, or collate those of equal cached and remaining lengths",
            code="recurrent",
        )


def _padded_row(ids: torch.Tensor, n: int, cached: int, rest: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    row, mask = ids.new_full((cached + rest,), pad), ids.new_zeros(cached + rest)
    for part, end in ((ids[:n], cached), (ids[n:], cached + rest)):
        row[end - len(part) : end], mask[end - len(part) : end] = part, 1
    return row, mask


def _left(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros before the tokens, up to `length` of them; zeros, not garbage: masked scores must stay finite."""
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))
