"""Stored KV back into tensors: one document as a prefix to generate from, or alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from kvstore.artifact import Artifact
from kvstore.compose import Composer
from kvstore.decode import KV, Decoder, Piece, allocate
from kvstore.errors import InputError
from kvstore.families.states import require_no_state
from kvstore.prompt import Prompt
from kvstore.quality import Quality
from kvstore.receipt import Receipt

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(frozen=True)
class Prefix:
    """A cache of the head and one document. `prompt(query)` puts a question after it, over the same tensors."""

    base: Prompt
    composer: Composer

    @property
    def cache(self) -> Cache:
        """A fresh DynamicCache at each access."""
        return self.base.cache

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [1, tokens]: the ids that the cache stands for."""
        return self.base.input_ids

    @property
    def receipt(self) -> Receipt:
        return self.base.receipt

    def prompt(self, query: str) -> Prompt:
        """This prefix and a question. Raises InputError for an empty one."""
        if not query.strip():
            raise InputError("a prompt needs a query")
        tail = torch.tensor([self.composer.view.renderer.query(query)], device=self.input_ids.device)
        self.composer.dialogue.require_room(self.input_ids.shape[1] + tail.shape[1])
        ids = torch.cat([self.input_ids, tail], dim=1)
        return replace(self.base, input_ids=ids, receipt=msgspec.structs.replace(self.receipt, prompt_tokens=ids.shape[1]))


def load(composer: Composer, source: str, quality: Quality) -> Prefix:
    """Raises NotFoundError, InputError for a document of several passages, IntegrityError for damaged bytes."""
    blocks = composer.view.blocks(source)
    if len(blocks) > 1:
        raise InputError(f"{source!r} is stored in {len(blocks)} passages", remedy=f"name one: {blocks[0].label!r} ... {blocks[-1].label!r}")
    return Prefix(composer.prefix(blocks[0], quality), composer)


def read(artifact: Artifact, name: str, quality: Quality, decoder: Decoder, position: int, device: str) -> tuple[list[int], list[KV], dict[str, Any]]:
    """One document's own KV at `position`, all its passages one after another. `name` is what the receipt calls it.

    Raises IncompatibleError for models with a recurrent state: what a document leaves of it holds after its prefix alone.
    """
    require_no_state(artifact.layout, f"{name} without what stood before it", "load() it with a model: that gives the cache of the whole prefix")
    started = time.perf_counter()
    tiers = quality.choose(artifact.stored, artifact.store.quality)
    layers = allocate(artifact.layout, artifact.tokens, device)
    at = 0
    for stored in artifact.stored:
        decoder.decode(Piece(stored, tiers[artifact.row.encoding], stored.segment.tokens, at, position + at), layers)
        at += stored.segment.tokens
    tier = tiers[artifact.row.encoding]
    receipt = {
        "source": name,
        "snapshot": artifact.store.number,
        "model": artifact.row.model,
        "template": artifact.row.template,
        "encoding": artifact.row.encoding,
        "tier": tier,
        "kl": artifact.quality[tier],
        "position": position,
        "tokens": artifact.tokens,
        "nbytes": artifact.nbytes(tier),
        "milliseconds": (time.perf_counter() - started) * 1e3,
    }
    return artifact.token_ids, layers, receipt
