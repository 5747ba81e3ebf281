"""The bundled model answers the questions about the bundled corpus, from nothing but the documents."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kvstore import bundled

# Every 14th: six or so documents from all folders.
SAMPLE = bundled.questions()[::14]


def test_files_are_there() -> None:
    names = {path.name for path in bundled.model_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert (bundled.model_path().parent / "README.md").is_file()
    assert {path.suffix for path in bundled.corpus_path().rglob("*") if path.is_file()} == {".md", ".txt"}
    assert len([path for path in bundled.corpus_path().rglob("*") if path.is_file()]) >= 36


def test_every_document_has_questions_and_every_question_its_fact() -> None:
    root = bundled.corpus_path()
    asked = bundled.questions()
    for source, question, answer in asked:
        fact = f"{question.replace('What is the', 'The').removesuffix('?')} is {answer}."
        assert fact in (root / source).read_text(encoding="utf-8")
    sources = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert sources == {q.source for q in asked}


def test_no_two_documents_answer_the_same_question() -> None:
    counts = Counter(q.question for q in bundled.questions())
    assert max(counts.values()) == 1


def test_corpus_is_plain_text_of_the_promised_length(bundled_tokenizer: Any) -> None:
    for path in bundled.corpus_path().rglob("*.*"):
        text = path.read_text(encoding="ascii")
        assert 150 <= len(bundled_tokenizer(text).input_ids) <= 700, path.name


@pytest.mark.parametrize("asked", SAMPLE, ids=[q.source for q in SAMPLE])
def test_live_answers_are_right(asked: bundled.Question, bundled_model: Any, bundled_tokenizer: Any) -> None:
    text = (bundled.corpus_path() / asked.source).read_text(encoding="utf-8").rstrip()
    prompt = bundled_tokenizer(f"{text}\nQuestion: {asked.question} Answer:", add_special_tokens=False).input_ids
    ids = torch.tensor([[bundled_tokenizer.bos_token_id, *prompt]])
    out = bundled_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    given = bundled_tokenizer.decode(out[0, ids.shape[1] :])
    assert given.startswith(f" {asked.answer}."), given


def test_english_topics_are_prose() -> None:
    topics = bundled.english_topics()
    assert len(topics) > 50
    assert topics == sorted(topics)
    assert sum(len(text) for _, text in topics) > 300_000
    assert all(text.strip() for _, text in topics)
