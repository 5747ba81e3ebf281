"""What a prompt of separately computed documents should give, by one plain forward pass under a mask: no cache, nothing of kvstore.

Every document is computed alone after a copy of the anchor, at the positions it has in the prompt; then chosen tokens once more, seeing everything
before them in the prompt; then the question, which sees the chosen tokens' second computation and the first one of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Sheet:
    """Rows of the pass: an id, its position, and the rows it sees."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sees: list[list[int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], position: int, before: Sequence[int]) -> list[int]:
        """Rows of `ids` from `position` on, which see `before` and each other as far as they go."""
        rows: list[int] = []
        for offset, token in enumerate(ids):
            rows.append(len(self.ids))
            self.ids.append(token)
            self.positions.append(position + offset)
            self.sees.append([*before, *rows])
        return rows

    def logits(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        with torch.no_grad():
            out = model(torch.tensor([self.ids]), position_ids=torch.tensor([self.positions]), attention_mask=self._masks(model), use_cache=False)
        return out.logits[0, list(rows)]

    def _masks(self, model: Any) -> Any:
        config = model.config.get_text_config(decoder=True)
        full, window = self._mask(model, None), getattr(config, "sliding_window", None)
        types = set(getattr(config, "layer_types", None) or ())
        if "sliding_attention" in types:
            return {"full_attention": full, "sliding_attention": self._mask(model, window)}
        return full if window is None or types else self._mask(model, window)

    def _mask(self, model: Any, window: int | None) -> Tensor:
        allowed, places = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool), torch.tensor(self.positions)
        for row, seen in enumerate(self.sees):
            allowed[row, seen] = True
        if window is not None:
            allowed &= places[:, None] - places[None] < window
        if model.config._attn_implementation == "sdpa":
            return allowed[None, None]
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


def expected(model: nn.Module, exact: Sequence[int], anchor: Sequence[int], moved: Sequence[Sequence[int]], chosen: Sequence[int],
             question: Sequence[int], dropped: Sequence[int] = ()) -> Tensor:  # fmt: skip
    """Logits of `question` [tokens, vocabulary] after `exact` ids (seen as they are) and `moved` documents, `chosen` prompt places computed anew.

    `dropped` places are not seen from outside their document's first computation, unless they are chosen.
    """
    sheet = Sheet()
    prompt = sheet.add(exact, 0, ())
    for ids in moved:
        at = len(prompt)
        around = sheet.add(anchor, at - len(anchor), ())
        prompt += sheet.add(ids, at, around)
    first, final = list(prompt), list(prompt)
    for place in sorted(chosen):
        (final[place],) = sheet.add([sheet.ids[first[place]]], place, [final[p] for p in range(place) if p in chosen or p not in dropped])
    return sheet.logits(model, sheet.add(question, len(prompt), [row for p, row in enumerate(final) if p in chosen or p not in dropped]))
