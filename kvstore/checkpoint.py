"""Checkpoints on disk: what tensors they hold, and the sha256 of each. Torch-free; digests are cached by path, size, time and inode."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.digest import digest, sha256
from kvstore.errors import InputError, IntegrityError
from kvstore.index import cache_folder

Tensors = dict[str, tuple[str, Sequence[int], str]]
_HEADER_LIMIT = 100_000_000  # as safetensors itself


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies in its file; `dtype` as safetensors writes it (BF16, F32...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder. Raises InputError where there are none, or only pickled ones."""
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_model"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [p for p in files if p.name in named]
    if not files:
        raise InputError(
            f"{folder} has no *.safetensors weights", remedy="save the model with save_pretrained (safetensors); kvstore never unpickles weights"
        )
    return files


def tensors_in(file: Path) -> dict[str, TensorSlot]:
    """Name -> slot, over a memory map. Raises IntegrityError for a broken header."""
    with open(file, "rb") as handle:
        whole = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    size = struct.unpack("<Q", whole[:8])[0] if len(whole) >= 8 else _HEADER_LIMIT + 1
    if size > min(_HEADER_LIMIT, len(whole) - 8):
        raise IntegrityError(f"{file} is not a safetensors file", remedy="fetch or save the checkpoint again")
    header: dict[str, Any] = json.loads(bytes(whole[8 : 8 + size]))
    body = whole[8 + size :]
    return {
        name: TensorSlot(file, h["dtype"], tuple(h["shape"]), body[h["data_offsets"][0] : h["data_offsets"][1]])
        for name, h in header.items()
        if name != "__metadata__"
    }


def checkpoint_tensors(folder: Path) -> Tensors:
    """Name -> (dtype, shape, sha256) over all weight files of a checkpoint."""
    found: Tensors = {}
    for file in safetensors_files(folder):
        found |= _file_digests(file)
    return found


def _file_digests(file: Path) -> Tensors:
    stamp = _stamp(file)
    cached = cache_folder() / "digests" / f"{digest('kvstore/file/1', stamp)}.json"
    if (known := read_cache(cached)) is not None:
        return {name: (dtype, tuple(shape), sha) for name, (dtype, shape, sha) in known.items()}
    slots = tensors_in(file)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shas = pool.map(sha256, (s.data for s in slots.values()))
        found: Tensors = {name: (s.dtype, s.shape, sha) for (name, s), sha in zip(slots.items(), shas, strict=True)}
    if _stamp(file) == stamp:  # not rewritten while it was hashed
        write_cache(cached, found)
    return found


def _stamp(file: Path) -> list[str | int]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]


def read_cache(path: Path) -> Any:
    """JSON, or None where there is none (or only a broken one)."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_cache(path: Path, value: Mapping[str, Any]) -> None:
    """Best effort: a cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.{os.getpid()}")
        staged.write_text(json.dumps(value), encoding="utf-8")
        os.replace(staged, path)
    except OSError:
        return
