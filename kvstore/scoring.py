"""How far two runs of a model are apart in what they say next, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstore.families.assemble import share

_ROWS = 32  # tokens at a time: in float32, a vocabulary of 150,000 takes 18 MiB


@dataclass(frozen=True)
class Scores:
    """`kl` float64 [tokens]: KL(live || found) after each token, nats. `agreement`: share of tokens after which the likeliest next one is the same.
    `change`: mean log-likelihood of the tokens that follow in the text, found less live, nats a token."""

    kl: npt.NDArray[np.float64]
    agreement: float
    change: float

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.kl).all() and np.isfinite(self.change))


def logits_after(model: Any, cache: Any, ids: Sequence[int], keep: int = 0) -> torch.Tensor:
    """Logits [tokens, vocabulary] in the model's dtype after each of `ids`, or the last `keep`: one pass after `cache`, which stays as it was."""
    found: torch.Tensor = continued(model, cache, ids, logits_to_keep=keep).logits[0]
    return found


def continued(model: Any, cache: Any, ids: Sequence[int], **more: Any) -> Any:
    """The model's output over `ids`, one sequence, after `cache`, which stays as it was; None: from the first position."""
    with torch.inference_mode():
        past, given = None if cache is None else share(cache), torch.tensor([list(ids)], device=model.device)
        start = 0 if past is None else int(past.get_seq_length())  # said aloud: some hybrids of transformers begin at 0 after any cache
        places = torch.arange(start, start + len(ids), device=model.device)[None]
        return model(given, position_ids=places, past_key_values=past, use_cache=True, **more)


def compare(live: torch.Tensor, found: torch.Tensor, following: Sequence[int]) -> Scores:
    """Logits [tokens, vocabulary] of both; `following[i]` comes after token i in the text, where known (the last may be missing)."""
    kl, same, change = [], 0, 0.0
    for at in range(0, len(live), _ROWS):
        p, q = (x[at : at + _ROWS].float().log_softmax(-1) for x in (live, found))
        kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0.0).double().cpu().numpy())  # rounding, of 1e-7 or so, may leave it below 0
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        after = torch.tensor(following[at : at + _ROWS], dtype=torch.long, device=p.device)[:, None]
        change += float((q[: len(after)].gather(1, after) - p[: len(after)].gather(1, after)).sum())
    return Scores(np.concatenate(kl), same / len(live), change / max(1, len(following[: len(live)])))
