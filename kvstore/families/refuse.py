"""Reasons to refuse a model that its config and its cache classes tell before anything is run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvstore.families.assemble import is_empty
from kvstore.families.slots import ATTENDING, kv_slots
from kvstore.families.states import keeps_state

LENGTH_DEPENDENT = ("dynamic", "longrope", "su")  # the frequencies follow the length of the prompt: one regime of them is served
KNOWN_LAYERS = {
    "DynamicIndexedLayer": "keeps an index beside keys and values",
    "LinearAttentionAndSlidingWindowAttentionLayer": "keeps a recurrent state and a sliding window",
}
KNOWN_TYPES = {"full_attention", "sliding_attention", "linear_attention", "hybrid", "conv"}
CHUNKED = "attends within chunks that begin at fixed places of the prompt, so that keys and values depend on where a document stands"


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
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types or (not types and getattr(config, "attention_chunk_size", None)):
        problems.append(f"chunked_attention {CHUNKED}; expected full or sliding attention")
    others = sorted(types - KNOWN_TYPES - {"chunked_attention"})
    if others:
        problems.append(f"layer_types has {', '.join(others)}; expected {' or '.join(sorted(KNOWN_TYPES))}")
    if rope_regime(config) != "static" and rope_limit(config) is None:
        problems.append(
            f"rope type {length_dependent(config)} depends on the length of the prompt, and the config does not say up to which it is constant"
        )
    return problems


def length_dependent(config: Any) -> str:
    """The rope type of the config whose frequencies follow the length of the prompt; empty where there is none."""
    return next((kind for kind in sorted(set(rope_kinds(config).values())) if kind in LENGTH_DEPENDENT), "")


def rope_regime(config: Any) -> str:
    """`short` where the frequencies change with the prompt's length: those below `rope_limit` are served. Else `static`."""
    return "short" if length_dependent(config) else "static"


def rope_limit(config: Any) -> int | None:
    """Tokens of a prompt up to which the first frequencies hold; None where they always do, or where the config does not say."""
    kind = length_dependent(config)
    if not kind:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    named = [p.get("original_max_position_embeddings") for p in nested] + [getattr(config, "original_max_position_embeddings", None)]
    limits = [getattr(config, "max_position_embeddings", None)] if kind == "dynamic" else named
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)


def context_tokens(config: Any) -> int:
    """Positions that prompts may take: those the model was made for, with length-dependent RoPE those of the one regime."""
    made_for = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    return min(made_for, rope_limit(config) or made_for)


def rope_kinds(config: Any) -> dict[str, str]:
    """Rope type by layer type (`""` for all layers) as the config names it; empty where it names none."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(parameters, dict):
        return {}
    nested = {layer: p for layer, p in parameters.items() if isinstance(p, dict)} or {"": parameters}
    found = {layer: p.get("rope_type", p.get("type")) for layer, p in nested.items()}
    return {layer: kind for layer, kind in found.items() if isinstance(kind, str)}


def cache_problems(cache: Cache) -> list[str]:
    """Layers of an empty cache, as the config builds it, that kvstore cannot store; one line a class."""
    if not kv_slots(cache):
        return ["the model's cache has no layers with keys and values"]
    by_class: dict[str, list[int]] = {}
    for index, layer in enumerate(cache.layers):
        if type(layer) not in ATTENDING and not is_empty(layer) and not keeps_state(layer):
            by_class.setdefault(type(layer).__name__, []).append(index)
    expected = " or ".join(kind.__name__ for kind in ATTENDING)
    return [f"{listed(indices)}: {name} {KNOWN_LAYERS.get(name, 'is unknown to kvstore')}; expected {expected}" for name, indices in by_class.items()]


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
