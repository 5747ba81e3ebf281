"""The first and the last tokens of a segment count more than the middle."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvstore.policies.base import STEPS, Assignment, Limits, Policy, View, recent


class SinkRecent(Policy):
    """The first `sinks` and the last `recent` tokens get the class `keep`, all others `rest`.

    Source: Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. There the rest is dropped
    (`rest=drop`).
    """

    name: ClassVar[str] = "sink+recent"
    defaults: ClassVar[dict[str, int | str]] = {"keep": 0, "recent": 64, "rest": 1, "sinks": 4}
    limits: ClassVar[Limits] = {**STEPS, "recent": (0, 1 << 20), "sinks": (1, 1 << 20)}

    def assign(self, view: View) -> Assignment:
        tokens = len(view.ids)
        return Assignment(self.split((np.arange(tokens) < self.number("sinks")) | recent(tokens, self.number("recent"))))
