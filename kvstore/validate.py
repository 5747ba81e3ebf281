"""What a pack's manifest and rows must satisfy before anything is allocated or any path is formed from them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.codecs import CALIBRATED, NAMES
from kvstore.errors import FormatError, IntegrityError
from kvstore.manifest import CodecSpec, Encoding, Layout, PackManifest, RopeRecord
from kvstore.pack_files import STATE, arrays_of, expected_files, shard_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_RESERVED = {"tokens", "segments"}
_LIMITS = {"layers": 1 << 14, "kv_heads": 1 << 14, "head_dim": 1 << 16}
MAX_BLOCK = 1 << 12  # as codecs/base.py
MAX_CHANNELS = 1 << 20
MAX_SLOTS = 1 << 40
MAX_STATE = 1 << 36


def require_manifest(manifest: PackManifest, where: str) -> None:
    """Raises FormatError naming the first thing that no pack of this version can say."""
    problem = (_layout_problem(manifest.layout) or _encoding_problem(manifest.encoding) or _array_problem(manifest)
               or _counts_problem(manifest) or _files_problem(manifest))  # fmt: skip
    if problem:
        raise FormatError(f"{where}: {problem}", remedy="it was not written by kvstore: `kvstore gc --drop-damaged` removes it")


def _layout_problem(layout: Layout) -> str | None:
    for name, most in _LIMITS.items():
        if not 1 <= getattr(layout, name) <= most:
            return f"layout.{name} is {getattr(layout, name)}"
    if layout.channels > MAX_CHANNELS:
        return f"layout has {layout.channels} channels"
    if len(layout.rope_of) != layout.layers:
        return f"layout.rope_of names {len(layout.rope_of)} layers of {layout.layers}"
    if any(r is not None and not 0 <= r < len(layout.ropes) for r in layout.rope_of):
        return "layout.rope_of names a RoPE record that is not there"
    if problem := _state_problem(layout):
        return problem
    if layout.latent is not None and (layout.kv_heads != 1 or sum(layout.latent) != 2 * layout.head_dim):
        return f"layout.latent is {layout.latent}, of {layout.kv_heads} heads of {layout.head_dim} channels"
    if (layout.rope_regime == "static") != (layout.rope_limit is None):
        return f"layout.rope_regime is {layout.rope_regime!r} with rope_limit {layout.rope_limit}"
    return next((p for p in (_rope_problem(r, layout.widths[layout.turned]) for r in layout.ropes) if p), None)


def _state_problem(layout: Layout) -> str | None:
    """The bytes on disk follow the order of the list, so there must be only one."""
    places = [(t.layer, t.name) for t in layout.state]
    if any(after <= before for before, after in pairwise(places)):
        return "layout.state is not in the order of layers and names"
    return f"layout.state takes {layout.state_nbytes} bytes" if layout.state_nbytes > MAX_STATE else None


def _rope_problem(rope: RopeRecord, head_dim: int) -> str | None:
    if not (0 <= rope.start and 2 <= rope.dim and rope.dim % 2 == 0 and rope.start + rope.dim <= head_dim):
        return f"RoPE turns channels {rope.start} to {rope.start + rope.dim} of {head_dim}"
    if not re.fullmatch(r"[0-9a-f]*", rope.inv_freq) or len(rope.inv_freq) != rope.dim * 4:
        return f"RoPE needs {rope.dim // 2} frequencies"
    finite = np.isfinite(rope.frequencies()).all() and np.isfinite(rope.scaling)
    return None if finite else "RoPE has a frequency or scaling that is not finite"


def _encoding_problem(encoding: Encoding) -> str | None:
    if not 1 <= encoding.block_tokens <= MAX_BLOCK:
        return f"encoding.block_tokens is {encoding.block_tokens}"
    if not 1 <= encoding.group_layers <= _LIMITS["layers"]:
        return f"encoding.group_layers is {encoding.group_layers}"
    for kind, names in (("tier", [t.name for t in encoding.tiers]), ("tier array", [t.array for t in encoding.tiers]),
                        ("codec", [c.name for c in encoding.codecs])):  # fmt: skip
        if not names or len(set(names)) != len(names):
            return f"encoding has no {kind}, or one twice"
    problems = (*map(_codec_problem, encoding.codecs), *(_tier_problem(encoding, i) for i in range(len(encoding.tiers))))
    return next((p for p in problems if p), None)


def _codec_problem(spec: CodecSpec) -> str | None:
    """Whether an unknown codec needs a calibration is for the version to say that knows it."""
    if spec.calibration is None:
        return f"codec {spec.name} names no calibration" if spec.name in CALIBRATED else None
    return f"codec {spec.name} names a calibration, but has none" if spec.name in NAMES and spec.name not in CALIBRATED else None


def _tier_problem(encoding: Encoding, at: int) -> str | None:
    tier, below = encoding.tiers[at], {t.name for t in encoding.tiers[:at]}
    if not _NAME.fullmatch(tier.array) or tier.array in _RESERVED:
        return f"tier array {tier.array!r} is no folder of a pack"
    if not set(tier.requires) <= below:
        return f"tier {tier.name!r} requires what is not below it"
    if tier.codec not in {c.name for c in encoding.codecs}:
        return f"tier {tier.name!r} names the codec {tier.codec!r}, which is not listed"
    return None if 0 <= tier.level < 256 else f"tier {tier.name!r} has level {tier.level}"


def _array_problem(manifest: PackManifest) -> str | None:
    """The name is taken only where there is a state: tiers of older packs may have it."""
    clash = manifest.layout.state and any(t.array == STATE for t in manifest.encoding.tiers)
    return f"tier array {STATE!r} is that of the recurrent states" if clash else None


def _counts_problem(manifest: PackManifest) -> str | None:
    block = manifest.encoding.block_tokens
    if manifest.encoding_id != manifest.encoding.id:
        return "encoding_id does not follow from encoding"
    if not 0 < manifest.slots <= MAX_SLOTS or manifest.slots % block:
        return f"slots is {manifest.slots} in blocks of {block}"
    return None if 0 < manifest.segments <= manifest.slots // block else f"segments is {manifest.segments}"


def _files_problem(manifest: PackManifest) -> str | None:
    expected = expected_files(manifest.encoding, manifest.layout)
    if manifest.files.keys() != expected.keys():
        return f"files are not those of its tiers: {min(manifest.files.keys() ^ expected.keys())!r}"
    for name, hashed in expected.items():
        entry = manifest.files[name]
        if not 0 < entry.bytes < 1 << 62 or (entry.sha256 is not None) is not hashed:
            return f"the entry of {name} in files is not valid"
    groups = -(-manifest.layout.layers // manifest.encoding.group_layers)
    index = groups * (manifest.slots // manifest.encoding.block_tokens) * 16 + 4
    short = (t.array for t in manifest.encoding.tiers if manifest.files[shard_name(t.array)].bytes < index)
    return next((f"the shard of {a} is too short for {manifest.slots} slots" for a in short), None) or _state_file_problem(manifest)


def _state_file_problem(manifest: PackManifest) -> str | None:
    """The units' sizes are known: each is as long as the state and its crc32c, and the index follows."""
    if not manifest.layout.state:
        return None
    found, wanted = manifest.files[shard_name(STATE)].bytes, manifest.segments * (manifest.layout.state_nbytes + 4 + 16) + 4
    return None if found == wanted else f"the shard of {STATE} has {found} bytes, {manifest.segments} segments take {wanted}"


