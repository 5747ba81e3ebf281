"""Each head by its own habit: the cheapest simple rule that keeps nearly all of the head's attention."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvstore.policies.base import DROP, Assignment, Classes, Flags, Floats, Limits, Policy, View, recent, share_of, top

CHOICES = ("special", "special+punctuation", "special+punctuation+locality", "special+punctuation+frequency",
           "special+punctuation+frequency+locality", "full")  # fmt: skip


class FastGen(Policy):
    """Per KV head the cheapest of CHOICES that recovers at least `recover` percent of the head's attention over the segment.

    Locality keeps the last `local` percent of the tokens before a query (and at load those at the segment's end), frequency the `frequent` percent
    with the most accumulated attention. A KV head is as well off as the worst of its query heads. Cheapest is what keeps the fewest tokens; of equals
    the simpler.
    The profile holds the place of each head's choice in CHOICES.
    Source: Ge et al., "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs", arXiv 2310.01801 (locality alone is added here).
    """

    name: ClassVar[str] = "fastgen"
    defaults: ClassVar[dict[str, int | str]] = {"frequent": 30, "local": 30, "recover": 95, "rest": "drop"}
    limits: ClassVar[Limits] = {"frequent": (1, 100), "local": (1, 100), "recover": (1, 100), "rest": (-3, 3)}

    @property
    def per_head(self) -> bool:
        return True

    def assign(self, view: View) -> Assignment:
        kept, windows = self._candidates(view)
        profile = self.choose(view.recovered(kept, windows), kept | _ends(windows, kept.shape[-1]))
        chosen = np.take_along_axis(kept | _ends(windows, kept.shape[-1]), profile[None, ..., None].astype(np.intp), axis=0)[0]
        return Assignment(self._classes(chosen), profile)

    def choose(self, recovered: Floats, kept: Flags) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """uint8 [layers, kv_heads]; recovered [choices, layers, kv_heads], kept [choices, layers, kv_heads, tokens]. The last is always enough."""
        cost = kept.sum(axis=-1, dtype=np.int64)
        enough = recovered >= self.number("recover") / 100
        enough[-1] = True
        return np.where(enough, cost, np.iinfo(np.int64).max).argmin(axis=0).astype(np.uint8)

    def _candidates(self, view: View) -> tuple[Flags, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
        """bool [choices, layers, kv_heads, tokens] without locality, and the window of each choice."""
        tokens = len(view.ids)
        often = top(view.mass(), share_of(self.number("frequent"), tokens))
        plain = np.broadcast_to(view.special, often.shape)
        marks = plain | view.punctuation
        window = share_of(self.number("local"), tokens)
        kept = np.stack([plain, marks, marks, marks | often, marks | often, np.ones_like(often)])
        return kept, np.array([0, 0, window, 0, window, 0])

    def _classes(self, kept: Flags) -> Classes:
        rest = DROP if self.drops else self.number("rest")
        return np.where(kept, 0, rest).astype(np.int8)


def _ends(windows: np.ndarray[tuple[int, ...], np.dtype[np.int64]], tokens: int) -> Flags:
    """bool [choices, 1, 1, tokens]: what each choice's locality keeps for whoever comes after the segment."""
    return np.stack([recent(tokens, int(w)) for w in windows])[:, None, None]
