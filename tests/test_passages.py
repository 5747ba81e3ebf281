"""Passages fit, lose nothing, and are cut at the most natural place that leaves them short enough."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.documents import Document, Skipped
from kvstore.errors import InputError
from kvstore.passages import passage_names, plan_document, split
from kvstore.template import Renderer, make_template
from kvstore.tokens import TextEncoder
from tests.small_tokenizers import ALL, TEXTS

FAMILIES = ("gpt2", "llama3", "llama2", "unigram")
families = pytest.mark.parametrize("name", FAMILIES)
words = st.sampled_from(
    [
        "a",
        "word",
        "sentence.",
        "The end!",
        "x" * 90,
        "日本語。テキスト",
        "👩‍👩‍👧",
        "e\u0301" * 5,
        "<s>",
        "  ",
        "\t",
        "\n",
        "\n\n",
        "\n \n\n",
    ]
)
texts = st.lists(words | st.text(max_size=6), max_size=60).map(" ".join)


@cache
def renderer(name: str, system: str | None = None) -> Renderer:
    tokenizer = ALL[name]()
    return Renderer(make_template("auto", tokenizer, system), TextEncoder(tokenizer))


def squeezed(text: str) -> str:
    return "".join(text.split())


@families
@settings(max_examples=40, deadline=None)
@given(text=texts, limit=st.integers(24, 120))
def test_passages_fit_and_lose_nothing(name: str, text: str, limit: int) -> None:
    found = renderer(name)
    passages = split(text, found.encoder, limit, rendered=lambda ts: [len(i) for i in found.documents(ts)])
    assert squeezed("".join(passages)) == squeezed(text)
    assert all(p and p == p.strip() for p in passages)
    assert all(len(found.document(p)) <= limit for p in passages)


@families
def test_passages_hold_as_many_paragraphs_as_fit(name: str) -> None:
    encoder = renderer(name).encoder
    paragraphs = [p.strip() for t in TEXTS[50:60] for p in t.split("\n\n") if p.strip() and len(encoder.text(p)) <= 80]
    passages = split("\n\n".join(paragraphs), encoder, 200)
    assert len(passages) > 5 and [p for passage in passages for p in passage.split("\n\n")] == paragraphs
    for one, two in pairwise(passages):
        longer = one + "\n\n" + two.split("\n\n")[0]
        assert len(encoder.text(longer)) > 200 - 3, "the next paragraph would have fitted"


def test_cuts_prefer_paragraphs_then_lines_then_sentences_then_words() -> None:
    encoder = renderer("gpt2").encoder

    def cut(text: str, limit: int) -> list[str]:
        return split(text, encoder, limit)

    size = len(encoder.text("One two three."))
    assert cut("One two three.\n\nOne two three.\nOne two three.", 2 * size + 1) == [
        "One two three.",
        "One two three.\nOne two three.",
    ]
    assert cut("One two three. One two three.\nOne two three.", 2 * size + 1) == [
        "One two three. One two three.",
        "One two three.",
    ]
    assert cut("One two three. One two three.", size + 1) == ["One two three.", "One two three."]
    pieces = cut("One two three four five six seven", size)
    assert len(pieces) > 1 and " ".join(pieces) == "One two three four five six seven"
    assert "".join(cut("q" * 500, size)) == "q" * 500


def test_letters_keep_their_marks() -> None:
    passages = split("e\u0301" * 40, renderer("gpt2").encoder, 20)
    assert len(passages) > 1 and all(p.startswith("e") for p in passages)


def test_a_passage_too_short_for_a_character_is_refused() -> None:
    found = renderer("llama2")
    for limit in (0, 1, 2):
        with pytest.raises(InputError, match="no room"):
            split("☃☃☃", found.encoder, limit)
    assert split("", found.encoder, 0) == [] == split(" \n", found.encoder, 1)


def plan(text: str, **more: object) -> list[str] | Skipped:
    arguments: dict[str, object] = {"context": 300, "reserve": 100, "long": "split"} | more
    return plan_document(Document(text, "d.md", root="/r"), renderer("gpt2"), **arguments)  # type: ignore[arg-type]


def test_a_document_that_fits_stays_whole() -> None:
    assert plan("One.\n\nTwo.") == ["One.\n\nTwo."]
    assert plan("One.\n\nTwo.", passage_tokens=300) == ["One.\n\nTwo."]


def test_long_documents_are_split_skipped_or_refused() -> None:
    text = TEXTS[50] * 3
    found = renderer("gpt2")
    passages = plan(text)
    assert isinstance(passages, list) and len(passages) > 1
    assert all(len(found.head_ids) + len(found.document(p)) + 100 <= 300 for p in passages)
    skipped = plan(text, long="skip")
    assert isinstance(skipped, Skipped) and (skipped.source, skipped.root) == ("d.md", "/r") and "199" in skipped.reason
    with pytest.raises(InputError, match="d.md.*tokens.*--long"):
        plan(text, long="error")


def test_passage_tokens_bound_what_is_rendered_even_where_the_context_is_larger() -> None:
    passages = plan(TEXTS[50], passage_tokens=64, context=100_000, long="error")
    assert isinstance(passages, list) and max(len(renderer("gpt2").document(p)) for p in passages) <= 64


def test_a_head_that_fills_the_context_is_refused() -> None:
    long = Renderer(make_template("plain", ALL["gpt2"](), "very " * 300), renderer("gpt2").encoder)
    with pytest.raises(InputError, match="no room"):
        plan_document(Document("x", "x"), long, context=300, reserve=10)


def test_names() -> None:
    assert passage_names("a.md", 1) == ["a.md"]
    assert passage_names("a.md", 3) == ["a.md#0", "a.md#1", "a.md#2"]


def test_a_long_word_takes_no_quadratic_time() -> None:
    passages = split("q" * 60_000, renderer("gpt2").encoder, 64)
    assert "".join(passages) == "q" * 60_000
