"""The texts of `rate_quality.py`: prose, technical text and fact recall, cut so that what calibrates never scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from facts import Facts, Recall

ASCII = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "—": "--", "…": "..."})  # what the small models were trained on
AHEAD = 256
FACT_TOKENS, FACTS = 700, 12
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Passage:
    """A document's tokens, and the AHEAD tokens that follow it in its text."""

    ids: Ids
    ahead: Ids


@dataclass(frozen=True)
class Texts:
    """A folder with prose/ and technical/ of .md and .txt files: the first third of each (whole files where there are several) calibrates."""

    folder: Path
    tokenizer: Any = field(compare=False, hash=False)

    @cache  # noqa: B019  lives as long as the benchmark
    def tokens(self, kind: str, role: str) -> npt.NDArray[np.uint32]:
        """All tokens of one kind for `calibration` or `scoring`."""
        texts = [p.read_text(encoding="utf-8") for p in sorted((self.folder / kind).iterdir()) if p.suffix in (".md", ".txt")]
        if not texts:
            raise FileNotFoundError(f"no .md or .txt files in {self.folder / kind}")
        first, rest = parted([t.translate(ASCII).encode("ascii", "ignore").decode() for t in texts])
        text = first if role == "calibration" else rest
        pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        ids = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]
        return np.concatenate([np.array(row, np.uint32) for row in ids])

    def passages(self, kind: str, tokens: int, count: int) -> list[Passage]:
        """Documents to score, spread evenly over the text."""
        ids = self.tokens(kind, "scoring").tolist()
        step = (len(ids) - tokens - AHEAD) // count
        if step < tokens // 2:
            raise ValueError(f"{len(ids):,} tokens of {kind} are too few for {count} documents of {tokens}")
        starts = [i * step for i in range(count)]
        return [Passage(tuple(ids[s : s + tokens]), tuple(ids[s + tokens : s + tokens + AHEAD])) for s in starts]

    def recall(self, count: int) -> list[Recall]:
        """Documents with facts to score, in prose of the scoring books."""
        facts = Facts(self.tokenizer, self.tokens("prose", "scoring").tolist(), seed=7)
        return [facts.document(FACT_TOKENS, FACTS) for _ in range(count)]

    def calibration(self, kinds: tuple[str, ...], documents: int, tokens: int = 768, seed: int = 0) -> list[Ids]:
        """As many documents of each kind, shuffled, so that whatever part is held out has all kinds. `facts` lie in prose that calibrates."""
        made = [ids for kind in kinds for ids in self._calibration(kind, documents // len(kinds), tokens, seed)]
        return [made[i] for i in np.random.default_rng(seed).permutation(len(made))]

    def _calibration(self, kind: str, count: int, tokens: int, seed: int) -> list[Ids]:
        ids = self.tokens("prose" if kind == "facts" else kind, "calibration").tolist()
        if kind == "facts":
            facts = Facts(self.tokenizer, ids, seed=1000 + seed)
            return [facts.document(FACT_TOKENS, FACTS).ids for _ in range(count)]
        starts = np.random.default_rng(seed).permutation(len(ids) // tokens)[:count] * tokens
        if len(starts) < count:
            raise ValueError(f"{len(ids):,} tokens of {kind} are too few to calibrate on {count} documents of {tokens}")
        return [tuple(ids[s : s + tokens]) for s in starts]


def parted(texts: list[str]) -> tuple[str, str]:
    """The first third and the rest, cut between texts where there are several."""
    if len(texts) == 1:
        return texts[0][: len(texts[0]) // 3], texts[0][len(texts[0]) // 3 :]
    total, taken = sum(map(len, texts)), 1
    while taken < len(texts) - 1 and 3 * sum(map(len, texts[:taken])) < total:
        taken += 1
    return "\n\n".join(texts[:taken]), "\n\n".join(texts[taken:])
