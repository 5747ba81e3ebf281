"""Some tokens of a prompt computed anew, among keys and values of the others that stay as they are.

The model runs over the chosen tokens alone, at their true positions, each attending to every token before it in the prompt, stored or computed.
Its cache layers put the new keys and values over the old ones before attention reads them all, so every layer sees what the layer below computed.
Nothing of the model is replaced: it is given token ids, positions, a mask and a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstore.errors import IncompatibleError, KvstoreError
from kvstore.families.assemble import dynamic_cache
from kvstore.families.attention import configs
from kvstore.families.capture import evaluating
from kvstore.families.slots import kv_slots, window_of

KeysValues = tuple[Tensor, Tensor]
ENTRIES = 1 << 24  # of a mask that is made at once: 16 MiB, 64 where it is added to float32 scores
ROWS = 1024  # computed at once: under a mask, attention reads every key up to the last row's, so parts spare up to half of it
# whether masks are truth values, or added to the scores: the wrong kind is silently wrong
BOOLEAN = {"sdpa": True, "eager": False, "kvstore_masked_sdpa": True, "kvstore_masked_eager": False}
REMEDY = "use reuse='prefix' or reuse='blocks', which compute no tokens anew"


class Recomputer:
    """Computes tokens of prompts anew with one model. Raises IncompatibleError where its attention is not known to follow a given mask."""

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config.get_text_config(decoder=True)
        self.attention = _attention(model)
        _prove(self)

    @property
    def current(self) -> bool:
        """Whether the model's attention is still the one that was tried: another takes another kind of mask."""
        return _attention(self.model) == self.attention

    def run(self, ids: Tensor, rows: Tensor, layers: Sequence[KeysValues]) -> None:
        """Overwrite `rows` (int64, ascending) of `layers`, each [1, kv_heads, T, width], by what the model computes for `ids` (int64 [T])."""
        for part in self._parts(rows, len(ids)):
            self._forward(ids, part, layers, None)

    def fresh(self, ids: Tensor, rows: Tensor, layers: Sequence[KeysValues], layer: int) -> KeysValues:
        """The same up to the keys and values of `layer`, which are returned [1, kv_heads, rows, width]; it and later ones stay as they were."""
        parts = [self._forward(ids, part, layers, layer) for part in self._parts(rows, len(ids))]
        keys, values = zip(*(p for p in parts if p is not None), strict=True)
        return torch.cat(keys, -2), torch.cat(values, -2)

    def _parts(self, rows: Tensor, tokens: int) -> tuple[Tensor, ...]:
        """Later tokens see the earlier ones' new values in any case, so a part at a time gives the same with a smaller mask."""
        return rows.split(max(1, min(ROWS, ENTRIES // tokens))) if len(rows) else ()

    def _forward(self, ids: Tensor, rows: Tensor, layers: Sequence[KeysValues], stop: int | None) -> KeysValues | None:
        """One pass over `rows`. Later tokens are left out of what attention reads: they are not seen."""
        seen = [(keys[..., : int(rows[-1]) + 1, :], values[..., : int(rows[-1]) + 1, :]) for keys, values in layers]
        cache = _scattering(self.model.config, seen, rows, stop)
        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model
        device = decoder.get_input_embeddings().weight.device
        given: dict[str, Any] = {"input_ids": ids[rows][None].to(device), "position_ids": rows[None].to(device)}
        with torch.no_grad(), torch.autocast(device.type, enabled=False), evaluating(self.model):
            try:
                decoder(**given, attention_mask=self._masks(cache, rows, device), past_key_values=cache, use_cache=True)
            except _Reached as reached:
                return reached.keys, reached.values
        return None

    def _masks(self, cache: DynamicCache, rows: Tensor, device: torch.device) -> Any:
        """One mask for all layers; one for each type of layer where some slide and some do not."""
        windows = [window_of(layer) for layer in cache.layers]
        made = {w: self._mask(rows, w, device) for w in {windows[slot] for slot in kv_slots(cache)}}
        if len(made) == 1:
            return next(iter(made.values()))
        types = self.config.layer_types
        return {types[slot]: made[windows[slot]] for slot in kv_slots(cache)}

    def _mask(self, rows: Tensor, window: int | None, device: torch.device) -> Tensor:
        """[1, 1, rows, keys]: true where a row sees a key, or what eager attention adds to the scores."""
        places, at = torch.arange(int(rows[-1]) + 1, device=device)[None], rows[:, None].to(device)
        sees = (places <= at) if window is None else (places <= at) & (places > at - window)
        if BOOLEAN[self.attention]:
            return sees[None, None]
        dtype = self.model.dtype
        return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[None, None]


class _Reached(Exception):
    """Ends a pass whose result is complete: a layer's new keys and values, [1, kv_heads, rows, width]."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values


class _Scattering(DynamicLayer):
    """A full-length cache layer whose new tokens take the places of old ones. A window, where there is one, is the mask's matter."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, window: int | None, stops: bool):
        super().__init__()
        self.keys, self.values, self.rows, self.stops = keys, values, rows.to(keys.device), stops
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.is_sliding, self.sliding_window = window is not None, window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        if self.stops:
            raise _Reached(key_states, value_states)
        self.keys[:, :, self.rows], self.values[:, :, self.rows] = key_states, value_states
        return self.keys, self.values


def _scattering(config: Any, layers: Sequence[KeysValues], rows: Tensor, stop: int | None) -> DynamicCache:
    """The model's own kind of cache over `layers`. Raises IncompatibleError for layers that are neither full attention nor sliding."""
    cache = dynamic_cache(config, layers)
    for number, (slot, (keys, values)) in enumerate(zip(kv_slots(cache), layers, strict=True)):
        cache.layers[slot] = _Scattering(keys, values, rows, window_of(cache.layers[slot]), number == stop)
    return cache


def _attention(model: nn.Module) -> str:
    """The attention function's name, a key of BOOLEAN. Raises IncompatibleError for others, whose masks are of another kind."""
    names = {config._attn_implementation_internal or "eager" for config in configs(model)}
    if len(names) > 1 or not names <= BOOLEAN.keys():
        raise IncompatibleError(
            f"attention {' and '.join(sorted(names))} of {type(model).__name__} cannot compute chosen tokens anew; eager and sdpa can",
            remedy="call model.set_attn_implementation('sdpa') first, or " + REMEDY,
            code="recompute",
        )
    return names.pop()


def _prove(recomputer: Recomputer) -> None:
    """Spoilt tokens of a short live prompt, computed anew, must become what they were: a model that makes its own mask would not give that."""
    model, rows = recomputer.model, torch.tensor([2, 3, 7, 10])
    ids = torch.arange(12) % model.get_input_embeddings().weight.shape[0]
    try:
        live = _live(model, ids)
        spoilt = [(_spoilt(keys, rows), _spoilt(values, rows)) for keys, values in live]
        recomputer.run(ids, rows, spoilt)
    except KvstoreError:
        raise
    except Exception as error:  # a model's own code may refuse masks and caches in any way
        raise _refusal(model, f"it fails with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    limit = 1e-3 if model.dtype == torch.float32 else 0.05
    for layer, pairs in enumerate(zip(live, spoilt, strict=True)):
        off = max(_distance(a, b) for a, b in zip(*pairs, strict=True))
        if not off <= limit:
            raise _refusal(model, f"layer {layer} is {off:.2g} of its size off, expected at most {limit:g}")


def _refusal(model: nn.Module, found: str) -> IncompatibleError:
    return IncompatibleError(f"{type(model).__name__} does not compute chosen tokens as it computes all: {found}", remedy=REMEDY, code="recompute")


def _live(model: nn.Module, ids: Tensor) -> list[KeysValues]:
    """Keys and values of a whole prompt, [1, kv_heads, T, width] a layer. It is shorter than any window, so sliding layers keep it all."""
    from kvstore.families.capture import forward

    cache = DynamicCache(config=model.config)
    forward(model, ids[None], torch.arange(len(ids))[None], cache)
    return [(cache.layers[slot].keys, cache.layers[slot].values) for slot in kv_slots(cache)]


def _spoilt(x: Tensor, rows: Tensor) -> Tensor:
    """`x` with another token's values in `rows`."""
    copy = x.clone()
    copy[:, :, rows] = 3 * x[:, :, rows - 1] + 1
    return copy


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-9))