def require_rows(rows: npt.NDArray[np.void], manifest: PackManifest, where: str) -> None:
    """Raises IntegrityError unless every segment lies in the pack, in its files, and beside the others."""
    block, slots = manifest.encoding.block_tokens, manifest.slots
    start, tokens = rows["start"], rows["tokens"].astype("u8")
    problem = None
    if (rows["context"] > 2).any() or (tokens == 0).any():
        problem = "a segment has an unknown context or no token"
    elif (start % block).any() or (start > slots).any() or (tokens > slots - np.minimum(start, slots)).any():
        problem = "a segment lies outside the token axis"
    elif _overlap(start, -(-tokens.astype("i8") // block) * block):
        problem = "two segments share tokens"
    else:
        problem = _range_problem(rows, manifest)
    if problem:
        raise IntegrityError(f"{where}: {problem}", remedy="`kvstore gc --drop-damaged` takes it out, and the next build compiles it again")


def _range_problem(rows: npt.NDArray[np.void], manifest: PackManifest) -> str | None:
    for array in arrays_of(manifest.encoding, manifest.layout):
        offset, size = rows[f"{array}.offset"], rows[f"{array}.nbytes"]
        most = np.uint64(manifest.files[shard_name(array)].bytes)
        if (offset > most).any() or (size > most - np.minimum(offset, most)).any():
            return f"a segment lies outside the file of {array}"
        if _overlap(offset, size):
            return f"two segments share bytes of {array}"
    if manifest.layout.state and (rows[f"{STATE}.nbytes"] != manifest.layout.state_nbytes + 4).any():
        return "a segment's recurrent state has not the size that the layout says"
    return None


def _overlap(start: npt.NDArray[Any], size: npt.NDArray[Any]) -> bool:
    order = np.argsort(start, kind="stable")
    begin, end = start[order].astype("i8"), (start[order].astype("i8") + size[order].astype("i8"))
    return bool((begin[1:] < end[:-1]).any())
