"""A user's own questions, answered live and from the store, at every tier and in every reuse mode that applies."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore.answering import generated_ids, last_logits
from kvstore.artifact import tier_chain
from kvstore.asking import Case, exact_match, f1
from kvstore.certificates import t95
from kvstore.errors import InputError, NotFoundError
from kvstore.prompt import Prompt
from kvstore.reuse import Reuse, mode_of
from kvstore.reuse.base import Budget
from kvstore.scoring import compare, logits_after

if TYPE_CHECKING:
    from kvstore.api import OpenStore

FEW = 30  # questions below which the advice says that a small loss would not show
MORE = "compute tokens anew (--reuse query, --recompute 0.3), or ask one document at a time with --reuse prefix"
SLACK = 0.05  # of F1: what loses more is not advised even where it may be chance, as with three questions it always may


@dataclass(frozen=True)
class Answered:
    """One question (counted from 1) in one way. `kl`: KL(live || stored) over the live answer's tokens, nats a token.

    Times are until the first token, in milliseconds.
    """

    question: int
    reuse: str
    tier: str
    text: str
    exact: float
    f1: float
    same: bool
    kl: float
    milliseconds: float
    live_milliseconds: float
    nbytes: int


@dataclass(frozen=True)
class Live:
    """One question answered by a full prefill."""

    question: int
    text: str
    exact: float
    f1: float


@dataclass(frozen=True)
class LiveTotal:
    questions: int
    exact: float
    f1: float
    milliseconds: float


@dataclass(frozen=True)
class Total:
    """All questions in one way: means, but medians of `milliseconds` and `ratio` (full prefill over stored). `differs`: F1 is measurably below live,
    its 95 % bound being below 0; `f1_change` is stored less live on the same questions."""

    reuse: str
    tier: str
    questions: int
    exact: float
    f1: float
    f1_change: float
    differs: bool
    agreement: float
    kl: float
    milliseconds: float
    ratio: float
    nbytes: float


@dataclass
class Evaluation:
    """`totals` by reuse mode, then tier, base first."""

    live: LiveTotal
    totals: list[Total]
    advice: str
    answers: list[Answered] = field(default_factory=list)
    live_answers: list[Live] = field(default_factory=list)


def evaluate(
    store: OpenStore,
    cases: Sequence[Case],
    *,
    tiers: Sequence[str] = (),
    reuse: Reuse | None = None,
    recompute: Budget = None,
    max_new_tokens: int = 64,
    progress: Callable[[int, Case], None] | None = None,
) -> Evaluation:
    """Answer every case live and from the store, greedily. `tiers` defaults to all; `reuse` to prefix, and blocks where that does not hold all.

    `recompute`: the budget of a mode that computes tokens anew, as `compose` takes it. Raises NotFoundError for a document or tier that is not
    stored, and what `compose` does.
    """
    mode_of(reuse or "prefix", recompute)  # refused before anything is computed
    if not cases or max_new_tokens < 1:
        raise InputError("nothing to answer", remedy="give one question and one token or more")
    run = _Run(store, max_new_tokens, recompute)
    run.require(cases)
    chosen = [tier_chain(run.encoding, t)[-1].name for t in tiers] or [t.name for t in run.encoding.tiers]
    for number, case in enumerate(cases, 1):
        if progress is not None:
            progress(number, case)
        run.take(number, case, chosen, reuse)
    return run.result()


class _Run:
    """The questions so far."""

    def __init__(self, store: OpenStore, max_new_tokens: int, recompute: Budget):
        self.store, self.model, self.tokens, self.recompute = store, store.model, max_new_tokens, recompute
        view = store.view
        self.encoding = store.encodings()[view.encoding_id]
        self.stop = "\n" if view.renderer.record.kind == "plain" else ""  # without a chat template nothing else ends an answer
        self.answers: list[Answered] = []
        self.lives: list[Live] = []

    def require(self, cases: Sequence[Case]) -> None:
        """Before anything is computed: every document is there."""
        for case in cases:
            for name in case.documents:
                try:
                    self.store.view.blocks(name)
                except NotFoundError as error:
                    raise NotFoundError(f"line {case.line}: {error.message}", remedy=error.remedy) from error

    def take(self, number: int, case: Case, tiers: Sequence[str], reuse: Reuse | None) -> None:
        first = self._composed(case, reuse or "prefix", tiers[-1])
        whole = {"input_ids": first.input_ids, "attention_mask": torch.ones_like(first.input_ids)}
        live, text = self._answer(whole)
        self.lives.append(Live(number, text, exact_match(text, case.answers), f1(text, case.answers)))
        wanted = logits_after(self.model, None, first.input_ids[0].tolist() + live[:-1], keep=len(live))
        lacking = any(d.action == "prefilled" for d in first.receipt.documents)
        modes: list[Reuse] = [reuse] if reuse is not None else ["prefix", "blocks"] if lacking else ["prefix"]
        self.answers += [self._stored(number, case, mode, tier, (live, text, wanted)) for mode in modes for tier in tiers]

    def _composed(self, case: Case, mode: Reuse, tier: str) -> Prompt:
        return self.store.compose(case.documents, case.query, reuse=mode, recompute=self.recompute, tier=tier)

    def _answer(self, inputs: dict[str, Any]) -> tuple[list[int], str]:
        ids = generated_ids(self.model, self.store.source.tokenizer, inputs, self.tokens, self.stop)
        text = str(self.store.source.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return ids, text.split("\n")[0].strip() if self.stop else text

    def _stored(self, number: int, case: Case, mode: Reuse, tier: str, reference: tuple[list[int], str, torch.Tensor]) -> Answered:
        (live, text, wanted), right = reference, case.answers
        prompt = self._composed(case, mode, tier)
        found = self._answer(prompt.inputs)[1]
        cached = prompt.receipt.cached_tokens
        said = logits_after(self.model, prompt.cache, prompt.input_ids[0, cached:].tolist() + live[:-1], keep=len(live))
        kl = float(compare(wanted, said, live[1:]).kl.mean())
        stored, cold = self._first_token(case, mode, tier, prompt)
        scores = exact_match(found, right), f1(found, right), found == text, kl
        return Answered(number, mode, tier, found, *scores, stored, cold, prompt.receipt.nbytes)

    def _first_token(self, case: Case, mode: Reuse, tier: str, prompt: Prompt) -> tuple[float, float]:
        """Milliseconds until the first logits are on the host: from `compose`, and by a prefill of the same ids. Both have run before."""
        started = time.perf_counter()
        fresh = self._composed(case, mode, tier)
        last_logits(self.model, fresh.input_ids[:, fresh.receipt.cached_tokens :], fresh.cache)
        between = time.perf_counter()
        last_logits(self.model, prompt.input_ids, None)
        return (between - started) * 1e3, (time.perf_counter() - between) * 1e3

    def result(self) -> Evaluation:
        lives = {x.question: x for x in self.lives}
        ways = sorted({(a.reuse, a.tier) for a in self.answers}, key=lambda way: (way[0] != "prefix", self._place(way[1])))
        totals = [_total([a for a in self.answers if (a.reuse, a.tier) == way], lives) for way in ways]
        times = [a.live_milliseconds for a in self.answers]
        live = LiveTotal(len(self.lives), _mean(x.exact for x in self.lives), _mean(x.f1 for x in self.lives), statistics.median(times))
        return Evaluation(live, totals, advice(live, totals), self.answers, self.lives)

    def _place(self, tier: str) -> int:
        return [t.name for t in self.encoding.tiers].index(tier)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _total(answers: Sequence[Answered], lives: dict[int, Live]) -> Total:
    changes = [a.f1 - lives[a.question].f1 for a in answers]
    return Total(
        answers[0].reuse,
        answers[0].tier,
        len(answers),
        _mean(a.exact for a in answers),
        _mean(a.f1 for a in answers),
        _mean(changes),
        measurably_below(changes),
        _mean(a.same for a in answers),
        _mean(a.kl for a in answers),
        statistics.median(a.milliseconds for a in answers),
        statistics.median(a.live_milliseconds / a.milliseconds for a in answers),
        _mean(a.nbytes for a in answers),
    )


def measurably_below(changes: Sequence[float]) -> bool:
    """Whether the mean is below 0 beyond chance: the upper end of its one-sided 95 % t-interval is. A single value counts as it is."""
    mean = _mean(changes)
    if len(changes) < 2:
        return mean < 0
    return mean + t95(len(changes) - 1) * float(np.std(changes, ddof=1)) / math.sqrt(len(changes)) < 0


def advice(live: LiveTotal, totals: Sequence[Total]) -> str:
    """One line: the cheapest tier whose answers are about as good, and not measurably worse; else what to do."""
    if live.f1 < 0.1:
        return f"the live answers are wrong already (F1 {live.f1:.2f}): nothing can be said about the store; ask what the model can answer"
    modes = dict.fromkeys(t.reuse for t in totals)
    said = "; ".join(_advice([t for t in totals if t.reuse == mode]) for mode in modes)
    return said + (f" (only {live.questions} questions: a small loss would not show)" if live.questions < FEW else "")


def _advice(totals: Sequence[Total]) -> str:
    """Of one reuse mode."""
    good, way = [t for t in totals if not t.differs and t.f1_change >= -SLACK], f"--reuse {totals[0].reuse}"
    best = min(good, key=lambda t: t.nbytes) if good else max(totals, key=lambda t: t.f1)
    f1s = f"F1 {best.f1:.2f}, live {best.f1 - best.f1_change:.2f}"
    if good:
        return f"{way}: --tier {best.tier} is the cheapest without a measurable loss ({f1s}), first token {best.ratio:.1f} times sooner"
    remedy = "build with --lossless, or --recalibrate" if totals[0].reuse == "prefix" else MORE
    return f"{way}: every tier loses answers (best: {best.tier}, {f1s}); {remedy}"
