"""One stored document's KV as a safetensors file, for whatever reads those."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvstore.storage.files import sync_folder, translated

if TYPE_CHECKING:
    from kvstore.api import OpenStore


@dataclass(frozen=True)
class Exported:
    """What was written where; `receipt` is also in the file's metadata, as JSON under `receipt`."""

    path: Path
    nbytes: int
    receipt: dict[str, Any]


def export(store: OpenStore, source: str, path: str | Path, **quality: Any) -> Exported:
    """Write `layers.N.keys` and `layers.N.values` [1, heads, tokens, channels] at position 0 and `token_ids` int64 [tokens].

    N counts the layers of the model's cache that have keys and values; of latent attention these are the latents, of unlike widths.
    No model is loaded. The file appears whole or not at all. `quality`: as for `OpenStore.load`. Raises what `OpenStore.read` does, StorageError.
    """
    ids, layers, receipt = store.read(source, **quality)
    tensors = {f"layers.{n}.{name}": t.contiguous() for n, kv in enumerate(layers) for name, t in zip(("keys", "values"), kv, strict=True)}
    tensors["token_ids"] = torch.tensor(ids, dtype=torch.int64)
    target = Path(path)
    _replace(target, tensors, {"format": "pt", "receipt": json.dumps(receipt)})
    return Exported(target, target.stat().st_size, receipt)


def _replace(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Written beside its place, synced, and moved there."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    with translated(str(target)):
        try:
            staged.touch(exist_ok=False)  # says plainly why not, where the folder cannot be written
            mode = staged.stat().st_mode
            save_file(tensors, staged, metadata)
            os.chmod(staged, mode)  # the library makes files for their owner alone
            _sync(staged)
            os.replace(staged, target)
            sync_folder(target.parent)
        except SafetensorError as error:
            raise OSError(f"cannot be written: {error}") from error
        finally:
            staged.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
