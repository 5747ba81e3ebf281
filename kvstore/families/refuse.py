"""Reasons to refuse a model that its config and its cache classes tell before anything is run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

LENGTH_DEPENDENT = (
    "dynamic",
    "longrope",
    "su",
)  # frequencies follow the length of the prompt, so no prefix can be reused
KNOWN_LAYERS = {
    "DynamicSlidingWindowLayer": "keeps a sliding window only",
    "DynamicIndexedLayer": "keeps an index beside keys and values",
    "LinearAttentionLayer": "keeps a recurrent state instead of keys and values",
    "LinearAttentionAndFullAttentionLayer": "keeps a recurrent state beside keys and values",
    "LinearAttentionAndSlidingWindowAttentionLayer": "keeps a recurrent state and a sliding window",
    "DummyLayer": "stores nothing: it shares another layer's keys and values, or has no attention",
}


def text_config(model: nn.Module) -> Any:
    """The decoder's part of the model's config; None where there is none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def config_problems(model: nn.Module) -> list[str]:
    """What the config says that kvstore does not handle yet."""
    config = text_config(model)
    if config is None:
        return [f"{type(model).__name__} has no transformers config; expected a causal language model of transformers"]
    problems = []
    if getattr(model.config, "is_encoder_decoder", False):
        problems.append("encoder-decoder model; expected a decoder alone")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        problems.append(f"layer_types has {', '.join(others)}; expected full_attention alone")
    if not getattr(config, "layer_types", None) and _window(config):
        problems.append(f"{_window(config)}; expected full attention")
    for kind in sorted(set(rope_kinds(config).values()) & set(LENGTH_DEPENDENT)):
        problems.append(f"rope type {kind} depends on the length of the prompt; expected frequencies that do not")
    return problems


def _window(config: Any) -> str:
    for name in ("sliding_window", "attention_chunk_size"):
        size = getattr(config, name, None)
        if size is not None and getattr(config, f"use_{name}", True):
            return f"{name} is {size}"
    return ""


def rope_kinds(config: Any) -> dict[str, str]:
    """Rope type by layer type (`""` for all layers) as the config names it; empty where it names none."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return {}
    nested = {layer: p for layer, p in parameters.items() if isinstance(p, dict)} or {"": parameters}
    found = {layer: p.get("rope_type", p.get("type")) for layer, p in nested.items()}
    return {layer: kind for layer, kind in found.items() if isinstance(kind, str)}


def cache_problems(cache: Cache) -> list[str]:
    """Layers of an empty cache, as the config builds it, that are not plain full attention; one line a class."""
    if not cache.layers:
        return ["the model's cache has no layers"]
    by_class: dict[str, list[int]] = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            by_class.setdefault(type(layer).__name__, []).append(index)
    return [
        f"{listed(indices)}: {name} {KNOWN_LAYERS.get(name, 'is unknown to kvstore')}; expected DynamicLayer" for name, indices in by_class.items()
    ]


def new_cache(model: nn.Module) -> Cache:
    return DynamicCache(config=model.config)


def listed(indices: list[int]) -> str:
    """`layer 3`, `layers 0-3` or `layers 0, 2, 5 and 4 more`."""
    if len(indices) == 1:
        return f"layer {indices[0]}"
    if indices == list(range(indices[0], indices[-1] + 1)):
        return f"layers {indices[0]}-{indices[-1]}"
    shown = ", ".join(map(str, indices[:3]))
    return f"layers {shown}" + (f" and {len(indices) - 3} more" if len(indices) > 3 else "")
