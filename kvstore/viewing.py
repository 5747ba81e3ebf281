"""What token policies see of a segment: its tokens' kinds, and how the model attends to them, measured in the context it is compiled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.errors import IncompatibleError, InputError
from kvstore.families.assemble import share
from kvstore.families.attention import Take, observing
from kvstore.families.capture import forward, prefill
from kvstore.families.masking import masking
from kvstore.families.refuse import new_cache
from kvstore.families.slots import kv_slots
from kvstore.policies import Assignment, Policy
from kvstore.policies.base import Flags, Floats
from kvstore.prefill import Chain, Prefiller
from kvstore.tokens import TextEncoder

REPEAT = "\n\nRepeat the previous context exactly.\n\n"
REPEAT_ON = "\n\nRepeat the part of the previous context exactly, starting with"
REPEATED = 2048  # tokens repeated in one go, as published; each run starts anew after the segment
OVERLAP = 8  # tokens of the run before that say where the next one starts


class Kinds:
    """Which token ids are control tokens, and which are marks of punctuation. One object serves a build."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        self._mark: Callable[[int], bool] = cache(self._is_mark)

    def special(self, ids: npt.NDArray[np.int64]) -> Flags:
        return np.isin(ids, list(self.encoder.control_ids))

    def punctuation(self, ids: npt.NDArray[np.int64]) -> Flags:
        return np.array([self._mark(int(i)) for i in ids], np.bool_) & ~self.special(ids)

    def _is_mark(self, token: int) -> bool:
        text = str(self.encoder.tokenizer.decode([token])).strip()
        return bool(text) and not any(c.isalnum() for c in text)


