"""What the stored tiers lose: a sample of a build's documents is encoded up to a split, and the model reads on after it, live and stored.

Documents that the codec was calibrated on never score. Parents are decoded at the same tier, as a load would.
"""

from __future__ import annotations

import heapq
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from kvstore.artifact import Stored
from kvstore.calibration import registry
from kvstore.certificates import ArtifactScore, QualityReport, TierScore, add_report, make_report
from kvstore.decode import Decoder, Piece, allocate
from kvstore.encode import Encoder, bits_of
from kvstore.errors import InputError, KvstoreError
from kvstore.families.assemble import dynamic_cache, share
from kvstore.families.capture import prefill
from kvstore.families.masking import masking
from kvstore.families.states import States, state_bytes, take_states
from kvstore.identity import Context, artifact_id, segment_key
from kvstore.manifest import Encoding, Layout, Model, Tier
from kvstore.pack import PACKS, Pack
from kvstore.pack_writer import PackWriter
from kvstore.plan import Planned, Task
from kvstore.prefill import Chain, Prefiller
from kvstore.scoring import Scores, compare, logits_after
from kvstore.storage.local import LocalStorage
from kvstore.store import Store
from kvstore.viewing import Assign, nobody
from kvstore.wording import count

CertifyRule = Literal["none", "sample", "all"]
DOCUMENTS = 8
SCORED = range(16, 257)  # tokens read on after the split
LEAST = 32  # tokens of a segment that can be scored
_BATCH = 8  # segments whose live logits are held at a time
log = logging.getLogger("kvstore")


