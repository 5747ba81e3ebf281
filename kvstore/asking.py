"""A user's own questions, and how right an answer is: exact match and F1 over words, as SQuAD counts them. Torch-free."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import InputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
REMEDY = 'a line is {"query": "...", "documents": ["a.md"], "answer": "..."}'


@dataclass(frozen=True)
class Case:
    """A question about stored documents (names), and the answers that count as right. `line` is where it stands in its file."""

    query: str
    documents: tuple[str, ...]
    answers: tuple[str, ...]
    line: int = 0


def read_cases(path: str | Path, limit: int | None = None) -> list[Case]:
    """JSON lines with `query`, `documents` (names, or one) and `answer` (text, or several); the first `limit` of them.

    `question` for `query` and `source` for `documents` will do; other fields are left alone. Raises InputError naming the line.
    """
    if limit is not None and limit < 1:
        raise InputError(f"{limit} questions", remedy="give --limit 1 or more", code="usage")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}", remedy="check the path") from error
    found = [_case(path, number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not found:
        raise InputError(f"{path}: no question", remedy=REMEDY)
    return found


def _case(path: str | Path, number: int, line: str) -> Case:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})", remedy=REMEDY) from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not an object", remedy=REMEDY)
    query = _texts(where, "query", value.get("query", value.get("question")))
    if len(query) > 1:
        raise InputError(f"{where}: several queries", remedy=REMEDY)
    documents = _texts(where, "documents", value.get("documents", value.get("source")))
    return Case(query[0], documents, _texts(where, "answer", value.get("answer")), number)


def _texts(where: str, name: str, value: Any) -> tuple[str, ...]:
    """One text, or a list of them; none is empty."""
    texts = value if isinstance(value, list) else [value]
    if value is None or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(f"{where}: {name!r} is missing or no text", remedy=REMEDY)
    return tuple(texts)


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 where the answer is one of the right ones, after normalising."""
    return float(any(normalised(answer) == normalised(r) for r in right))


def f1(answer: str, right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, against the right answer that fits best."""
    return max(_f1(normalised(answer).split(), normalised(r).split()) for r in right)


def _f1(ours: list[str], right: list[str]) -> float:
    common = sum((Counter(ours) & Counter(right)).values())
    if not ours or not right:
        return float(ours == right)
    return 2 * common / (len(ours) + len(right))