class SegmentView:
    """`kvstore.policies.View` of the segment `ids` after `chain`. Each kind of measurement is one more pass over the segment, made once.

    Attention is measured with the model's eager arithmetic (families/attention.py) in chunks of queries; the model is left as it was.
    """

    def __init__(self, prefiller: Prefiller, kinds: Kinds, ids: Sequence[int], chain: Chain, context_tokens: int):
        self.prefiller, self.kinds, self.chain, self.context_tokens = prefiller, kinds, chain, context_tokens
        self.layers, self.kv_heads = prefiller.layout.layers, prefiller.layout.kv_heads
        self.ids = np.asarray(ids, np.int64)
        self._mass: Floats | None = None
        self._reconstruction: Floats | None = None

    @property
    def special(self) -> Flags:
        return self.kinds.special(self.ids)

    @property
    def punctuation(self) -> Flags:
        return self.kinds.punctuation(self.ids)

    @cached_property
    def start(self) -> int:
        """Tokens of the context: the segment's first position."""
        return sum(map(len, self.chain))

    def mass(self) -> Floats:
        """See `kvstore.policies.View`; a token's attention to itself does not count."""
        if self._mass is None:
            total = torch.zeros(self.layers, self.kv_heads, len(self.ids))

            def take(layer: int, weights: Tensor, row: int) -> None:
                own = weights[..., self.start :]
                summed = own.sum((1, 2))
                rows = torch.arange(weights.shape[2])
                columns = rows + row - self.start
                summed.index_add_(1, columns.to(summed.device), -own[:, :, rows, columns].sum(1))
                total[layer] += summed.cpu()

            self._observe(take)
            self._mass = total.clamp_(min=0).numpy()
        return self._mass

    def recovered(self, kept: Flags, windows: npt.NDArray[np.int64]) -> Floats:
        """See `kvstore.policies.View`."""
        group = self._query_groups
        total = torch.zeros(len(kept), self.layers, self.kv_heads, group)
        flags = torch.from_numpy(np.ascontiguousarray(kept))

        def take(layer: int, weights: Tensor, row: int) -> None:
            context, own = weights[..., : self.start].sum(-1), weights[..., self.start :]
            places = torch.arange(own.shape[-1], device=own.device)
            queries = torch.arange(weights.shape[2], device=own.device)[:, None] + row - self.start
            for choice, window in enumerate(windows.tolist()):
                near = places[None] > queries - max(window, 1)  # the query itself is live
                seen = flags[choice, layer].to(own.device)[:, None, None] | near
                total[choice, layer] += (context + (own * seen).sum(-1)).sum(-1).cpu()

        self._observe(take)
        return (total.amin(-1) / len(self.ids)).numpy()

    def reconstruction(self) -> Floats:
        """See `kvstore.policies.View`. Raises InputError where the context has no room for repeating even a part."""
        if self._reconstruction is None:
            best = torch.zeros(self.layers, self.kv_heads, len(self.ids))

            def take(layer: int, weights: Tensor, row: int) -> None:
                own = weights[..., self.start : self.start + len(self.ids)]
                best[layer] = torch.maximum(best[layer], own.amax((1, 2)).cpu())

            self._require_heads()
            model, layout = self.prefiller.model, self.prefiller.layout
            live = prefill(model, layout, self.ids.tolist(), self._context())[1]
            for run in self._repeats():
                with observing(model, self._of_stored(take)):
                    self._forward(run, share(live))
            self._reconstruction = best.numpy()
        return self._reconstruction

    @property
    def _query_groups(self) -> int:
        config = self.prefiller.model.config.get_text_config(decoder=True)
        return int(config.num_attention_heads) // self.kv_heads

    def _require_heads(self) -> None:
        """Attention that expands its heads from latents has none to judge: one row of latents is all that is stored of a token."""
        if self.prefiller.layout.latent is not None:
            raise IncompatibleError(
                "latent attention cannot be observed head by head",
                remedy="build with the policy uniform, or sink+recent: they do not look at attention",
            )

    def _context(self) -> Any:
        before = self.prefiller.context(self.chain)
        return None if before is None else share(before)

    def _observe(self, take: Take) -> None:
        """One observed pass over the segment after its context."""
        self._require_heads()
        cache = self._context()
        with observing(self.prefiller.model, self._of_stored(take)):
            self._forward(self.ids.tolist(), new_cache(self.prefiller.model) if cache is None else cache)

    def _of_stored(self, take: Take) -> Take:
        """`take` by stored layer, where `observing` counts all layers of the model; those that borrow another's keys are left out."""
        places = {slot: layer for layer, slot in enumerate(kv_slots(new_cache(self.prefiller.model)))}

        def stored(index: int, weights: Tensor, row: int) -> None:
            if index in places:
                take(places[index], weights, row)

        return stored

    def _forward(self, ids: Sequence[int], cache: Any) -> None:
        first = int(cache.get_seq_length())
        forward(self.prefiller.model, torch.tensor([list(ids)]), torch.arange(first, first + len(ids))[None], cache)

    def _repeats(self) -> list[list[int]]:
        """Token ids to run after the segment: a request, then the part that the model is made to repeat."""
        text, ids = self.kinds.encoder.text, self.ids.tolist()
        request, further = text(REPEAT), text(REPEAT_ON)
        left = self.context_tokens - self.start - len(ids) - max(len(request), len(further) + 2 * OVERLAP)
        if left < OVERLAP:
            raise InputError(
                f"{self.start + len(ids)} tokens leave no room in the model's {self.context_tokens} to repeat them, which the policy kvzip needs",
                remedy="build with --passage-tokens, or with another policy",
            )
        size = min(REPEATED, left, len(ids))
        return [(request if at == 0 else [*further, *ids[at - OVERLAP : at]]) + ids[at : at + size] for at in range(0, len(ids), size)]


Assign = Callable[[Sequence[int], Chain], Assignment | None]


def nobody(ids: Sequence[int], chain: Chain) -> None:
    """Without a policy all tokens are alike."""
    return


class Assigner:
    """What a policy says of segments. The head of prompts (which follows nothing) is left alone: all that comes after looks at it, and it is short.

    Raises IncompatibleError where the model's attention cannot be observed, or cannot mask what the policy drops.
    """

    def __init__(self, policy: Policy, prefiller: Prefiller, encoder: TextEncoder, context_tokens: int):
        self.policy, self.prefiller, self.kinds, self.context_tokens = policy, prefiller, Kinds(encoder), context_tokens
        if policy.drops:
            with masking(prefiller.model):
                pass  # proves that it can be done, before anything is stored that nobody could load

    def __call__(self, ids: Sequence[int], chain: Chain) -> Assignment | None:
        return self.policy.assign(SegmentView(self.prefiller, self.kinds, ids, chain, self.context_tokens)) if chain else None
