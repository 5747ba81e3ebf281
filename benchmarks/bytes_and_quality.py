"""Bytes a token and quality per codec and tier, every byte of the store counted, on a corpus of one's own.

    python benchmarks/bytes_and_quality.py [--corpus DIR] [--tokens 768] [--count 48]

Quality: KL divergence of the next-token distribution (nats a token) over the 256 tokens that follow each document in the corpus, live against
stored, mean over documents with a 95 % interval by document; share of equal most likely tokens. The noise floor is a live prefill in one
piece instead of head and document apart. Bytes: units (marginal), and the whole store's files divided by the tokens stored.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import kl, model_of, parser, show, text_of
from transformers import DynamicCache

import kvstore
from kvstore import Document

AHEAD = 256
CODECS = {"raw": {"codec": "raw"}, "lossless": {"codec": "lossless"}, "scalar": {"codec": "scalar"}, "transform": {"codec": "transform"}}


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tokens", type=int, default=768)
    p.add_argument("--count", type=int, default=48)
    args = p.parse_args()
    source = model_of(args)
    cut = cuts(text_of(args.corpus), source.tokenizer, args.tokens, args.count)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, options in CODECS.items():
            path = Path(folder) / name
            kvstore.build([d for d, _ in cut], path, source, **options)
            store = kvstore.open(path, source.model, source.tokenizer)
            for tier in store[cut[0][0].source].tiers:
                rows.append([name, tier, *sizes(store, tier, path), *quality(store, cut, tier)])
        rows.append(["noise floor", "live", *[""] * 4, *quality(store, cut, None)])
    header = ["codec", "tier", "bytes a token", "bits a value", "ratio to model dtype", "whole store a token", "KL", "95 % +-", "same top token"]
    setting = {"model": source.identity.name, "corpus": str(args.corpus or "pydoc topics"), "documents": len(cut), "tokens each": args.tokens}
    show("Bytes and quality", header, rows, "bytes_and_quality", setting)


def cuts(text: str, tokenizer: Any, tokens: int, count: int) -> list[tuple[Document, list[int]]]:
    """Documents and the ids that follow each, spread evenly over the text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = (len(ids) - tokens - AHEAD) // count
    starts = [i * step for i in range(count)]
    return [
        (Document(tokenizer.decode(ids[s : s + tokens]).strip(), f"{i:03d}.txt"), ids[s + tokens : s + tokens + AHEAD]) for i, s in enumerate(starts)
    ]


def sizes(store: kvstore.OpenStore, tier: str, path: Path) -> list[object]:
    stored = [s for row in store.rows() for s in store.artifacts(row)]
    stored = list({s.segment.key: s for s in stored}.values())
    tokens = sum(s.segment.tokens for s in stored)
    values, width = stored[0].pack.layout.values_per_token, {"float32": 4}.get(stored[0].pack.layout.dtype, 2)
    each = sum(s.nbytes(tier) for s in stored) / tokens
    whole = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / tokens
    return [each, each * 8 / values, values * width / each, whole]


def quality(store: kvstore.OpenStore, cut: list[tuple[Document, list[int]]], tier: str | None) -> list[object]:
    """Mean KL, half its 95 % interval, agreement; `tier` None compares a live prefill with one in a single piece."""
    means, agree = [], []
    for document, ahead in cut:
        live = continuation(store, document, ahead, whole=False)
        other = continuation(store, document, ahead, whole=True) if tier is None else from_store(store, document, ahead, tier)
        means.append(float(kl(live, other).mean()))
        agree.append(float((live.argmax(-1) == other.argmax(-1)).float().mean()))
    return [float(np.mean(means)), float(1.96 * np.std(means) / np.sqrt(len(means))), float(np.mean(agree))]


def continuation(store: kvstore.OpenStore, document: Document, ahead: list[int], whole: bool) -> torch.Tensor:
    renderer, cache = store.view.renderer, DynamicCache(config=store.model.config)
    parts = [list(renderer.head_ids), renderer.document(document.text)]
    for part in [parts[0] + parts[1]] if whole else parts:
        store.model(torch.tensor([part]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return store.model(torch.tensor([ahead]), past_key_values=cache, use_cache=True).logits[0]


def from_store(store: kvstore.OpenStore, document: Document, ahead: list[int], tier: str) -> torch.Tensor:
    return store.model(torch.tensor([ahead]), past_key_values=store.load(document.source, tier=tier).cache, use_cache=True).logits[0]


if __name__ == "__main__":
    main()
