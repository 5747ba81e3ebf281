"""Dropped tokens at load: keys that are NaN mark them, and registered attention functions give them no weight.

The mark lies in the cache's own tensors, so it follows them through cropping, concatenation, batches, beams and static caches. Attention that does
not know it gives NaN instead of silently attending to what was never stored. `enable` puts the function in place of the model's eager or sdpa one,
which it calls itself: without marks nothing changes, bit for bit; with them the weight of a dropped key is exactly 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from kvstore.errors import IncompatibleError
from kvstore.families.attention import configs, layer_of, require_layers, require_plain, switched

MASKED = {"eager": "kvstore_masked_eager", "sdpa": "kvstore_masked_sdpa"}
ROWS = 1 << 26  # entries of a mask per query head that are made at once
_called: ContextVar[set[int] | None] = ContextVar("kvstore_called", default=None)
REMEDY = "call kvstore.mask_dropped(model) once: its attention then leaves dropped tokens out and is unchanged otherwise"


def mask_dropped(model: nn.Module) -> None:
    """Let `model` take caches with dropped tokens, from now on. A second call does nothing.

    Raises IncompatibleError, and leaves the model as it is, where its attention is neither eager nor sdpa or some layer does not call registered
    functions. The model's `set_attn_implementation` undoes it.
    """
    if masks(model):
        return
    own = _implementation(model)
    _register()
    _prove(model, MASKED[own])
    for config in configs(model):
        config._attn_implementation_internal = MASKED[own]


@contextmanager
def masking(model: nn.Module) -> Iterator[None]:
    """`mask_dropped` for a while: the model's own attention is back afterwards."""
    if masks(model):
        yield
        return
    name = MASKED[_implementation(model)]
    _register()
    _prove(model, name)
    with switched(model, name):
        yield


def masks(model: nn.Module) -> bool:
    """Whether caches with dropped tokens may be given to the model."""
    return all(config._attn_implementation_internal in MASKED.values() for config in configs(model))


def require_masking(config: Any, what: str) -> None:
    """Raises IncompatibleError unless a model of this config object masks dropped tokens now."""
    if config._attn_implementation_internal not in MASKED.values():
        raise IncompatibleError(f"{what} has dropped tokens, which the model's attention does not mask", remedy=REMEDY, code="unmasked")


def _implementation(model: nn.Module) -> str:
    names = {config._attn_implementation_internal or "eager" for config in configs(model)}
    if len(names) > 1 or not names <= MASKED.keys():
        raise IncompatibleError(
            f"attention {' and '.join(sorted(names))} of {type(model).__name__} cannot mask dropped tokens; eager and sdpa can",
            remedy="call model.set_attn_implementation('sdpa') first, or load a tier without dropped tokens",
            code="unmasked",
        )
    return names.pop()


def _register() -> None:
    """The same function under two names: the name decides what it calls, and which mask it is given."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(MASKED["sdpa"], _masking(lambda module: sdpa_attention_forward, boolean=True))
    AttentionInterface.register(MASKED["eager"], _masking(_own_eager, boolean=False))
    AttentionMaskInterface.register(MASKED["sdpa"], sdpa_mask)
    AttentionMaskInterface.register(MASKED["eager"], eager_mask)


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    """The eager function beside the attention class, which the model would call itself."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise IncompatibleError(f"{type(module).__name__} has no eager_attention_forward beside it", remedy="use sdpa")


def _prove(model: nn.Module, name: str) -> None:
    """Two tokens through the decoder: every layer must have called the function, or its dropped tokens would go unmasked."""
    from kvstore.families.capture import forward

    called: set[int] = set()
    token = _called.set(called)
    try:
        with switched(model, name):
            forward(model, torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None], DynamicCache(config=model.config))
    finally:
        _called.reset(token)
    require_layers(model, called, "mask dropped tokens", "build with a policy that drops nothing")


def _masking(chosen: Callable[[nn.Module], Callable[..., Any]], *, boolean: bool) -> Callable[..., Any]:
    """An attention function that masks marked keys, then calls the model's own. `boolean`: the kind of mask that one takes."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any) -> tuple[Tensor, Any]:
        if (called := _called.get()) is not None:
            called.add(layer_of(module))
            require_plain(module, rest)
        own, dropped = chosen(module), key[..., 0].isnan()
        if not dropped.any():
            return own(module, query, key, value, attention_mask, **rest)
        require_plain(module, rest)
        gone = dropped[..., None]
        inputs = (query, key.masked_fill(gone, 0), value.masked_fill(gone, 0))
        given = _causal(query.shape[2], key, boolean) if attention_mask is None else attention_mask
        return _in_rows(lambda q, k, v, rows: own(module, q, k, v, rows, **rest), inputs, given, dropped)

    return attend


def _causal(queries: int, key: Tensor, boolean: bool) -> Tensor:
    """[1, 1, queries, keys] where the caller left it out: the queries are the last of the keys."""
    places = torch.arange(key.shape[2], device=key.device)
    seen = places[None] <= places[-queries:, None]
    return seen[None, None] if boolean else torch.zeros_like(seen, dtype=key.dtype).masked_fill(~seen, torch.finfo(key.dtype).min)[None, None]


def _in_rows(own: Callable[..., Any], inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor, dropped: Tensor) -> tuple[Tensor, Any]:
    """A few queries at a time: a mask for each head would otherwise be as large as all of their attention."""
    query, key, value = inputs
    step = max(1, ROWS // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = [own(q, key, value, _without(m, dropped, query.shape[1])) for q, m in zip(query.split(step, 2), mask.split(step, 2), strict=True)]
    return (torch.cat([out for out, _ in parts], 1), None) if len(parts) > 1 else parts[0]


def _without(mask: Tensor, dropped: Tensor, heads: int) -> Tensor:
    """[batch, heads, queries, keys]: `mask` (boolean, or added to the scores) without the keys that are dropped [batch, kv_heads, keys]."""
    gone, keys = dropped.repeat_interleave(heads // dropped.shape[1], 1)[:, :, None], dropped.shape[-1]
    given = mask[..., :keys]
    return given & ~gone if given.dtype == torch.bool else torch.where(gone, torch.finfo(given.dtype).min, given)
