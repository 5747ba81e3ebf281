"""What `rate_quality.py` measures: its stages, and the methods of each family at the settings that make their curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from harness import Runner
from ours import Ours, Shelf, coarser, single_tier
from peers import cachegen, floats, huggingface, integers, kvtc, pca
from peers.base import Floats, Method
from texts import Ids, Texts

Kinds = tuple[str, ...]
MIXED, PROSE, TECHNICAL = ("prose", "facts"), ("prose",), ("technical",)
CORE = ("plain", "cachegen", "kvtc", "pca", "ours", "one layer")
MORE = ("plain more", "cachegen before RoPE", "pca together", "ablations", "seeds", "amounts")
CALIBRATED = ("kvtc", "ours", "one layer")
CALIBRATION_DOCUMENTS = 60


@dataclass(frozen=True)
class Stage:
    """Documents of one text and length, methods calibrated on texts. `text`: prose, technical or facts (with 12 questions a document)."""

    name: str
    text: str
    tokens: int
    documents: int
    families: tuple[str, ...]
    calibration: Kinds = MIXED
    second: bool = False


STAGES = (
    Stage("prose-512", "prose", 512, 48, CORE + MORE),
    Stage("facts-700", "facts", 700, 167, CORE),
    Stage("prose-192", "prose", 192, 48, CORE),
    Stage("prose-768", "prose", 768, 48, ("cachegen", *CALIBRATED)),
    Stage("prose-2000", "prose", 2000, 48, ("cachegen", *CALIBRATED)),
    Stage("technical-512", "technical", 512, 48, CORE, TECHNICAL),
    Stage("technical-512 by prose", "technical", 512, 48, CALIBRATED, PROSE),
    Stage("facts-700 by prose", "facts", 700, 84, ("kvtc", "ours"), PROSE),
    Stage("prose-512 by technical", "prose", 512, 48, CALIBRATED, TECHNICAL),
    Stage("second-prose-512", "prose", 512, 48, CORE, second=True),
    Stage("second-facts-700", "facts", 700, 167, CORE, second=True),
)


class Methods:
    """The methods of one model, calibrated on texts as asked."""

    def __init__(self, runner: Runner, texts: Texts, shelf: Shelf, documents: int):
        self.runner, self.texts, self.shelf, self.documents = runner, texts, shelf, documents
        self.geometry = runner.geometry

    def of(self, family: str, kinds: Kinds) -> Iterator[Method]:
        yield from getattr(self, "_" + family.replace(" ", "_"))(kinds)

    def _plain(self, kinds: Kinds) -> Iterator[Method]:
        g = self.geometry
        yield from (floats.Bfloat16(), floats.Float8(rotated=True), integers.Int8(g, rotated=True))
        yield from (integers.Kivi(bits, rotated=True) for bits in (4, 2))
        yield from (huggingface.QuantizedCache(g, bits, rotated=True) for bits in (4, 2))

    def _plain_more(self, kinds: Kinds) -> Iterator[Method]:
        yield from (integers.Kivi(bits, 64, rotated=True) for bits in (4, 2) if self.geometry.channels % 64 == 0)
        yield from (integers.Kivi(bits, residual=True, rotated=True) for bits in (4, 2))

    def _cachegen(self, kinds: Kinds, rotated: bool = True) -> Iterator[Method]:
        for factor in (0.5, 1.0, 2.0):
            bare = cachegen.CacheGen(self.geometry, factor, rotated=rotated)
            found = (cachegen.symbols_of(self.runner.turned(kv) if rotated else kv, bare.largest)[0] for kv in self._learnt(kinds))
            learnt = np.sum([cachegen.histogram(s, bare.bins) for s in found], 0)
            yield cachegen.CacheGen(self.geometry, factor, learnt, streams=rotated and factor == 1, rotated=rotated)

    def _cachegen_before_RoPE(self, kinds: Kinds) -> Iterator[Method]:  # noqa: N802  as the family is called
        yield from self._cachegen(kinds, rotated=False)

    def _kvtc(self, kinds: Kinds) -> Iterator[Method]:
        yield from (kvtc.Kvtc.at(self._trained(kinds), ratio) for ratio in (8, 16, 32))

    def _pca(self, kinds: Kinds, together: bool = False) -> Iterator[Method]:
        components = self._components(kinds, together)
        spread = float(np.sqrt(np.mean(np.concatenate([(s**2).mean(0) for s in components.samples]))))
        yield from (pca.Pca(components, round(spread * share, 4)) for share in (0.2, 0.4, 0.8, 1.6))

    def _pca_together(self, kinds: Kinds) -> Iterator[Method]:
        yield from self._pca(kinds, together=True)

    def _ours(self, kinds: Kinds) -> Iterator[Method]:
        yield from curve(self.shelf.calibration(self._sequences(kinds)), "ours", extra=True)

    def _one_layer(self, kinds: Kinds) -> Iterator[Method]:
        yield from curve(self.shelf.calibration(self._sequences(kinds), group_layers=1), "ours, one layer a group")

    def _ablations(self, kinds: Kinds) -> Iterator[Method]:
        made: dict[str, dict[str, Any]] = {
            "ours, metric identity": {"metric": "identity"},
            "ours, metric attention": {"metric": "attention"},
            "ours, K and V apart": {"apart": True},
        }
        for label, choices in made.items():
            yield from curve(self.shelf.calibration(self._sequences(kinds), **choices), label)

    def _seeds(self, kinds: Kinds) -> Iterator[Method]:
        for seed in range(1, 5):
            yield Ours(self.shelf.calibration(self._sequences(kinds, seed), seed=seed), f"ours, seed {seed}")

    def _amounts(self, kinds: Kinds) -> Iterator[Method]:
        """How much text is enough."""
        for documents in (8, 16, 30, 120):
            found = self.texts.calibration(kinds, documents)
            yield Ours(self.shelf.calibration(found), f"ours, {round(sum(map(len, found)), -3):,} tokens learnt from")

    def _sequences(self, kinds: Kinds, seed: int = 0) -> list[Ids]:
        return self.texts.calibration(kinds, self.documents, seed=seed)

    @cache  # noqa: B019  lives as long as the benchmark
    def _learnt(self, kinds: Kinds) -> list[Floats]:
        """Caches of the calibration documents, before RoPE."""
        by_length: dict[int, list[Ids]] = {}
        for ids in self._sequences(kinds):
            by_length.setdefault(len(ids), []).append(ids)
        return [kv for same in by_length.values() for kv in self.runner.prefill(same)]

    @cache  # noqa: B019
    def _components(self, kinds: Kinds, together: bool) -> pca.Components:
        return pca.fit(self._learnt(kinds), together)

    @cache  # noqa: B019
    def _trained(self, kinds: Kinds) -> kvtc.Trained:
        return kvtc.train(self._components(kinds, False))


def curve(calibration: Any, label: str, extra: bool = False) -> Sequence[Method]:
    """The calibration's tiers, those half way between them, and one a third of the finest step."""
    return (
        Ours(calibration, label, extra=extra),
        Ours(coarser(calibration, -4), label, "half a tier below ", extra),
        Ours(single_tier(coarser(calibration, -8), calibration.record.tiers - 1), label, "a tier below ", extra),
    )
