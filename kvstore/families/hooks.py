"""Watching one forward pass: what an attention layer hands to its cache, and what it handed to functions before that.

Attention layers call a module-level function of their own file (`apply_rotary_pos_emb` in most) with the keys before
RoPE. Such functions are looked up by name at each call, so replacing them in their module shows every layer's keys
without touching the model.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

OnUpdate = Callable[[int, Tensor, Tensor, list[Tensor]], None]
_patching = threading.RLock()  # a module's functions are process-wide: one watched pass at a time


@contextmanager
def watched(model: nn.Module, cache: Cache, on_update: OnUpdate, *, functions: bool = True) -> Iterator[None]:
    """Within, each `cache.update` calls on_update(layer, new keys, new values, seen) before the cache takes them.

    keys, values: [B, kv_heads, T, head_dim]. `seen`: the floating-point tensors that this thread gave to functions of
    the attention's module since the update before, oldest first. With functions=False it is empty, and nothing outside
    `cache` is touched.
    """
    seen: list[Tensor] = []
    with _patching if functions else _nothing(), _updates(cache, on_update, seen):
        originals = [(m, name, getattr(m, name)) for m, name in _functions(model)] if functions else []
        try:
            for module, name, original in originals:
                setattr(module, name, _recording(original, seen, threading.get_ident()))
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _updates(cache: Cache, on_update: OnUpdate, seen: list[Tensor]) -> Iterator[None]:
    """Shadow `update` on this cache object alone."""
    original = cache.update

    def update(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        on_update(layer_idx, key_states, value_states, seen)
        seen.clear()
        return original(key_states, value_states, layer_idx, *args, **kwargs)

    vars(cache)["update"] = update
    try:
        yield
    finally:
        del vars(cache)["update"]


def _functions(model: nn.Module) -> list[tuple[Any, str]]:
    """(module, name) of the functions that the model's cache-updating layers call by name."""
    found: dict[tuple[str, str], tuple[Any, str]] = {}
    for kind in {type(m) for m in model.modules() if not isinstance(m, PreTrainedModel)}:
        bases = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.")]
        names = {base: _names(base) for base in bases}
        if not any("update" in used for used in names.values()):
            continue
        for base in bases:
            module = sys.modules.get(base.__module__)
            for name in names[base]:
                if _is_function(getattr(module, name, None)):
                    found[base.__module__, name] = (module, name)
    return list(found.values())


def _is_function(value: Any) -> bool:
    """A plain function, or an object in its place: hub kernels are called like functions but are modules."""
    return callable(value) and not isinstance(value, type) and type(value).__module__ != "typing"


def _names(kind: type) -> set[str]:
    """Global and attribute names in the code of the class's own methods."""
    methods = [inspect.unwrap(m) for m in vars(kind).values() if callable(m)]
    return {name for m in methods if isinstance(m, FunctionType) for name in m.__code__.co_names}


def _recording(original: Callable[..., Any], seen: list[Tensor], thread: int) -> Callable[..., Any]:
    """`original`, noting its tensors where `thread` calls it: another thread's model may share the module."""

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            seen.extend(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        return original(*args, **kwargs)

    return wrapper
