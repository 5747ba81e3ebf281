"""What reading a golden store must give, as `expected.json` holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.artifact import tier_chain
from kvstore.codecs import codec_of
from kvstore.digest import sha256
from kvstore.identity import id_bytes
from kvstore.pack import Pack, Segment
from kvstore.store import Store
from tests.golden.values import Bits

SAMPLE = 397  # of a lossy tier every so manieth value is kept


def decoded(pack: Pack, segment: Segment, tier: str) -> Bits:
    """[layers, 2, tokens, channels]: float32, or bit patterns for an exact tier."""
    encoding, layout = pack.encoding, pack.layout
    tiers = tier_chain(encoding, tier)
    spec = encoding.codec(tiers[-1].codec)
    codec = codec_of(spec, encoding, layout)
    dtype = np.dtype(np.float32 if not tiers[-1].exact else np.uint32 if layout.dtype == "float32" else np.uint16)
    out = np.empty((layout.layers, 2, segment.tokens, layout.channels), dtype)
    units = [pack.units(segment, t.array) for t in tiers]
    for g in range(pack.groups):
        for b in range(len(units[0][g])):
            start, layers = b * encoding.block_tokens, pack.group_layers(g)
            codec.decode([u[g][b] for u in units], out[layers.start : layers.stop, :, start : start + encoding.block_tokens])
    return out


def expected(path: Path, packs: Mapping[str, str]) -> dict[str, Any]:
    """Batch by batch (`packs`: their names to packs) and segment by segment."""
    store = Store(path)
    found: dict[str, Any] = {"template": store.templates()[0].id, "models": sorted(r.model.key for r in store.models()), "packs": {}}
    for name, folder in packs.items():
        pack = Pack(store.storage, folder)
        segments = [_expected_segment(pack, pack.segment(row)) for row in range(pack.manifest.segments)]
        found["packs"][name] = {"pack": pack.name, "encoding": pack.encoding.id, "dtype": pack.layout.dtype, "segments": segments}
    return found


def _expected_segment(pack: Pack, segment: Segment) -> dict[str, Any]:
    values = {t.name: decoded(pack, segment, t.name) for t in pack.encoding.tiers}
    exact = {t.name: sha256(values[t.name].astype(values[t.name].dtype.newbyteorder("<")).tobytes()) for t in pack.encoding.tiers if t.exact}
    lossy = {t.name: sampled(values[t.name]) for t in pack.encoding.tiers if not t.exact}
    return {"key": segment.key, "parent": segment.parent, "context": segment.context, "position": segment.position, "tokens": segment.tokens,
            "ids_sha256": sha256(id_bytes(pack.ids(segment).tolist())), "ranges": {a: list(r) for a, r in segment.ranges.items()},
            "exact_sha256": exact, "lossy": lossy}  # fmt: skip


def sampled(values: Bits) -> list[float | None]:
    """None for NaN, which JSON has not."""
    return [None if np.isnan(v) else float(v) for v in values.reshape(-1)[::SAMPLE]]


def lines(found: dict[str, Any]) -> str:
    """JSON with one line a segment."""
    whole = json.dumps({**found, "packs": {n: {**p, "segments": "@"} for n, p in found["packs"].items()}}, indent=1, sort_keys=True)
    for _, pack in sorted(found["packs"].items()):
        whole = whole.replace('"@"', "[\n  " + ",\n  ".join(json.dumps(s, sort_keys=True) for s in pack["segments"]) + "]", 1)
    return whole + "\n"
