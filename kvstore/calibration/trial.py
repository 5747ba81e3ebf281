"""Trying a step on sequences that the statistics have not seen: counts for the tables, and the divergence of what follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.calibration.fit_tables import LARGEST, Counts, Fit, class_of, fit, used
from kvstore.calibration.live import Live
from kvstore.calibration.sample import Excerpt
from kvstore.calibration.solve import Solved
from kvstore.calibration.statistics import Grouping, Ordinary
from kvstore.transforms.klt import Basis

I64 = npt.NDArray[np.int64]
PREFIX, FOLLOWING = 768, 256
COLUMNS = 256  # of coefficients counted at a time
NEVER = 0.05  # steps: coefficients of smaller deviation are never coded, so they are not counted
KEEP_LOGITS = 1 << 30  # bytes of live log-probabilities kept from one step to the next


@dataclass
class Held:
    """A held-out sequence: coefficients `c` [tokens, D] a group, whether each token is ordinary [tokens, groups], where its prefix ends."""

    ids: tuple[int, ...]
    at: int
    c: list[Tensor]
    ordinary: Tensor
    live: Tensor | None = None

    @property
    def following(self) -> tuple[int, ...]:
        return self.ids[self.at : self.at + FOLLOWING]


@dataclass
class Trials:
    """The held-out sequences under one solution."""

    live: Live
    grouping: Grouping
    solved: Sequence[Solved]
    tiers: int
    held: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.live.device
        bases = [s.basis for s in self.solved]
        self._mean = [torch.tensor(b.mean, device=device) for b in bases]
        self._synthesis = [torch.tensor(b.rows, device=device).float() * torch.tensor(b.scale, device=device)[:, None] for b in bases]
        self._analysis = [_analysis(b, rows) for b, rows in zip(bases, self._synthesis, strict=True)]

    def hold(self, sequences: Sequence[Excerpt], chosen: Ordinary) -> None:
        """Prefill the sequences and keep their coefficients."""
        for sequence in sequences:
            x = self.live.values(sequence.ids)
            c = [(part - m) @ a for part, m, a in zip(self.grouping.split(x), self._mean, self._analysis, strict=True)]
            at = max(1, min(PREFIX, round(0.75 * len(sequence))))
            self.held.append(Held(sequence.ids, at, c, chosen.kept(x)))

    @property
    def values(self) -> int:
        """Stored values a token."""
        return sum(len(s.sigma) for s in self.solved)

    def fit(self, step: float, rounds: int) -> tuple[Fit, list[I64]]:
        """Tables for `step`, and the classes of each group's coefficients (all D of them)."""
        active = [max(1, int((s.sigma > NEVER * step).sum())) for s in self.solved]
        counts = _joined([count(self._columns(g, n), step, self.tiers) for g, n in enumerate(active)])
        sigma = np.concatenate([s.sigma[:n] for s, n in zip(self.solved, active, strict=True)])
        done = fit(counts, class_of(sigma, step), rounds)
        parts = np.split(done.classes, np.cumsum(active)[:-1])
        classes = [np.concatenate([p, class_of(s.sigma[n:], step)]) for p, s, n in zip(parts, self.solved, active, strict=True)]
        return done, classes

    def _columns(self, group: int, active: int) -> Iterator[Tensor]:
        """Coefficients of ordinary tokens, [tokens, some columns] at a time."""
        for first in range(0, active, COLUMNS):
            yield torch.cat([h.c[group][h.ordinary[:, group], first : min(first + COLUMNS, active)] for h in self.held])

    def divergence(self, step: float, done: Fit, classes: Sequence[I64], tier: int) -> float:
        """Mean KL in nats a token, live against quantized at `tier`, over what follows the prefixes."""
        total, tokens = 0.0, 0
        for held in self.held:
            wanted = self._live(held)
            found = self._continued(held, self._decoded(held, step, done, classes, tier))
            total += float((wanted.exp() * (wanted - found)).sum(-1).double().sum())
            tokens += len(held.following)
        return max(total / max(tokens, 1), 0.0)

    @torch.no_grad()
    def _live(self, held: Held) -> Tensor:
        if held.live is not None:
            return held.live
        found = self._continued(held, self._whole([c[: held.at] for c in held.c]))
        if sum(found.nbytes for h in self.held) <= KEEP_LOGITS:
            held.live = found
        return found

    @torch.no_grad()
    def _continued(self, held: Held, x: Tensor) -> Tensor:
        return self.live.following(x, held.following, held.ids[: held.at]).log_softmax(-1)

    def _whole(self, c: Sequence[Tensor]) -> Tensor:
        """Coefficients [tokens, count] a group as x."""
        layout = self.live.layout
        parts = [m + one @ s[: one.shape[1]] for m, one, s in zip(self._mean, c, self._synthesis, strict=True)]
        return torch.cat([p.view(len(p), -1, 2, layout.channels) for p in parts], 1)

    def _decoded(self, held: Held, step: float, done: Fit, classes: Sequence[I64], tier: int) -> Tensor:
        """The prefix as a reader of `tier` gets it; exempt tokens, which are coded almost exactly, as they are."""
        here, parts = step * 3.0 ** (self.tiers - 1 - tier), []
        for g, c in enumerate(held.c):
            prefix, coded = c[: held.at], torch.from_numpy(used(classes[g], tier, self.tiers) >= done.least).to(c.device)
            levels = torch.round(prefix / here) * coded
            parts.append(torch.where(held.ordinary[: held.at, g, None], levels * here, prefix))
        return self._whole(parts)


