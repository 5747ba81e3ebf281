"""Learning a calibration: sample, metric, statistics, bases, step, tables. A table of contents."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore.calibration.live import Live
from kvstore.calibration.metric import Measured, measure
from kvstore.calibration.record import Calibration, CalibrationRecord, Metric
from kvstore.calibration.sample import LEAST_TOKENS, Excerpt, Pool, from_corpus, from_model
from kvstore.calibration.solve import Metric16, Solved, solve, stored_metric, truncated
from kvstore.calibration.statistics import Grouping, Moments, Ordinary, default_group_layers, moments, ordinary
from kvstore.calibration.target import choose_step
from kvstore.calibration.trial import Trials, kept_order
from kvstore.errors import InputError
from kvstore.manifest import FORMAT
from kvstore.template import Renderer

PER_DIMENSION, LEAST = 16, 32768  # tokens: 16 per group dimension keep the small eigenvalues honest
HELD_TOKENS = 12288  # beside those learnt from, half as many at most
METRIC_TOKENS = 32768  # gradients of some 50,000 tokens a layer: enough for blocks of a thousand channels
FIRST_TOKENS = 4096  # of the sample that tells ordinary tokens from exempt ones
NO_SHRINK = (0.0,)  # values at the middle of their cells: the mean of the cell next to zero costs 4 to 8 % more bytes at equal divergence
SINKS = 4  # of a head's tokens every sequence gives these to the statistics, the rest is one document's
Progress = Callable[[str, float], None]
log = logging.getLogger("kvstore")


@dataclass(frozen=True)
class Choices:
    """What a user may choose; None means the default."""

    metric: Metric = "fisher"
    tokens: int | None = None
    tiers: int = 3
    target_kl: float | None = None
    target_ratio: float | None = None
    group_layers: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises InputError."""
        if self.metric not in ("fisher", "attention", "identity"):
            raise InputError(f"unknown metric {self.metric!r}", remedy="choose fisher, attention or identity")
        if self.tiers not in (1, 2, 3):
            raise InputError(f"{self.tiers} tiers", remedy="choose 1, 2 or 3")
        if self.target_kl is not None and self.target_ratio is not None:
            raise InputError("a target KL and a target ratio at once", remedy="give one of them")
        for name, value, least in (("target KL", self.target_kl, 0.0), ("target ratio", self.target_ratio, 1.0), ("number of tokens", self.tokens, 0),
                                   ("number of layers a group", self.group_layers, 0)):  # fmt: skip
            if value is not None and not least < value < float("inf"):
                raise InputError(f"a {name} of {value}", remedy=f"give more than {least:g}")


@dataclass
class Learned:
    """A calibration that is not stored yet, and what was found on the way. `bits`: ideal bits a value of the tiers up to each."""

    calibration: Calibration
    documents: int
    sampled: int
    exempt: float
    bits: tuple[float, ...]
    seconds: dict[str, float] = field(default_factory=dict)


