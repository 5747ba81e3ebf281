"""What an error in the stored values costs: the Fisher information of the continuation at the keys (before RoPE) and values of a prefix.

The loss is the log-likelihood of tokens that the model itself draws after the prefix; with g its gradient at the stored values of a token,
F = E[g g'] for each layer and kind. To second order an error e of the token costs e' F e / 2 nats, summed over what follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.calibration.attention import attention_blocks
from kvstore.calibration.live import Live, frozen
from kvstore.calibration.record import Metric
from kvstore.calibration.sample import Excerpt
from kvstore.errors import ResourceError

FOLLOWING = 256
SPLITS = (1 / 3, 1 / 2, 2 / 3)
SHRINK = 0.03  # of a block's mean diagonal is added to its diagonal: ten times less or more changes little (0.713, 0.725, 0.820 b/v)
DEAD = 1e-6  # share of the other blocks' mean diagonal that a block without any gradient gets
Tick = Callable[[int], None]
log = logging.getLogger("kvstore")


class NoGradient(Exception):
    """The metric cannot be had by a backward pass; says why."""


@dataclass(frozen=True)
class Measured:
    """`blocks` float64 [layers, 2, channels, channels] as measured, and the name of the metric that it is."""

    blocks: Tensor
    metric: Metric


def splits_of(length: int) -> Iterator[tuple[int, int]]:
    """(prefix, end of what follows) for a sequence of so many tokens."""
    for share in SPLITS:
        at = max(1, min(length - 1, round(share * length)))
        yield at, min(length, at + FOLLOWING)


def measure(metric: Metric, live: Live, sequences: Sequence[Excerpt], seed: int, tick: Tick) -> Measured:
    """The blocks of `metric`; where it cannot be had, those of the next best one, with a warning in the log."""
    if metric == "fisher":
        try:
            return Measured(fisher_blocks(live, sequences, seed, tick), "fisher")
        except NoGradient as error:
            log.warning("no Fisher metric for this model (%s): calibrating by attention instead", error)
            metric = "attention"
    if metric == "attention" and (blocks := attention_blocks(live, [(s.ids, splits_of(len(s))) for s in sequences], tick)) is not None:
        return Measured(blocks, "attention")
    if metric == "attention":
        log.warning("the model's attention cannot be watched: calibrating without a metric (identity)")
    channels = live.layout.channels
    return Measured(torch.eye(channels, dtype=torch.float64).repeat(live.layout.layers, 2, 1, 1), "identity")


def fisher_blocks(live: Live, sequences: Sequence[Excerpt], seed: int, tick: Tick) -> Tensor:
    """float64 [layers, 2, channels, channels]: mean of g g' over prefix tokens, splits and sequences. Raises NoGradient."""
    chance = torch.Generator().manual_seed(seed)
    layout, total = live.layout, 0
    blocks = torch.zeros(layout.layers, 2, layout.channels, layout.channels, dtype=torch.float64, device=live.device)
    for sequence in sequences:
        x = live.values(sequence.ids)
        for at, end in splits_of(len(sequence)):
            gradient = _gradient(live, x[:at], sequence.ids[:end], chance)
            _accumulate(blocks, gradient)
            total += at
        tick(len(sequence))
    return _checked(blocks / max(total, 1))


def _gradient(live: Live, x: Tensor, ids: Sequence[int], chance: torch.Generator) -> Tensor:
    """g [tokens, layers, 2, channels]: of the log-likelihood of tokens drawn after each of `ids` that `x` does not hold, at `x`."""
    try:
        with frozen(live.model):
            leaf = x.clone().requires_grad_()
            logits = live.following(leaf, ids[len(x) :], ids[: len(x)]).log_softmax(-1)
            drawn = torch.multinomial(logits.detach().exp().cpu(), 1, generator=chance).to(logits.device)
            (gradient,) = torch.autograd.grad(logits.gather(-1, drawn).sum(), leaf)
            return gradient.detach()
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"not enough memory to calibrate: {error}", remedy="free memory, or choose --metric attention") from error
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise NoGradient(str(error).splitlines()[0]) from error


def _accumulate(blocks: Tensor, gradient: Tensor) -> None:
    for layer in range(blocks.shape[0]):
        for kind in (0, 1):
            g = gradient[:, layer, kind]
            blocks[layer, kind] += (g.T @ g).double()


def _checked(blocks: Tensor) -> Tensor:
    if not bool(torch.isfinite(blocks).all()):
        raise NoGradient("its gradients are not finite")
    means = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not bool((means > 0).any()):
        raise NoGradient("its gradients are all zero")
    if bool((means.amax(1) == 0).any()):
        log.warning("layers %s got no gradient: what is stored there is not used", (means.amax(1) == 0).nonzero().flatten().tolist())
    return blocks


def regularised(blocks: Tensor, shrink: float = SHRINK) -> Tensor:
    """Each block with `shrink` of its mean diagonal added to its diagonal; dead blocks become a tiny identity."""
    means = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(means > 0, shrink * means, DEAD * means[means > 0].mean())
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return blocks + added[..., None, None] * identity