def _analysis(basis: Basis, rows: Tensor) -> Tensor:
    """F B', as Basis.analysis makes it, on the device of the rows."""
    channels, parts = basis.metric.shape[1], []
    for block, scale in enumerate(basis.metric_scale):
        metric = torch.tensor(basis.metric[block], device=rows.device).float() * float(scale)
        parts.append(metric @ rows[:, block * channels : (block + 1) * channels].T)
    return torch.cat(parts)


def count(columns: Iterator[Tensor], step: float, tiers: int) -> Counts:
    """Counts of coefficients given as [tokens, some columns] at a time."""
    return _joined([_count(c / step, tiers) for c in columns])


def _count(c: Tensor, tiers: int) -> Counts:
    """`c` in steps of the finest tier."""
    finest = torch.round(c)
    coarser, levels, thirds = finest, [], []
    for tier in range(tiers):
        scale = 3.0 ** (tiers - 1 - tier)
        level = torch.round(c / scale)
        levels.append(_histogram(level.abs().clamp_max(LARGEST + 1).long(), LARGEST + 2))
        if tier:
            thirds.append(_histogram(_split(coarser, level), 5))
        coarser = level
    none = torch.zeros(0, c.shape[1], 5, dtype=torch.int64)
    squares = [(part.double() ** 2).sum(0) for part in (c, c - finest)]
    return Counts(*(a.cpu().numpy() for a in (torch.stack(levels), torch.stack(thirds) if thirds else none, *squares)))


def _split(coarse: Tensor, fine: Tensor) -> Tensor:
    """Which third each value goes to: 0, 1 for the middle and outer ones of cell zero; 2, 3, 4 for inner, middle, outer of the others."""
    outward = fine * coarse.sign() - 3 * coarse.abs()
    return torch.where(coarse == 0, (fine != 0).long(), 3 + outward.clamp(-1, 1).long())


def _histogram(symbols: Tensor, size: int) -> Tensor:
    """int64 [columns, size] of symbols [tokens, columns]."""
    columns = symbols.shape[1]
    offset = size * torch.arange(columns, device=symbols.device)
    return torch.bincount((symbols + offset).flatten(), minlength=size * columns).view(columns, size)


def _joined(parts: Sequence[Counts]) -> Counts:
    """Of more coefficients."""
    return Counts(
        np.concatenate([p.levels for p in parts], 1),
        np.concatenate([p.thirds for p in parts], 1),
        np.concatenate([p.energy for p in parts]),
        np.concatenate([p.error for p in parts]),
    )


def kept_order(classes: I64, least: int) -> I64:
    """Coefficients that the basis keeps, by class descending: what the finest tier codes. Exempt tokens that need more are kept raw."""
    order = np.argsort(-classes, kind="stable")
    kept = order[classes[order] >= least]
    return kept if len(kept) else order[:1]
