"""The model as a calibration runs it: keys before RoPE and values of a sequence, and what follows a prefix of given keys and values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from kvstore.families.assemble import KeysValues, dynamic_cache
from kvstore.families.capture import evaluating, prefill
from kvstore.families.latent import to_cache
from kvstore.families.refuse import new_cache
from kvstore.families.slots import kv_slots
from kvstore.families.states import States, differentiable, take_states
from kvstore.manifest import Layout

WIDE_BYTES = 2 << 30  # weights up to this are run in float32: bfloat16 adds noise of the size of what is measured
log = logging.getLogger("kvstore")


class Live:
    """A model and its layout. `x` is always float32 [tokens, layers, 2, channels]: keys before RoPE (0) and values (1), channels by head."""

    def __init__(self, model: Any, layout: Layout, *, widen: bool = True):
        self.model = _widened(model) if widen else model
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.layout = msgspec.structs.replace(layout, dtype=dtype) if dtype in ("float32", "float16", "bfloat16") else layout
        self.device: torch.device = self.model.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    def values(self, ids: Sequence[int]) -> Tensor:
        """x of `ids` from the first position, on the model's (first) device."""
        layers = prefill(self.model, self.layout, ids)[0]
        flat = [torch.stack([t.to(self.device).transpose(0, 1).reshape(len(ids), -1).float() for t in kv], 1) for kv in layers]
        return torch.stack(flat, 1)

    def following(self, x: Tensor, ids: Sequence[int], before: Sequence[int]) -> Tensor:
        """Logits float32 [len(ids), vocabulary] after each of `ids`, which follow the prefix `x` of the ids `before`; differentiable in `x`.

        Recurrent states are those that the prefix leaves live, since they are stored exactly.
        """
        cache = differentiable(dynamic_cache(self.model.config, self._layers(x), self._states(before)))
        with torch.autocast(self.device.type, enabled=False), evaluating(self.model):
            places = torch.arange(len(x), len(x) + len(ids), device=self.device)[None]  # some hybrids of transformers begin at 0 after any cache
            out = self.model(torch.tensor([list(ids)], device=self.device), position_ids=places, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits[0].float()
        return logits

    def _states(self, ids: Sequence[int]) -> States:
        return take_states(prefill(self.model, self.layout, ids)[1]) if self.layout.state else ()

    def _layers(self, x: Tensor) -> list[KeysValues]:
        """Keys and values, rotated as the model caches them at the first positions: [1, kv_heads, tokens, channels of each]."""
        positions, found = torch.arange(len(x)), []
        for layer in range(self.layout.layers):
            stored = (self._heads(x[:, layer, 0], layer), self._heads(x[:, layer, 1], layer))
            keys, values = to_cache(self.layout, layer, stored, positions)
            found.append((keys[None], values[None]))
        return found

    def _heads(self, flat: Tensor, layer: int) -> Tensor:
        heads = flat.view(len(flat), self.layout.kv_heads, self.layout.head_dim).transpose(0, 1)
        return heads.to(device=self.device_of(layer), dtype=self.model.dtype)

    def device_of(self, layer: int) -> torch.device | str | int:
        """Where a stored layer's cache lies; models spread over devices carry a map of their parts."""
        spread: dict[str, Any] = getattr(self.model, "hf_device_map", None) or {}
        if not spread:
            return self.device
        index = kv_slots(new_cache(self.model))[layer]
        return next((place for name, place in spread.items() if name.endswith(f"layers.{index}")), self.device)


def _widened(model: Any) -> Any:
    """A float32 copy of a small model in a narrower dtype, else the model itself."""
    parameters = list(model.parameters())
    plain = all(p.is_floating_point() for p in parameters) and getattr(model.config, "quantization_config", None) is None
    narrow = any(p.dtype != torch.float32 for p in parameters)
    if not (plain and narrow) or 4 * sum(p.numel() for p in parameters) > WIDE_BYTES:
        return model
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(model).to(torch.float32)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients flow through the weights, none is kept for them; also within a caller's no_grad or inference_mode."""
    kept = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in kept:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)