@dataclass(frozen=True)
class Sampled:
    """A segment to score, of a document with this source and text digest."""

    source: str
    document: str
    task: Task

    @property
    def split(self) -> int:
        """Tokens that are encoded: two thirds, less where too few would be left to score."""
        return min(2 * len(self.task.ids) // 3, len(self.task.ids) - SCORED.start)

    @property
    def scored(self) -> tuple[int, ...]:
        return self.task.ids[self.split : self.split + SCORED.stop - 1]


@dataclass
class Certificate:
    """What came of it. `poor_fit`: sources whose KL is more than twice what this encoding usually has. `notes` are for people."""

    report: QualityReport | None = None
    poor_fit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Certifier:
    """Chooses documents while a build goes on, and scores them at its end."""

    def __init__(self, model: Model, layout: Layout, encoding: Encoding, rule: CertifyRule = "sample", documents: int = DOCUMENTS):
        if rule not in ("none", "sample", "all"):
            raise InputError(f"unknown rule {rule!r} for certifying", remedy="choose none, sample or all")
        if documents < 1:
            raise InputError(f"a sample of {documents} documents", remedy="give 1 or more, or --certify none")
        self.model, self.layout, self.encoding = model, layout, encoding
        self.lossy = lossy_part(encoding)
        self.limit = documents if rule == "sample" else None
        self.wanted = rule != "none" and self.lossy is not None
        self.calibrated = _texts(encoding) if self.wanted else set()
        self.chosen: list[tuple[int, int, list[Sampled]]] = []
        self.offered = self.left_out = self.short = 0

    def offer(self, planned: Planned) -> None:
        """A document that was compiled: kept if its text's digest is among the smallest, which is as good as chance and the same every time."""
        tasks = [t for t in planned.tasks if t.chain]
        if not self.wanted or not tasks:
            return
        self.offered += 1
        longest = max(tasks, key=lambda t: len(t.ids))
        if planned.row.text in self.calibrated:
            self.left_out += 1
        elif len(longest.ids) < LEAST:
            self.short += 1
        else:
            sampled = [Sampled(planned.row.source, planned.row.text, t) for t in tasks if t.ids == longest.ids]  # one a regime
            heapq.heappush(self.chosen, (-int(planned.row.text, 16), self.offered, sampled))
            if self.limit is not None and len(self.chosen) > self.limit:
                heapq.heappop(self.chosen)

    def finish(
        self, store: Store, prefiller: Prefiller, provenance: dict[str, str], pool: ThreadPoolExecutor | None = None, assign: Assign = nobody
    ) -> Certificate:
        """Score what was chosen and keep the report in the store. `assign` is the policy that the build encoded with."""
        found = Certificate()
        if self.lossy is None or not self.offered:
            return found
        sampled = [s for *_, ss in sorted(self.chosen, key=lambda c: c[1]) for s in ss]
        if not sampled:
            found.notes += [self._nothing()]
            return found
        usual = self._usual(store)
        scored = list(_Scorer(self.model, prefiller, self.lossy, pool, assign).run(sampled))
        broken = [s.source for s, _, scores in scored if not all(x.finite for x in scores.values())]
        if broken:
            found.notes.append(f"no quality report: the model's output after the stored values of {', '.join(broken)} is not finite")
        else:  # a report of the others would promise what these do not keep
            found.report = self._report(scored, provenance)
            add_report(store.storage, found.report)
            self._compare(found, usual, scored)
        for note in found.notes:
            log.warning("%s", note)
        return found

    def _nothing(self) -> str:
        why = [f"{self.left_out} calibrated the codec"] * bool(self.left_out) + [f"{self.short} shorter than {LEAST} tokens"] * bool(self.short)
        found = f"no quality report: nothing to score in {count(self.offered, 'new document')} ({', '.join(why)})"
        return f"{found}; more documents give one, until then max_kl needs --lossless"

    def _report(self, scored: Sequence[tuple[Sampled, float, Mapping[str, Scores]]], provenance: dict[str, str]) -> QualityReport:
        artifacts = [
            ArtifactScore(
                artifact_id(s.task.key, self.encoding.id), s.document, len(s.scored), noise, tuple(tier_score(t, x) for t, x in scores.items())
            )
            for s, noise, scores in scored
        ]
        p99 = {t.name: percentile(np.concatenate([scores[t.name].kl for *_, scores in scored])) for t in self._tiers}
        return make_report(self.model.key, self.encoding.id, artifacts, p99, provenance)

    @property
    def _tiers(self) -> tuple[Tier, ...]:
        return self.lossy.tiers if self.lossy is not None else ()

    def _usual(self, store: Store) -> float | None:
        """Mean KL at the finest lossy tier so far: of the stored reports, else of the calibration text."""
        finest = self._tiers[-1]
        try:
            known = store.quality(self.encoding.id, self.model.key).tiers.get(finest.name)
        except KvstoreError as error:
            log.warning("%s", error)
            return None
        if known is not None:
            return known.kl
        calibration = self.encoding.codec(finest.codec).calibration
        measured = () if calibration is None else registry.find(calibration).record.kl
        return measured[finest.level] if finest.level < len(measured) else None

    def _compare(self, found: Certificate, usual: float | None, scored: Sequence[tuple[Sampled, float, Mapping[str, Scores]]]) -> None:
        """Name the documents that fit badly; what other pieces of the same prefill differ by is no loss."""
        finest = self._tiers[-1].name
        if usual is None:
            return
        bad = [s.source for s, noise, scores in scored if scores[finest].kl.mean() > 2 * max(usual, noise)]
        found.poor_fit = list(dict.fromkeys(bad))
        if bad:
            named = ", ".join(found.poor_fit[:8]) + (" ..." if len(found.poor_fit) > 8 else "")
            remedy = "--recalibrate learns from these documents, --lossless stores every bit" if self.calibrated else "--lossless stores every bit"
            found.notes.append(f"{named}: KL at {finest} is more than twice the usual {usual:.2g}, the encoding fits badly; {remedy}")


def _texts(encoding: Encoding) -> set[str]:
    """Digests of the documents that its codecs were calibrated on."""
    return {text for c in encoding.codecs if c.calibration is not None for text in registry.find(c.calibration).record.texts}


def lossy_part(encoding: Encoding) -> Encoding | None:
    """The encoding without its exact tiers, which lose nothing; None where all are."""
    tiers = tuple(t for t in encoding.tiers if not t.exact)
    used = {t.codec for t in tiers}
    return msgspec.structs.replace(encoding, tiers=tiers, codecs=tuple(c for c in encoding.codecs if c.name in used)) if tiers else None


def tier_score(tier: str, scores: Scores) -> TierScore:
    return TierScore(tier, float(scores.kl.mean()), percentile(scores.kl), float(scores.kl.max()), scores.agreement, scores.change)


def percentile(kl: npt.NDArray[np.float64]) -> float:
    return float(np.percentile(kl, 99))


@dataclass(frozen=True)
class _Live:
    """What the model computed itself, for one segment: where it lies in the scratch pack, its logits, the noise floor, its recurrent states."""

    sampled: Sampled
    row: int
    logits: torch.Tensor
    noise: float
    states: States


class _Scorer:
    """Scores segments in batches: each batch is a pack of its own in a scratch folder, read through the door that loads use."""

    def __init__(self, model: Model, prefiller: Prefiller, encoding: Encoding, pool: ThreadPoolExecutor | None, assign: Assign = nobody):
        self.key, self.prefiller, self.layout, self.assign = model, prefiller, prefiller.layout, assign
        self.encoder, self.decoder = Encoder(encoding, self.layout, pool), Decoder()

    def run(self, sampled: Sequence[Sampled]) -> Iterator[tuple[Sampled, float, dict[str, Scores]]]:
        """Per segment the noise floor and, by tier, the scores."""
        for at in range(0, len(sampled), _BATCH):
            with tempfile.TemporaryDirectory(prefix="kvstore-certify-") as folder:
                yield from self._batch(sampled[at : at + _BATCH], LocalStorage(Path(folder)))

    def _batch(self, batch: Sequence[Sampled], storage: LocalStorage) -> Iterator[tuple[Sampled, float, dict[str, Scores]]]:
        writer = PackWriter(storage, self.key.key, self.layout, self.encoder.encoding, {})
        parents = {chain: self._add_parent(chain[-1], writer) for chain in dict.fromkeys(s.task.chain for s in batch) if chain[-1]}
        lives = [self._add(s, writer) for s in batch]
        storage.path(PACKS).mkdir()
        pack = Pack(storage, writer.close() or "")
        for live in lives:
            rows = [r for r in (parents.get(live.sampled.task.chain), live.row) if r is not None]
            stored = [Stored(pack, pack.segment(r)) for r in rows]
            yield live.sampled, live.noise, {t.name: self._score(live, stored, t) for t in self.encoder.encoding.tiers}

    def _add_parent(self, ids: tuple[int, ...], writer: PackWriter) -> int:
        """The head (or anchor) as it is stored."""
        captured = self.prefiller.capture(ids, ())
        units, state = self.encoder.encode(bits_of(captured.layers)), state_bytes(self.layout, captured.states)
        writer.add(segment_key(self.key, self.layout, Context.root(), ids), Context.root(), ids, units, state=state)
        return len(writer.rows) - 1

    def _add(self, sampled: Sampled, writer: PackWriter) -> _Live:
        """Prefill and encode a segment up to its split, and let the live model read on."""
        model, task = self.prefiller.model, sampled.task
        ids = task.ids[: sampled.split]
        before = self._context(task.chain)
        values, cache = prefill(model, self.layout, ids, before)
        states = take_states(cache) if self.layout.state else ()
        units = self.encoder.encode(bits_of(values), self.assign(ids, task.chain))
        key = segment_key(self.key, self.layout, task.context, ids)
        writer.add(key, task.context, ids, units, state=state_bytes(self.layout, states))
        logits, half = logits_after(model, cache, sampled.scored), sampled.split // 2
        other = prefill(model, self.layout, ids[half:], prefill(model, self.layout, ids[:half], before)[1])[1]
        noise = compare(logits, logits_after(model, other, sampled.scored), sampled.scored[1:])
        return _Live(sampled, len(writer.rows) - 1, logits, float(noise.kl.mean()), states)

    def _context(self, chain: Chain) -> Any:
        cache = self.prefiller.context(chain) if chain[-1] else None
        return None if cache is None else share(cache)

    def _score(self, live: _Live, stored: Sequence[Stored], tier: Tier) -> Scores:
        model, scored = self.prefiller.model, live.sampled.scored
        layers, at = allocate(self.layout, sum(s.segment.tokens for s in stored), model.device), 0
        for s in stored:
            self.decoder.decode(Piece(s, tier.name, s.segment.tokens, at, at), layers, masked=True)
            at += s.segment.tokens
        with masking(model) if any(s.drops(tier.name) for s in stored) else nullcontext():
            found = logits_after(model, dynamic_cache(model.config, layers, live.states), scored)
        return compare(live.logits, found, scored[1:])
