"""A model's attention through functions of ours: registered with transformers, chosen for a while, the model's own put back.

Attention layers look their function up by the name in their config at each call, so nothing of the model is replaced. A model whose layers do
not is refused: what never calls the function cannot be observed, and would ignore a mask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from kvstore.errors import IncompatibleError
from kvstore.families.refuse import new_cache
from kvstore.families.slots import kv_slots

OBSERVED = "kvstore_observed"
CHUNK = 1 << 24  # attention weights held at once: 64 MiB in float32, whatever the segment's length
Take = Callable[[int, Tensor, int], None]
_taking: ContextVar[Take | None] = ContextVar("kvstore_taking", default=None)
_switching = threading.RLock()  # a model's config is seen by all threads


def configs(model: nn.Module) -> list[Any]:
    """The distinct configs of the model and its parts: each names an attention function."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    for config in list(found.values()):
        text = config.get_text_config(decoder=True)
        found[id(text)] = text
    return list(found.values())


@contextmanager
def switched(model: nn.Module, name: str) -> Iterator[None]:
    """Within, the model's layers call the attention function registered as `name`; its own choice is back afterwards."""
    with _switching:
        saved = [(config, config._attn_implementation_internal) for config in configs(model)]
        try:
            for config, _ in saved:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, before in saved:
                config._attn_implementation_internal = before


@contextmanager
def observing(model: nn.Module, take: Take) -> Iterator[None]:
    """Within, passes of one sequence without padding call take(layer, weights, row) for chunks of queries, layer by layer.

    `weights` float32 [kv_heads, query heads of each, queries, keys] after the softmax; `row` is the place among the keys of the first query.
    Arithmetic is that of the models' eager attention. Raises IncompatibleError, naming the layers, where some of them do not call the function.
    """
    seen: set[int] = set()

    def noting(layer: int, weights: Tensor, row: int) -> None:
        seen.add(layer)
        take(layer, weights, row)

    AttentionInterface.register(OBSERVED, _observed)
    token = _taking.set(noting)
    try:
        with switched(model, OBSERVED):
            yield
    finally:
        _taking.reset(token)
    require_layers(model, seen, "be observed", "build with the policy uniform, or sink+recent with a step class: they do not look at attention")


def require_layers(model: nn.Module, seen: set[int], purpose: str, remedy: str) -> None:
    """Raises IncompatibleError unless every layer with a cache called the registered function."""
    missing = sorted(set(kv_slots(new_cache(model))) - seen)
    if missing:
        raise IncompatibleError(
            f"the attention of {type(model).__name__} cannot {purpose}: layers {missing[:8]} do not call registered attention functions",
            remedy=remedy,
        )


def layer_of(module: nn.Module) -> int:
    """Which layer an attention module is. Raises IncompatibleError where it does not say."""
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise IncompatibleError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    return layer


def require_plain(module: nn.Module, extras: dict[str, Any]) -> None:
    """Raises IncompatibleError for attention that is more than a softmax over keys."""
    for name in ("softcap", "s_aux", "position_bias", "sliding_window"):
        if extras.get(name) is not None:
            raise IncompatibleError(f"{type(module).__name__} uses {name}, which kvstore's attention functions do not know")


def _observed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **extras: Any
) -> tuple[Tensor, None]:
    """query [1, heads, queries, head_dim]; key, value [1, kv_heads, keys, head_dim]. Output [1, queries, heads, head_dim]."""
    take = _taking.get()
    require_plain(module, extras)
    if take is None or attention_mask is not None or query.shape[0] != 1:
        raise IncompatibleError(f"{type(module).__name__}: observed attention takes one sequence without padding, within `observing`")
    heads, (kv_heads, keys) = query.shape[1], key.shape[1:3]
    queries, first = query.shape[2], keys - query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query[0].unflatten(0, (kv_heads, heads // kv_heads))
    out = torch.empty(1, queries, heads, value.shape[-1], dtype=query.dtype, device=query.device)
    places = torch.arange(keys, device=query.device)
    step = max(1, CHUNK // (heads * keys))
    for start in range(0, queries, step):
        rows = grouped[:, :, start : start + step]
        future = places[None] > first + start + torch.arange(rows.shape[2], device=query.device)[:, None]
        scores = (rows @ key[0, :, None].transpose(-1, -2)) * scale
        weights = scores.masked_fill(future, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
        take(layer_of(module), weights, first + start)
        mixed = weights.to(query.dtype) @ value[0, :, None]
        out[0, start : start + step] = mixed.flatten(0, 1).transpose(0, 1)
    return out, None
