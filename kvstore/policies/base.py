"""What every token policy is: a step class per token, or per KV head and token, from what is known of a segment.

A class c multiplies the token's quantizer step by 3 ** c, so that importance becomes bytes; DROP leaves the token out for a head altogether,
and a registered attention function masks it at load (families/masking.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import InputError

DROP = 127
LEAST_CLASS, MOST_CLASS = -3, 3
Classes = npt.NDArray[np.int8]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Limits = Mapping[str, tuple[int, int]]
Params = dict[str, int | str]


class View(Protocol):
    """One segment in its context, as policies see it. What costs a pass of the model is computed when first asked for, and kept.

    `layers`, `kv_heads` and the number of `ids` shape everything. `special` and `punctuation` are bool [tokens].
    """

    layers: int
    kv_heads: int
    ids: npt.NDArray[np.int64]

    @property
    def special(self) -> Flags:
        """Control tokens."""

    @property
    def punctuation(self) -> Flags:
        """Tokens of text that hold neither a letter nor a digit, but a mark."""

    def mass(self) -> Floats:
        """float32 [layers, kv_heads, tokens]: attention that each token receives from later tokens of the segment, summed over the head's queries."""

    def recovered(self, kept: Flags, windows: npt.NDArray[np.int64]) -> Floats:
        """float32 [choices, layers, kv_heads]: share of the segment's own attention that falls on kept tokens, the worst query head of each KV head.

        Choice i keeps the context, `kept[i]` (bool [choices, layers, kv_heads, tokens]) and each query's last `windows[i]` tokens.
        """

    def reconstruction(self) -> Floats:
        """float32 [layers, kv_heads, tokens]: the largest attention that each token receives while the model repeats the segment."""


@dataclass(frozen=True)
class Assignment:
    """`classes` int8 [tokens], or [layers, kv_heads, tokens] where heads differ. `profile` uint8 [layers, kv_heads]: the choice made for a head."""

    classes: Classes
    profile: npt.NDArray[np.uint8] | None = None

    @property
    def per_head(self) -> bool:
        return self.classes.ndim == 3

    def dropped(self, layers: int, kv_heads: int) -> Flags:
        """bool [layers, kv_heads, tokens]."""
        return np.broadcast_to(self.classes == DROP, (layers, kv_heads, self.classes.shape[-1]))


class Policy(ABC):
    """`params` are canonical: every one present, ints and strings only. An instance holds no state.

    `limits` bounds each whole-number parameter; `rest`, where a policy has one, may also be the word `drop`.
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, int | str]] = {}
    limits: ClassVar[Limits] = {}

    def __init__(self, params: Mapping[str, int | str] | None = None):
        given = dict(params or {})
        if unknown := sorted(given.keys() - self.defaults.keys()):
            takes = ", ".join(sorted(self.defaults)) or "no parameters"
            raise InputError(f"policy {self.name} does not know {unknown[0]!r}", remedy=f"it takes {takes}")
        self.params: Params = {k: self._checked(k, v) for k, v in sorted({**self.defaults, **given}.items())}

    def _checked(self, name: str, value: int | str) -> int | str:
        if value == "drop" and name == "rest":
            return value
        low, high = self.limits[name]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            words = " or drop" if name == "rest" else ""
            raise InputError(f"policy {self.name}: {name} is {value!r}", remedy=f"give a whole number from {low} to {high}{words}")
        return value

    @property
    def spec(self) -> str:
        """`name:key=value,...` with every parameter: what enters the encoding's identity, and what `parse` reads."""
        listed = ",".join(f"{k}={v}" for k, v in self.params.items())
        return f"{self.name}:{listed}" if listed else self.name

    @property
    def drops(self) -> bool:
        """Whether tokens may be left out altogether."""
        return self.params.get("rest") == "drop"

    @property
    def per_head(self) -> bool:
        """Whether heads of a token may differ."""
        return False

    @abstractmethod
    def assign(self, view: View) -> Assignment:
        """Classes for all tokens of the view, and the profile where one is kept. The same view gives the same answer."""

    def classes(self, view: View) -> Classes:
        """int8 [tokens], or [layers, kv_heads, tokens] where `per_head`: -3 to 3, or DROP."""
        return self.assign(view).classes

    def number(self, name: str) -> int:
        value = self.params[name]
        if not isinstance(value, int):
            raise InputError(f"policy {self.name}: {name} is no number")
        return value

    def split(self, kept: Flags) -> Classes:
        """Class 0 (or the parameter `keep`) for kept tokens, the parameter `rest` for the others."""
        rest: Any = DROP if self.drops else self.params["rest"]
        return np.where(kept, self.params.get("keep", 0), rest).astype(np.int8)


STEPS: Limits = {"keep": (LEAST_CLASS, MOST_CLASS), "rest": (LEAST_CLASS, MOST_CLASS)}


def share_of(percent: int, count: int) -> int:
    """So many of `count`: at least one, rounded down otherwise."""
    return max(1, count * percent // 100)


def top(scores: Floats, count: int) -> Flags:
    """bool, shaped as `scores` [..., n]: the `count` greatest along the last axis. Of equal ones the earlier."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    chosen = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


def recent(tokens: int, count: int) -> Flags:
    """bool [tokens]: the last `count`."""
    return np.arange(tokens) >= tokens - count
