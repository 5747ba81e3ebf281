"""Which model is this? From a checkpoint's files, or from a live model tied to its files or hashed whole. Design section 3.

A live model counts as its checkpoint when every one of its tensors equals the checkpoint's: compared whole where the model is small, by evenly
spread samples of every tensor where it is large. Otherwise its own tensors are hashed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvstore.checkpoint import Tensors, TensorSlot, checkpoint_tensors, safetensors_files, tensors_in
from kvstore.digest import sha256
from kvstore.errors import IncompatibleError, InputError, KvstoreError
from kvstore.families.capture import prefill
from kvstore.identity import kv_config, make_model, weights_digest
from kvstore.manifest import Layout, Model, ValueDtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_TORCH = {code: dtype for dtype, code in _CODES.items()}
_WHOLE_LIMIT = 64 << 20  # bytes of a model that is compared whole: about 50 ms
_SAMPLES = 4096  # values a tensor, of larger ones
PROBE_TOKENS = 64
PROJECTIONS = 16
TOLERANCE = {"float32": 2e-3, "float16": 0.02, "bfloat16": 0.05}


def model_at(path: str | Path, dtype: str | None = None) -> Model:
    """The model of a checkpoint folder or cached hub id, as it would be loaded in `dtype` (the checkpoint's own by default)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}", remedy="give a folder saved by save_pretrained, or a model id") from error
    if (folder := checkpoint_folder(str(path))).joinpath("adapter_config.json").exists():
        raise IncompatibleError(f"{path} holds an adapter beside the weights", remedy="merge it into the model, and save that")
    family = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if family is None:
        raise IncompatibleError(
            f"{path}: transformers has no causal language model for {type(config).__name__}", remedy="load the model in Python and pass the object"
        )
    tensors = checkpoint_tensors(folder)
    return _describe(config, family, str(path), tensors, dtype or _plain_dtype(config.dtype))


def model_of(model: PreTrainedModel) -> Model:
    """The identity of a live model."""
    config, name = model.config, str(model.config._name_or_path or type(model).__name__)
    if getattr(model, "peft_config", None):
        raise IncompatibleError("the model carries adapters that can be switched and scaled", remedy="merge them first: merge_and_unload()")
    tensors = _tied_checkpoint(model, name)
    if tensors is None:
        tensors = {n: (_CODES[t.dtype], tuple(t.shape), sha256(_bytes(t))) for n, t in _state(model)}
    return _describe(config, type(model), name, tensors, _plain_dtype(model.dtype))


def _describe(config: PreTrainedConfig, family: type, name: str, tensors: Tensors, dtype: str) -> Model:
    text = config.get_text_config(decoder=True)
    quantization = getattr(config, "quantization_config", None)
    if dtype not in TOLERANCE:
        raise IncompatibleError(f"{name}: models in {dtype} are not supported", remedy="load it in bfloat16, float16 or float32")
    return make_model(
        Path(name).name or name,
        weights=weights_digest(tensors, getattr(text, "vocab_size", None)),
        config=kv_config(text.to_dict()),
        dtype=_value_dtype(dtype),
        quantization=None if quantization is None else str(quantization),
        code=_code_digest(family),
    )


def _value_dtype(name: str) -> ValueDtype:
    return {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}[name]  # type: ignore[return-value]


def _plain_dtype(dtype: torch.dtype | str | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def _code_digest(family: type) -> str | None:
    """sha256 of modelling code that is not transformers' own."""
    if family.__module__.startswith("transformers.models."):
        return None
    source = inspect.getsourcefile(family)
    return sha256(Path(source).read_bytes()) if source else sha256(family.__qualname__.encode())


def checkpoint_folder(name: str, revision: str | None = None) -> Path:
    """A local folder, or the cached snapshot of a hub id (at `revision`, else the main one); nothing is fetched. Raises InputError."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # many kinds, one meaning
        raise InputError(f"{name!r} is neither a folder nor a model in the local hub cache", remedy="download it first") from error


def _state(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        if tensor.dtype not in _CODES:
            raise IncompatibleError(f"weights in {tensor.dtype} cannot be fingerprinted", remedy="load the model unquantized")
        yield name, tensor


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _tied_checkpoint(model: PreTrainedModel, name: str) -> Tensors | None:
    """The digests of the checkpoint that `model` came from, if all its tensors are still that checkpoint's."""
    try:
        folder = checkpoint_folder(name)
        slots = {n: s for file in safetensors_files(folder) for n, s in tensors_in(file).items()}
    except KvstoreError:
        return None
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    state = dict(_state(model))
    small = sum(t.nbytes for t in state.values()) <= _WHOLE_LIMIT
    for tensor_name, tensor in state.items():
        if tensor_name in tied and tensor_name not in slots:
            continue  # the same memory as the embedding, which is compared
        if tensor_name not in slots or not _equal(tensor, slots[tensor_name], small):
            return None
    return checkpoint_tensors(folder)


def _equal(tensor: torch.Tensor, slot: TensorSlot, whole: bool) -> bool:
    """Whether a live tensor holds the stored values, cast to its own dtype as loading casts them."""
    if tuple(tensor.shape) != slot.shape or slot.dtype not in _TORCH:
        return False
    if tensor.numel() == 0:
        return True
    dtype = _TORCH[slot.dtype]
    patterns, live = np.frombuffer(slot.data, f"u{dtype.itemsize}"), tensor.detach().reshape(-1)
    if not whole and live.numel() > _SAMPLES:
        at = np.linspace(0, live.numel() - 1, _SAMPLES).astype(np.int64)
        patterns, live = patterns[at], live[torch.from_numpy(at).to(live.device)]
    stored = torch.from_numpy(patterns.copy()).view(dtype)
    return torch.equal(stored.to(live.dtype), live.cpu())


# the probe: K and V themselves, in case two models differ in something that no list names


def probe_ids(vocab_size: int) -> tuple[int, ...]:
    """64 fixed ids spread over the vocabulary, the lowest (often special) ones left out where there is room."""
    low = min(256, vocab_size // 4)
    return tuple(low + (i * 2654435761) % max(1, vocab_size - low) for i in range(1, PROBE_TOKENS + 1))


def probe_sketch(model: PreTrainedModel, layout: Layout, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """float32 [layers, 2, tokens, projections]: K (before RoPE) and V of the probe under fixed random signs."""
    layers, _ = prefill(model, layout, ids, None)
    signs = torch.from_numpy(_signs(layout.channels))
    rows = [[t.permute(1, 0, 2).reshape(len(ids), -1).float().cpu() @ signs for t in kv] for kv in layers]
    return np.stack([torch.stack(kv).numpy() for kv in rows]).astype(np.float32)


def _signs(channels: int) -> npt.NDArray[np.float32]:
    """float32 [channels, projections] of +-1/sqrt(channels), the same on every machine: bits of a linear congruential sequence."""
    state, count = 1, channels * PROJECTIONS
    bits = np.empty(count, np.float32)
    for i in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        bits[i] = 1.0 if state >> 63 else -1.0
    return bits.reshape(channels, PROJECTIONS) / np.float32(np.sqrt(channels))


def check_probe(found: npt.NDArray[np.float32], stored: npt.NDArray[np.float32], dtype: str) -> float:
    """Largest relative difference over layers and K, V. Raises IncompatibleError beyond the dtype's tolerance."""
    error = np.linalg.norm((found - stored).reshape(*found.shape[:2], -1), axis=-1)
    relative = float((error / np.maximum(np.linalg.norm(stored.reshape(*stored.shape[:2], -1), axis=-1), 1e-9)).max())
    if not relative <= TOLERANCE[dtype]:
        raise IncompatibleError(
            f"the model computes other keys and values than the store was built from (probe differs by {relative:.3g}, allowed {TOLERANCE[dtype]})",
            remedy="build the corpus again with this model",
            code="probe",
        )
    return relative
