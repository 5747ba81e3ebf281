"""What device.py decodes: geometries of real models with random weights, and stores of units with the statistics that real ones have.

Coefficients are drawn straight in the transform's domain, so that no activations are needed: group dimension 8,192, of which 10, 17 and 30 % are
coded at the three tiers, in 0.1, 0.25 and 0.55 bit a value. The spectrum between is the one that meets these six numbers; what was met is printed.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from kvstore.artifact import Stored
from kvstore.calibration import registry
from kvstore.calibration.record import CLASSES, Calibration, CalibrationRecord
from kvstore.codecs.base import Header
from kvstore.codecs.table_data import BASE, THIRDS
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.transform_units import Set, Unit
from kvstore.digest import sha256
from kvstore.identity import Context, make_model, segment_key
from kvstore.manifest import FORMAT, CodecSpec, Encoding, Layout, Tier
from kvstore.pack import Pack
from kvstore.pack_writer import PackWriter
from kvstore.records import create
from kvstore.storage.local import LocalStorage
from kvstore.transforms.klt import Basis

TIERS = ("draft", "standard", "fine")
SHARES, BITS = (0.10, 0.17, 0.30), (0.10, 0.25, 0.55)
LEAST, STEP = 12, 0.25
TOP = 70  # class of the largest coefficients: standard deviation of 550 steps
DISTINCT = 16  # blocks of a group that differ; longer documents repeat them

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """A model's shape; `dim` values of a token are transformed together."""

    name: str
    kind: str
    config: dict[str, Any]
    dim: int = 8192
    block: int = 512


def _config(
    hidden: int, inner: int, layers: int, heads: int, kv: int, width: int, vocabulary: int, rope: dict[str, Any], **more: Any
) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": width,
            "num_key_value_heads": kv, "vocab_size": vocabulary, "max_position_embeddings": 131072, "rope_parameters": rope, **more}  # fmt: skip


PLAIN = {"rope_type": "default", "rope_theta": 1e6}
GEOMETRIES = (
    Geometry("Llama-3.1-8B", "llama", _config(4096, 14336, 32, 32, 8, 128, 128256, LLAMA3)),
    Geometry("Qwen2.5-7B", "qwen2", _config(3584, 18944, 28, 28, 4, 128, 152064, PLAIN)),
    Geometry("1B (Llama-3.2)", "llama", _config(2048, 8192, 16, 32, 8, 64, 128256, LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True)),
)
TINY = (Geometry("tiny", "llama", _config(64, 96, 2, 4, 1, 16, 160, PLAIN), dim=32, block=8),)


def model_of(geometry: Geometry, device: torch.device) -> Any:
    """With random weights, in bfloat16 (float32 on the CPU)."""
    config = transformers.AutoConfig.for_model(geometry.kind, **geometry.config)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.eval()


