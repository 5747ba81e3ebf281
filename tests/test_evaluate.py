"""Questions of a user's own: read, answered at every tier, counted, and what is advised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvstore
from kvstore import Document, bundled
from kvstore.asking import Case, exact_match, f1, normalised, read_cases
from kvstore.errors import InputError, NotFoundError
from kvstore.evaluate import LiveTotal, Total, advice, evaluate, measurably_below
from tests.tiny_models import one_thread  # noqa: F401  (a fixture for every test here)

NAMES = ("places/hidden-garden.md", "places/silver-tower.md")
QUESTIONS = [q for q in bundled.questions() if q.source in NAMES]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, bundled_tokenizer: Any) -> kvstore.OpenStore:
    path = tmp_path_factory.mktemp("asked") / "kv.zarr"
    model = AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype=torch.float32).eval()
    texts = [Document((bundled.corpus_path() / n).read_text(encoding="utf-8"), n) for n in NAMES]
    kvstore.build(texts, path, model, bundled_tokenizer, codec="scalar", regime="both", lossless=True, certify="none")
    return kvstore.open(path, model, bundled_tokenizer)


def cases(*documents: str) -> list[Case]:
    return [Case(q.question, documents or (q.source,), (q.answer,)) for q in QUESTIONS]


# counting and reading


def test_answers_are_counted_as_squad_counts_them() -> None:
    assert normalised(" The  Silver-Tower, a an 4,821. ") == "silvertower 4821"
    assert exact_match("4821.", ["4821"]) == 1 and exact_match("the 4821", ["9", "4821"]) == 1 and exact_match("48 21", ["4821"]) == 0
    assert f1("the keeper is Mercer", ["Mercer"]) == pytest.approx(2 * 1 / (3 + 1))
    assert f1("Mercer Mercer", ["Mercer", "nobody"]) == pytest.approx(2 / 3)
    assert (f1("", ["x"]), f1("the", ["a"]), f1("other", ["words"])) == (0, 1, 0)


def test_lines_are_read(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"query": "Who?", "documents": ["a.md", "b.md#1"], "answer": ["Mercer", "he"], "id": 7},
        {"question": "Where?", "source": "a.md", "answer": "here"},
    ]
    (tmp_path / "q").write_text("\ufeff" + json.dumps(lines[0]) + "\n\n" + json.dumps(lines[1]) + "\n", encoding="utf-8")
    found = read_cases(tmp_path / "q")
    assert found == [Case("Who?", ("a.md", "b.md#1"), ("Mercer", "he"), 1), Case("Where?", ("a.md",), ("here",), 3)]
    assert read_cases(tmp_path / "q", limit=1) == found[:1]
    assert len(read_cases(Path(bundled.__file__).parent / "questions.jsonl")) == len(bundled.questions())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"documents": ["a"], "answer": "x"}', "'query' is missing"),
        ('{"query": ["a", "b"], "documents": ["a"], "answer": "x"}', "several queries"),
        ('{"query": "a", "answer": "x"}', "'documents' is missing"),
        ('{"query": "a", "documents": [], "answer": "x"}', "'documents' is missing"),
        ('{"query": "a", "documents": ["a"], "answer": 5}', "'answer' is missing or no text"),
        ('{"query": " ", "documents": ["a"], "answer": "x"}', "'query' is missing or no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"query": "a", "documents": ["a"], "answer": "x"}'
    (tmp_path / "q").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=f"line 2: .*{message}"):
        read_cases(tmp_path / "q")


def test_files_without_questions(tmp_path: Path) -> None:
    (tmp_path / "q").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "q", tmp_path / "bytes", tmp_path / "none"):
        with pytest.raises(InputError):
            read_cases(path)
    with pytest.raises(InputError, match="0 questions"):
        read_cases(tmp_path / "q", limit=0)


# asking


def test_every_tier_is_asked_and_compared_with_live(store: kvstore.OpenStore) -> None:
    asked = cases()
    seen: list[int] = []
    found = evaluate(store, asked, max_new_tokens=8, progress=lambda n, case: seen.append(n))
    assert seen == list(range(1, len(asked) + 1))
    assert (found.live.questions, found.live.exact, found.live.f1) == (len(asked), 1, 1)
    assert [(t.reuse, t.tier, t.questions) for t in found.totals] == [("prefix", t, len(asked)) for t in ("standard", "fine", "lossless")]
    standard, fine, lossless = found.totals
    assert lossless.kl < fine.kl / 10 and fine.kl < standard.kl < 0.1 and lossless.agreement == lossless.exact == 1
    assert standard.nbytes < fine.nbytes < lossless.nbytes and all(t.ratio > 0 and t.milliseconds > 0 for t in found.totals)
    assert len(found.answers) == 3 * len(asked) and {a.text for a in found.live_answers} == {q.answer + "." for q in QUESTIONS}
    assert "--tier" in found.advice and f"only {len(asked)} questions" in found.advice


def test_kl_is_of_the_live_answer(store: kvstore.OpenStore) -> None:
    """Against a plain computation: the live prompt and answer in one pass, the stored cache and the rest in another."""
    (case,) = cases()[:1]
    (answer,) = evaluate(store, [case], tiers=["standard"], max_new_tokens=4).answers
    prompt = store.compose(case.documents, case.query, tier="standard")
    with torch.inference_mode():
        said = store.model.generate(prompt.input_ids, max_new_tokens=4, do_sample=False)
        n = said.shape[1] - prompt.input_ids.shape[1]
        live = store.model(said[:, :-1]).logits[0, -n:].double().log_softmax(-1)
        rest = said[:, prompt.receipt.cached_tokens : -1]
        stored = store.model(rest, past_key_values=prompt.cache).logits[0, -n:].double().log_softmax(-1)
    assert answer.kl == pytest.approx(float((live.exp() * (live - stored)).sum(-1).mean()), rel=1e-3)


def test_blocks_are_asked_where_a_prefix_does_not_hold_all(store: kvstore.OpenStore) -> None:
    both = [*cases()[:1], *cases(*NAMES)[:1]]
    found = evaluate(store, both, tiers=["fine"], max_new_tokens=8)
    assert [(t.reuse, t.tier, t.questions) for t in found.totals] == [("prefix", "fine", 2), ("blocks", "fine", 1)]
    assert found.advice.count("--reuse") == 2
    alone = evaluate(store, both, tiers=["fine", "standard"], reuse="blocks", max_new_tokens=8)
    assert [(t.reuse, t.tier, t.questions) for t in alone.totals] == [("blocks", "standard", 2), ("blocks", "fine", 2)]
    anew = evaluate(store, both[1:], tiers=["lossless"], reuse="cacheblend", recompute=1.0, max_new_tokens=8)
    assert [(t.reuse, t.questions) for t in anew.totals] == [("cacheblend", 1)] and anew.totals[0].kl < found.totals[1].kl / 10
    with pytest.raises(InputError, match="computes nothing anew"):
        evaluate(store, both, recompute=4)


def test_what_is_not_stored_is_named_before_anything_is_asked(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "compose", None)
    with pytest.raises(NotFoundError, match="line 3: 'nowhere.md'"):
        evaluate(store, [*cases()[:1], Case("Who?", ("nowhere.md",), ("x",), 3)])
    with pytest.raises(NotFoundError, match="draft"):
        evaluate(store, cases()[:1], tiers=["draft"])
    with pytest.raises(InputError):
        evaluate(store, [])


# advising


def test_what_counts_as_measurable() -> None:
    assert not measurably_below([0.0] * 20) and not measurably_below([0.0] * 19 + [-1.0]) and not measurably_below([0.5, 0.0])
    assert measurably_below([-1.0] * 5 + [0.0] * 15) and measurably_below([-0.1] * 3) and measurably_below([-1.0])


def total(tier: str, score: float, nbytes: float, *, differs: bool, reuse: str = "prefix") -> Total:
    return Total(reuse, tier, 40, score, score, score - 0.9, differs, 0.9, 0.01, 1.0, 4.0, nbytes)


def test_advice() -> None:
    live = LiveTotal(40, 0.9, 0.9, 5.0)
    rows = [total("draft", 0.5, 10, differs=True), total("standard", 0.89, 20, differs=False), total("fine", 0.9, 30, differs=False)]
    said = advice(live, rows)
    assert said.startswith("--reuse prefix: --tier standard is the cheapest") and "live 0.90" in said
    assert "4.0 times sooner" in said and "\n" not in said
    unsure = [total("draft", 0.4, 10, differs=False), *rows[1:]]  # three questions cannot tell: what loses so much is not advised all the same
    assert "--tier standard" in advice(live, unsure) and "every tier loses" in advice(live, unsure[:1])
    assert "best: draft" in advice(live, rows[:1]) and "--lossless" in advice(live, rows[:1])
    lost = [total("fine", 0.6, 30, differs=True, reuse="blocks")]
    assert "--reuse blocks: every tier loses answers" in advice(live, [*rows, *lost]) and "one document at a time" in advice(live, lost)
    assert "only 3 questions" in advice(replace(live, questions=3), rows)
    assert "wrong already" in advice(replace(live, f1=0.02), rows)
