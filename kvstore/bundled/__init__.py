"""The small model, the sample corpus and the questions that ship with kvstore. See README.md in this folder."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple


class Question(NamedTuple):
    """A question about one document of the sample corpus, and the answer that the bundled model gives to it."""

    source: str
    question: str
    answer: str


def _folder() -> Path:
    # The package is always installed unpacked: torch and safetensors map the weights from a real path.
    return Path(str(resources.files(__name__)))


def model_path() -> Path:
    """Folder of the bundled model: a Llama of 5.5 million parameters in bf16, with its tokenizer."""
    return _folder() / "model"


def calibrations_path() -> Path:
    """Folder of the calibrations that come with the bundled model, each under its digest; it may be missing."""
    return _folder() / "calibration"


def corpus_path() -> Path:
    """Folder of the sample corpus: short Markdown and text documents that state facts in prose."""
    return _folder() / "corpus"


def questions() -> list[Question]:
    """Questions about the sample corpus, each answered right by the bundled model from the live document."""
    lines = (_folder() / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [Question(**json.loads(line)) for line in lines]


def english_topics() -> list[tuple[str, str]]:
    """(name, text) of the help topics that every Python carries (`pydoc_data.topics`), sorted by name.

    Real English of a few hundred kilobytes, to measure on more than the sample corpus. Other Pythons, other texts.
    """
    from pydoc_data.topics import topics

    # Their reST leaves runs of blank lines behind; only whitespace is touched.
    return [(name, re.sub(r"\n{3,}", "\n\n", topics[name]).strip() + "\n") for name in sorted(topics)]
