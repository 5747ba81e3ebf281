"""Recurrent states: what hybrid models keep in the cache of a sequence instead of, or beside, keys and values of each token.

A state stands for all tokens so far and cannot be cut, moved or joined: it is exact after the very tokens that led to it, and nowhere else. Models
change it in place, so that every cache gets a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvstore.errors import IncompatibleError, IntegrityError
from kvstore.manifest import Layout, StateTensor, ValueDtype

# by name: releases of transformers before 5.2 have none of them
_GROWING = ("LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer")
_STATIC = "LinearAttentionAndStaticFullAttentionLayer"
_FIELDS = {"conv": "conv_states", "recurrent": "recurrent_states"}
_DTYPES = {name: getattr(torch, name) for name in get_args(ValueDtype)}


@dataclass(frozen=True)
class State:
    """One recurrent tensor [batch, ...] at the end of the cached tokens. `layer` counts all layers of the cache; `name` is as in the layout."""

    layer: int
    name: str
    value: Tensor


States = tuple[State, ...]


def keeps_state(layer: Any) -> bool:
    """Whether a cache layer has a recurrent state of a kind that kvstore can take and put back."""
    return type(layer).__name__ in (*_GROWING, _STATIC)


def shares_state(layer: Any) -> bool:
    """Whether `own_state` makes an independent layer of one that keeps a state: its keys and values, if any, are not written in place."""
    return type(layer).__name__ in _GROWING


def take_states(cache: Cache) -> States:
    """Copies of all recurrent tensors of a cache, by layer and name, as the layout lists them; none before the first token."""
    return tuple(State(s.layer, s.name, s.value.clone()) for s in _held(cache))


def put_states(cache: Cache, states: Sequence[State]) -> None:
    """Copies of `states` into a fresh cache. Raises IncompatibleError where they are not those of its recurrent layers."""
    wanted, given = {i for i, layer in enumerate(cache.layers) if keeps_state(layer)}, {s.layer for s in states}
    if wanted != given:
        raise IncompatibleError(
            f"layers {sorted(wanted)[:8]} of the model's cache keep a recurrent state, got states of layers {sorted(given)[:8]}",
            remedy="give the states at the end of the cached tokens: keys and values alone do not continue this model",
            code="recurrent",
        )
    for state in states:
        kind, index = _place(state.name)
        update = cache.layers[state.layer].update_conv_state if kind == "conv" else cache.layers[state.layer].update_recurrent_state
        update(state.value, state_idx=index)  # allocates, copies, and notes that there is a past


def differentiable(cache: Cache) -> Cache:
    """`cache`, whose layers now put a new recurrent state in the place of the old one: a backward pass still needs the old one as it was."""
    for layer in cache.layers:
        if keeps_state(layer):
            vars(layer)["update_recurrent_state"] = partial(_assign, layer)
    return cache


def _assign(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states


def own_state(layer: Any) -> Any:
    """A copy of a cache layer over the same keys and values, with a recurrent state of its own."""
    twin = copy.copy(layer)
    for name, held in vars(layer).items():
        if isinstance(held, dict):
            setattr(twin, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in held.items()})
    return twin


def joined(each: Sequence[States]) -> States:
    """The states of several sequences as those of one batch. Raises IncompatibleError where some have none."""
    first = each[0]
    if any([(s.layer, s.name) for s in states] != [(s.layer, s.name) for s in first] for states in each):
        raise IncompatibleError("some prompts begin with a recurrent state and others do not", remedy="collate those that do", code="recurrent")
    return tuple(State(s.layer, s.name, torch.cat([states[i].value for states in each])) for i, s in enumerate(first))


def require_no_state(layout: Layout, what: str, remedy: str) -> None:
    """Raises IncompatibleError where a model's recurrent state stands against `what`."""
    if layout.state:
        raise IncompatibleError(
            f"{what}: this model keeps a recurrent state, which is exact after its own prefix and nowhere else", remedy=remedy, code="recurrent"
        )


def describe(states: Sequence[State]) -> tuple[StateTensor, ...]:
    """As the layout has it. Raises IncompatibleError for a dtype that kvstore does not store."""
    for s in states:
        if s.value.dtype not in _DTYPES.values():
            raise IncompatibleError(f"layer {s.layer}: {s.name} is {s.value.dtype}; expected one of {', '.join(_DTYPES)}")
    return tuple(StateTensor(s.layer, s.name, tuple(s.value.shape[1:]), _name(s.value.dtype)) for s in states)


def state_bytes(layout: Layout, states: Sequence[State]) -> bytes | None:
    """The state of one sequence as packs hold it: its tensors in the layout's order, C order, little-endian. None for models that have none.

    Raises IncompatibleError where the tensors are not those of the layout.
    """
    if (found := describe(states)) != layout.state:
        differing = (f"{f}, expected {w}" for f, w in zip(found, layout.state, strict=False) if f != w)
        odd = next(differing, f"{len(found)} tensors, expected {len(layout.state)}")
        raise IncompatibleError(f"the recurrent state is not the layout's: {odd}", remedy="measure the model again")
    if not layout.state:
        return None
    return b"".join(s.value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() for s in states)


def states_from(layout: Layout, data: bytes | memoryview, device: torch.device | str = "cpu") -> States:
    """The inverse of `state_bytes`, each tensor [1, ...] in memory of its own. Raises IntegrityError for another number of bytes."""
    if len(data) != layout.state_nbytes:
        raise IntegrityError(f"a recurrent state of {len(data)} bytes, the layout says {layout.state_nbytes}")
    found, at = [], 0
    with torch.inference_mode(False):  # the tensors outlive the caller's mode
        for t in layout.state:
            flat = torch.frombuffer(bytearray(data[at : at + t.nbytes]), dtype=_DTYPES[t.dtype])
            found.append(State(t.layer, t.name, flat.view(1, *t.shape).to(device)))
            at += t.nbytes
    return tuple(found)


def _held(cache: Cache) -> Iterator[State]:
    """The recurrent tensors of a cache themselves."""
    for index, layer in enumerate(cache.layers):
        if keeps_state(layer):
            found = [(f"{kind}{i}", t) for kind, field in _FIELDS.items() for i, t in getattr(layer, field).items() if t is not None]
            yield from (State(index, name, value) for name, value in sorted(found, key=lambda pair: pair[0]))


def _place(name: str) -> tuple[str, int]:
    kind = name.rstrip("0123456789")
    return kind, int(name[len(kind) :])


def _name(dtype: torch.dtype) -> Any:
    return next(name for name, found in _DTYPES.items() if found == dtype)