class Learner:
    """One calibration of one model."""

    def __init__(self, live: Live, model_key: str, choices: Choices, provenance: dict[str, str], progress: Progress | None = None):
        choices.check()
        self.live, self.model_key, self.choices, self.provenance = live, model_key, choices, provenance
        self.progress = progress or (lambda stage, share: None)
        layout = live.layout
        size = min(layout.layers, choices.group_layers or default_group_layers(layout.layers, layout.channels))
        self.grouping = Grouping(layout.layers, size)
        self.seconds: dict[str, float] = {}

    @property
    def tokens(self) -> int:
        """To learn from, those held out not counted."""
        return self.choices.tokens or max(LEAST, self.usual_tokens)

    @property
    def usual_tokens(self) -> int:
        return PER_DIMENSION * self.grouping.size * 2 * self.live.layout.channels

    @property
    def held_tokens(self) -> int:
        return min(HELD_TOKENS, -(-self.tokens // 2))

    def learn(self, pool: Pool, renderer: Renderer, room: int) -> Learned:
        """`room`: tokens of a sequence at most."""
        with self._timed("sample"):
            sequences = self._sequences(pool, renderer, room)
            learning, held = _parted(sequences, self.held_tokens)
        with self._timed("metric"):
            shown = _thinned(learning, METRIC_TOKENS)
            measured = measure(self.choices.metric, self.live, shown, self.choices.seed, self._tick("metric", shown))
            metric = stored_metric(measured.blocks)
        with self._timed("statistics"):
            chosen = self._ordinary(learning, metric)
            sums = moments(self._values(learning), chosen)
        with self._timed("solve"):
            solved, tokens, exempt, energy = self._solve(sums, metric)
        with self._timed("target"):
            trials = Trials(self.live, self.grouping, solved, self.choices.tiers)
            trials.hold(held, chosen)
            step = choose_step(trials, self.choices.target_kl, self.choices.target_ratio)
        with self._timed("tables"):
            return self._finished(trials, step, measured, chosen.limit, energy, tokens, sequences, exempt)

    def _sequences(self, pool: Pool, renderer: Renderer, room: int) -> list[Excerpt]:
        self.progress("sample", 0.0)
        wanted = self.tokens + self.held_tokens
        found = from_corpus(pool, renderer, wanted, room)
        missing = wanted - sum(map(len, found))
        if missing > 0 and room >= LEAST_TOKENS + len(renderer.head_ids):
            found += from_model(self.live, found, renderer.head_ids, missing, room, self.choices.seed)
        if self.tokens < self.usual_tokens:
            log.warning("calibrating on %d tokens, fewer than %d a dimension: small variances will be underestimated", self.tokens, PER_DIMENSION)
        if len(found) < 2:
            raise InputError("no text to calibrate on", remedy="give documents, or a model with a longer context")
        random.Random(self.choices.seed).shuffle(found)  # they come stratum by stratum in turn: every n-th would be of one kind
        return found

    def _ordinary(self, sequences: Sequence[Excerpt], metric: Metric16) -> Ordinary:
        layout = self.live.layout
        x = torch.cat([self.live.values(s.ids) for s in _thinned(sequences, FIRST_TOKENS)])
        weights = metric.wide.diagonal(dim1=-2, dim2=-1).float().view(layout.layers, 2, layout.channels)
        return ordinary(x, self.grouping, weights)

    def _values(self, sequences: Sequence[Excerpt]) -> Iterator[torch.Tensor]:
        tick = self._tick("statistics", sequences)
        for number, sequence in enumerate(sequences):
            x = self.live.values(sequence.ids)
            counts = torch.ones(len(x), dtype=torch.bool)
            counts[SINKS if number else sequence.head : sequence.head] = False
            yield x[counts.to(x.device)]
            tick(len(sequence))

    def _solve(self, sums: list[Moments], metric: Metric16) -> tuple[list[Solved], int, int, tuple[float, ...]]:
        blocks, solved, energy = 2 * self.grouping.size, [], []
        tokens, exempt = min(m.tokens for m in sums), max(m.exempt for m in sums)
        diagonal = metric.wide.diagonal(dim1=-2, dim2=-1).flatten()
        for g in range(len(self.grouping)):
            self.progress("solve", g / len(self.grouping))
            one = sums[g]
            dims = slice(g * blocks * self.live.layout.channels, g * blocks * self.live.layout.channels + len(one.mean))
            energy.append(max(float((diagonal[dims] * one.covariance.diagonal()).sum()), 1e-30))
            solved.append(solve(one, metric, slice(g * blocks, (g + 1) * blocks)))
            sums[g] = None  # type: ignore[call-overload]  # a group's covariance of a large model takes half a gigabyte
        return solved, tokens, exempt, tuple(energy)

    def _finished(self, trials: Trials, step: float, measured: Measured, limit: float, energy: tuple[float, ...], tokens: int,
                  sequences: Sequence[Excerpt], exempt: int) -> Learned:  # fmt: skip
        self.progress("tables", 0.0)
        layout, choices = self.live.layout, self.choices
        done, classes = trials.fit(step, rounds=4)
        kl = tuple(trials.divergence(step, done, classes, tier) for tier in range(choices.tiers))
        orders = [kept_order(c, done.least) for c in classes]
        texts = tuple(sorted({s.text for s in sequences} - {""}))
        record = CalibrationRecord(
            FORMAT, "calibration", self.model_key, layout.layers, layout.kv_heads, layout.head_dim, measured.metric, self.grouping.size,
            choices.tiers, step, done.least, NO_SHRINK * choices.tiers, limit, energy, tuple(map(len, orders)), tokens, choices.seed, kl, texts,
            self.provenance, {},
        )  # fmt: skip
        bases = tuple(truncated(s.basis, order) for s, order in zip(trials.solved, orders, strict=True))
        coded = tuple(np.minimum(c[order], 255).astype(np.uint8) for c, order in zip(classes, orders, strict=True))
        calibration = Calibration("", record, bases, coded, done.weights, done.thirds)
        sampled = sum(len(s) for s in sequences if not s.text)
        bits = tuple(b / trials.values for b in done.ladder)
        return Learned(calibration, len(texts), sampled, exempt / max(1, tokens + exempt), bits, self.seconds)

    def _tick(self, stage: str, sequences: Sequence[Excerpt]) -> Callable[[int], None]:
        total, done = max(1, sum(map(len, sequences))), [0]

        def tick(tokens: int) -> None:
            done[0] += tokens
            self.progress(stage, done[0] / total)

        self.progress(stage, 0.0)
        return tick

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def _thinned(sequences: Sequence[Excerpt], tokens: int) -> Sequence[Excerpt]:
    """Every n-th, so that about so many tokens are left."""
    return sequences[:: max(1, round(sum(map(len, sequences)) / tokens))]


def _parted(sequences: Sequence[Excerpt], tokens: int) -> tuple[list[Excerpt], list[Excerpt]]:
    """Learnt from, and held out: evenly spread over the sample, about `tokens` of them, at most half."""
    total = sum(map(len, sequences))
    every = min(len(sequences), max(2, round(total / max(1, tokens))))
    held = [s for i, s in enumerate(sequences) if i % every == every - 1]
    return [s for i, s in enumerate(sequences) if i % every != every - 1], held
