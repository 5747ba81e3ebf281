"""The pool of documents behind `benchmarks/reuse.py`: what is asked is stated once, where it is said to be, and found again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def pool(bundled_tokenizer: Any) -> Iterator[Any]:
    """Twelve documents; `benchmarks/` is a folder of scripts, not installed."""
    pytest.importorskip("bm25s")
    if not BENCHMARKS.is_dir():
        pytest.skip("no benchmarks beside the tests")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import multidoc

        prose = bundled_tokenizer(" ".join(f"He walked to the {i}th door and waited." for i in range(900)))["input_ids"]
        yield multidoc.Pool(bundled_tokenizer, prose, 120, 12)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_documents_fill_their_length_and_state_each_fact_once(pool: Any, bundled_tokenizer: Any) -> None:
    texts = {d.source: d.text for d in pool.documents}
    for text in texts.values():
        assert 110 <= len(bundled_tokenizer(text, add_special_tokens=False)["input_ids"]) <= 120
    for (attribute, thing), (value, source) in pool.known.items():
        stated = f" The {attribute} of the {thing} is {value}."
        assert [name for name, text in texts.items() if stated in f" {text}"] == [source]


def test_questions_name_the_documents_that_answer_them(pool: Any) -> None:
    for asked in [*pool.one_fact(6), *pool.two_facts(6)]:
        assert len(set(asked.sources)) == len(asked.questions)
        assert set(asked.sources) <= set(pool.retrieve(asked, 4))  # words of the question occur there and hardly anywhere else
    (documents, asked) = pool.chained(1)[0]
    person = documents[0].text.split("The keeper of the ")[1].split(" is ")[1].split(".")[0]
    assert f"of {person} is {asked.questions[0][1]}." in documents[1].text


def test_later_questions_follow_the_answers_before_them(pool: Any) -> None:
    asked = pool.two_facts(1)[0]
    (first, said), (second, _) = asked.turns()
    assert first == f"Question: {asked.questions[0][0]} Answer:" and second == f"\nQuestion: {asked.questions[1][0]} Answer:"
    assert said == f" {asked.questions[0][1]}." and all(answer not in asked.query for _, answer in asked.questions)