def entropy(scale_class: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Bits of a normal variable of so many steps, rounded: standard deviation 3 ** ((class - 24) / 8)."""
    deviation = 3.0 ** ((np.asarray(scale_class, np.float64)[:, None] - 24) / 8)
    edges = np.arange(-2000, 2001) - 0.5
    from_below = np.array(torch.special.ndtr(torch.from_numpy(edges / deviation)))
    p = np.diff(from_below, axis=1)
    return -(p * np.log2(np.maximum(p, 1e-30))).sum(axis=1)


def spectrum(dim: int) -> npt.NDArray[np.uint8]:
    """uint8 [rank] descending: classes at the finest tier, so that the shares are coded and cost the bits, as nearly as one may have both."""
    counts = [round(share * dim) for share in SHARES]
    classes = np.empty(0)
    for tier, (count, bits) in enumerate(zip(counts, BITS, strict=True)):
        low, span = LEAST + 8 * (2 - tier), 8.0 if tier else 80.0
        x = np.linspace(0, 1, count - len(classes), endpoint=False)
        best = min(np.geomspace(0.1, 20, 120), key=lambda q: abs(_bits(np.append(classes, low + span * (1 - x) ** q), tier) - bits * dim))
        classes = np.minimum(np.append(classes, low + span * (1 - x) ** best), TOP)
    return np.rint(classes).astype(np.uint8)


def _bits(classes: npt.NDArray[np.float64], tier: int) -> float:
    at = np.clip(np.rint(classes).astype(np.int64) - 8 * (2 - tier), 0, TOP)
    known = entropy(np.arange(TOP + 1))
    return float(known[at].sum())


def calibration_of(geometry: Geometry, layout: Layout, seed: int = 0) -> Calibration:
    """Random rows of about unit length, the classes of `spectrum`; nobody's values, but all sizes are right."""
    per = max(1, geometry.dim // (2 * layout.channels))
    sizes = [min(per, layout.layers - first) for first in range(0, layout.layers, per)]
    made = {size: _basis(2 * size * layout.channels, layout.channels, seed) for size in set(sizes)}
    weights = np.zeros((CLASSES, 128), np.uint16)
    for number, row in enumerate(BASE):
        weights[number, : len(row)] = row
    classes = {size: spectrum(2 * size * layout.channels) for size in made}
    record = CalibrationRecord(
        FORMAT, "calibration", "0" * 64, layout.layers, layout.kv_heads, layout.head_dim, "identity", per, 3, STEP, LEAST, (0.1, 0.1, 0.04), 1e9,
        (1.0,) * len(sizes), tuple(len(classes[size]) for size in sizes), 1, seed, (0.0,) * 3, (), {}, {},
    )  # fmt: skip
    name = sha256(f"{geometry.name} {seed}".encode())  # not of its content: nothing is read from disk
    bases = tuple(dataclasses.replace(made[size]) for size in sizes)
    found = Calibration(name, record, bases, tuple(classes[size] for size in sizes), weights, np.array(THIRDS, np.uint16))
    registry.add(found)
    return found


def _basis(dim: int, channels: int, seed: int) -> Basis:
    chance, rank, blocks = np.random.default_rng((seed, dim)), len(spectrum(dim)), dim // channels
    rows = (chance.standard_normal((rank, dim), np.float32) / np.float32(dim**0.5)).astype(np.float16)
    metric = np.broadcast_to(np.eye(channels, dtype=np.float16), (blocks, channels, channels))
    return Basis(np.zeros(dim, np.float32), rows, np.ones(rank, np.float32), metric, np.ones(blocks, np.float32))


def encoding_of(calibration: Calibration, block: int) -> Encoding:
    tiers = tuple(Tier(name, f"t{level}", "transform", level, TIERS[:level], False) for level, name in enumerate(TIERS))
    return Encoding((CodecSpec("transform", 1, {}, calibration.digest),), tiers, block, calibration.record.group_layers)


def store_of(folder: Path, layout: Layout, calibration: Calibration, lengths: list[int], block: int, threads: int) -> list[Stored]:
    """Documents of so many tokens, in one pack."""
    create(folder)
    encoding, storage = encoding_of(calibration, block), LocalStorage(folder)
    identity = make_model("random weights", weights="0" * 64, config={}, dtype=layout.dtype)
    writer = PackWriter(storage, identity.key, layout, encoding, {})
    maker = _Maker(TransformCodec({}, calibration), layout, block)
    with ThreadPoolExecutor(threads) as pool:
        for number, tokens in enumerate(lengths):
            ids, context = tuple(range(number, number + tokens)), Context.anchor((1,))
            writer.add(segment_key(identity, layout, context, ids), context, ids, maker.units(tokens, encoding, pool))
    pack = Pack(storage, writer.close() or "")
    return [Stored(pack, pack.segment(row)) for row in range(len(lengths))]


class _Maker:
    """Units of drawn levels; the first `DISTINCT` blocks of a group are made once."""

    def __init__(self, codec: TransformCodec, layout: Layout, block: int):
        self.codec, self.layout, self.block = codec, layout, block
        self._made: dict[tuple[int, int, int], list[bytes]] = {}

    def units(self, tokens: int, encoding: Encoding, pool: ThreadPoolExecutor) -> dict[str, list[list[bytes]]]:
        sizes = [min(self.block, tokens - start) for start in range(0, tokens, self.block)]
        wanted = [[(group, number % DISTINCT, size) for number, size in enumerate(sizes)] for group in range(len(self.codec.ladders))]
        fresh = sorted({key for group in wanted for key in group} - self._made.keys())
        self._made |= dict(zip(fresh, pool.map(self._unit, fresh), strict=True))
        return {t.array: [[self._made[key][t.level] for key in group] for group in wanted] for t in encoding.tiers}

    def _unit(self, key: tuple[int, int, int]) -> list[bytes]:
        group, _, tokens = key
        deviations = 3.0 ** ((self.codec.ladders[group].classes - 24) / 8)
        drawn = np.random.default_rng(key).standard_normal((len(deviations), tokens), np.float32) * deviations[:, None].astype(np.float32)
        levels, layers = np.rint(drawn).astype(np.int16), len(self.codec.calibration.group_layers(group))
        raw = np.empty((layers, 2, 0, self.layout.channels), np.uint32 if self.layout.dtype == "float32" else np.uint16)
        unit = Unit(group, np.zeros(tokens, np.int8), [Set(0, np.arange(tokens), levels)], raw, self.layout.dtype)
        return self.codec.records(Header(tokens, layers, 0, self.layout.channels), unit)
