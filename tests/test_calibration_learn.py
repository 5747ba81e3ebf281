"""Learning a calibration: the metric, the statistics, the tables, the step, and a build that calibrates by itself."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvstore
from kvstore.calibration import fit_tables, learn, metric
from kvstore.calibration.checks import usable_thirds, usable_weights
from kvstore.calibration.files import seal
from kvstore.calibration.fit_tables import Counts, class_of, costs, fit
from kvstore.calibration.learn import Choices, Learner
from kvstore.calibration.live import Live
from kvstore.calibration.metric import fisher_blocks, measure, regularised
from kvstore.calibration.sample import Excerpt, Pool, pooled
from kvstore.calibration.solve import solve, stored_metric
from kvstore.calibration.statistics import Grouping, Moments, default_group_layers, moments, ordinary
from kvstore.calibration.target import Search
from kvstore.calibration.trial import count
from kvstore.documents import Document, text_digest
from kvstore.errors import InputError, NotFoundError
from kvstore.template import Renderer, make_template
from kvstore.tokens import TextEncoder
from tests.small_tokenizers import gpt2
from tests.tiny_models import OddAttention, make, measured, odd_model, one_thread  # noqa: F401

WORDS = "the old lantern hangs by a door of an inn where nobody lights it when fog comes in from sea and stays until noon".split()


def text(seed: int, words: int = 200) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, words))


def excerpts(count: int = 3, tokens: int = 48) -> list[Excerpt]:
    draw = np.random.default_rng(1)
    return [Excerpt(tuple(int(i) for i in draw.integers(3, 150, tokens)), 1) for _ in range(count)]


def quiet(tokens: int) -> None:
    """Nobody watches."""


@pytest.fixture
def live() -> Live:
    return Live(*measured("llama"))


# the metric


def test_gradients_are_those_of_the_drawn_tokens_likelihood(live: Live) -> None:
    ids = excerpts(1, 40)[0].ids
    x = live.values(ids)[:24]
    gradient = metric._gradient(live, x, ids, torch.Generator().manual_seed(5))
    with torch.no_grad():
        chances = live.following(x, ids[24:], ids[:24]).softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(5))
        for seed in range(4):
            way = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            ends = [live.following(x + s * 3e-3 * way, ids[24:], ids[:24]).double().log_softmax(-1).gather(-1, drawn).sum() for s in (1, -1)]
            assert float((gradient * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / 6e-3, rel=0.03, abs=1e-2)


def test_values_and_what_follows_them_are_the_models_own(live: Live) -> None:
    ids = excerpts(1, 40)[0].ids
    with torch.no_grad():
        whole = live.model(torch.tensor([ids])).logits[0, 24:]
        assert torch.allclose(live.following(live.values(ids)[:24], ids[24:], ids[:24]), whole, atol=1e-4)


def test_fisher_blocks_are_symmetric_positive_and_the_same_for_a_seed(live: Live) -> None:
    first, again = (fisher_blocks(live, excerpts(), 3, quiet) for _ in range(2))
    assert torch.equal(first, again) and first.dtype == torch.float64
    assert torch.allclose(first, first.mT) and float(torch.linalg.eigvalsh(first).min()) > -1e-9
    assert not torch.equal(first, fisher_blocks(live, excerpts(), 4, quiet))
    assert all(p.requires_grad for p in live.model.parameters())


def test_attention_blocks_keep_heads_apart_and_leave_the_model_as_it_was(live: Live) -> None:
    found = measure("attention", live, excerpts(), 0, quiet)
    assert found.metric == "attention" and live.model.config._attn_implementation == "sdpa"
    assert float(found.blocks[..., :16, 16:].abs().max()) == 0 and float(torch.linalg.eigvalsh(found.blocks[:, 0]).min()) > -1e-12
    assert float(found.blocks.diagonal(dim1=-2, dim2=-1).min()) > 0


@pytest.mark.parametrize("gradient", ["raises", "zero", "nan"])
def test_without_gradients_the_metric_is_attention_and_says_so(
    live: Live, gradient: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(leaf: Any, *rest: Any) -> Any:
        if gradient == "raises":
            raise RuntimeError("no backward of a quantized product")
        return (torch.full_like(rest[0], 0.0 if gradient == "zero" else math.nan),)

    monkeypatch.setattr(torch.autograd, "grad", broken)
    with caplog.at_level(logging.WARNING, logger="kvstore"):
        assert measure("fisher", live, excerpts(1), 0, quiet).metric == "attention"
    assert "no Fisher metric" in caplog.text


def test_attention_that_cannot_be_watched_leaves_the_identity(caplog: pytest.LogCaptureFixture) -> None:
    from kvstore.families.measure import require_layout

    model = odd_model(OddAttention)
    with caplog.at_level(logging.WARNING, logger="kvstore"):
        found = measure("attention", Live(model, require_layout(model)), excerpts(1), 0, quiet)
    assert found.metric == "identity" and "cannot be watched" in caplog.text
    assert torch.equal(found.blocks[0, 0], torch.eye(found.blocks.shape[-1], dtype=torch.float64))


def test_a_block_without_gradient_becomes_a_tiny_identity() -> None:
    blocks = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    blocks[0] = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    found = regularised(blocks)
    assert torch.allclose(found[0, 0].diagonal(), torch.tensor([4.06, 2.06, 1.06, 1.06], dtype=torch.float64))
    assert torch.allclose(found[1, 1], 2e-6 * torch.eye(4, dtype=torch.float64))


def test_small_models_run_in_float32_and_the_given_one_stays() -> None:
    model, layout = measured("llama", torch.bfloat16)
    live = Live(model, layout)
    assert live.model.dtype == torch.float32 and live.layout.dtype == "float32" and model.dtype == torch.bfloat16
    assert Live(model, layout, widen=False).model is model


# statistics


def test_massive_tokens_are_exempt_and_move_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, 2, 8, generator=draw) * torch.linspace(0.5, 2, 8)
    x[::64, 0] += 300.0  # the first token of short sequences, in the first layer alone
    grouping, weights = Grouping(2, 1), torch.ones(2, 2, 8)
    chosen = ordinary(x[:500], grouping, weights)
    assert chosen.limit == 16.0
    kept = chosen.kept(x)
    assert kept[:, 1].all() and torch.equal(~kept[:, 0], torch.arange(2000) % 64 == 0)
    first, second = moments([x[:700], x[700:]], chosen)
    assert (first.exempt, first.tokens, second.exempt) == (32, 1968, 0)
    wanted = torch.linspace(0.5, 2, 8).repeat(2).double() ** 2
    assert torch.allclose(first.covariance.diagonal(), wanted, rtol=0.15) and float(first.mean.abs().max()) < 0.2


def test_moments_are_those_of_all_tokens_at_once() -> None:
    x = torch.randn(300, 3, 2, 4, generator=torch.Generator().manual_seed(1)) + 5
    grouping = Grouping(3, 2)
    found = moments(x.split(77), ordinary(x, grouping, torch.ones(3, 2, 4)))
    for one, part in zip(found, grouping.split(x), strict=True):
        assert torch.allclose(one.mean, part.double().mean(0)) and torch.allclose(one.covariance, part.double().T.cov(correction=0), atol=1e-6)


def test_default_groups() -> None:
    assert [default_group_layers(*g) for g in ((6, 128), (32, 1024), (12, 64), (11, 64), (4, 8192))] == [6, 4, 3, 11, 1]


def test_solve_recovers_a_known_spectrum() -> None:
    draw = torch.Generator().manual_seed(2)
    blocks = torch.randn(2, 16, 16, generator=draw, dtype=torch.float64)
    stored = stored_metric(blocks @ blocks.mT)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=draw, dtype=torch.float64))[0]
    variances = 3.0 ** -torch.arange(32, dtype=torch.float64).div(4)
    values, vectors = torch.linalg.eigh(stored.wide)
    inverse = torch.block_diag(*((vectors * values[:, None] ** -0.5) @ vectors.mT))
    covariance = inverse @ (turn * variances) @ turn.T @ inverse
    found = solve(Moments(torch.zeros(32, dtype=torch.float64), covariance, 1, 0), stored, slice(0, 2))
    assert np.allclose(found.sigma, variances.sqrt().numpy(), rtol=1e-4)
    assert np.allclose(found.basis.analysis().T @ found.basis.synthesis(32).T, np.eye(32), atol=0.02)


def test_rounding_never_leaves_an_indefinite_metric() -> None:
    spike = torch.randn(1, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored = stored_metric((1e6 * spike.T @ spike)[None])
    assert float(torch.linalg.eigvalsh(stored.wide).min()) > 0


# classes and tables


def drawn_counts(sigmas: np.ndarray[Any, Any], tokens: int = 4000, tiers: int = 3) -> Counts:
    draw = np.random.default_rng(7)
    values = (draw.laplace(size=(tokens, len(sigmas))) * sigmas / math.sqrt(2)).astype(np.float32)
    return count(iter([torch.from_numpy(values)]), 1.0, tiers)


SIGMAS = np.geomspace(40, 0.05, 160)


def test_tables_are_usable_and_cost_what_the_entropy_says() -> None:
    counts = drawn_counts(SIGMAS)
    found = fit(counts, class_of(SIGMAS, 1.0))
    assert all(map(usable_weights, found.weights)) and all(map(usable_thirds, found.thirds))
    pooled, cost = fit_tables.pooled(counts, found.classes).astype(float), costs(found.weights)
    share = pooled / np.maximum(pooled.sum(1, keepdims=True), 1)
    entropy = -(pooled * np.log2(np.where(share > 0, share, 1))).sum() + pooled[:, 1:].sum()  # a bit for each sign
    assert entropy <= (pooled * cost).sum() <= 1.01 * entropy
    assert np.isin(class_of(SIGMAS, 1.0) - found.classes, range(-2, 3)).mean() > 0.9
    assert 8 <= found.least <= 22


def test_the_ladder_costs_what_single_tiers_cost() -> None:
    found = fit(drawn_counts(SIGMAS), class_of(SIGMAS, 1.0))
    assert found.bits[0] == found.ladder[0] < found.ladder[1] < found.ladder[2]
    assert found.ladder[2] == pytest.approx(found.bits[2], rel=0.02)


def test_counts_split_cells_as_the_codec_does() -> None:
    levels = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [3.0], [-4.0], [5.0], [200.0]])
    counts = count(iter([levels]), 1.0, 2)
    assert counts.levels[1, 0, [0, 1, 2, 3, 4, 5, 128]].tolist() == [1, 2, 1, 1, 1, 1, 1]
    assert counts.levels[0, 0, :3].tolist() == [3, 3, 1] and counts.thirds[0, 0].tolist() == [1, 2, 3, 1, 1]


def test_classes_without_data_keep_the_built_in_tables() -> None:
    found = fit(drawn_counts(np.full(4, 1.0), tiers=1), np.full(4, 24))
    for c in (3, 40):
        assert found.weights[c][: len(fit_tables.BASE[c])].tolist() == list(fit_tables.BASE[c])


@pytest.mark.parametrize(("power", "first"), [(1.7, 1e-4), (2.4, 5.0), (-0.8, 30.0)])
def test_the_search_meets_its_target(power: float, first: float) -> None:
    step = Search(lambda s: 3.0 * s**power, 0.02, math.copysign(1.7, power)).run(first)
    assert 3.0 * step**power == pytest.approx(0.02, rel=0.05)


# the sample


def corpus() -> list[Document]:
    many = [Document(text(i), f"notes/{i}.md") for i in range(30)]
    return [*many, *(Document(text(100 + i), f"letters/{i}.txt") for i in range(2)), Document(text(200, 9000), "book.txt")]


def test_every_kind_of_document_comes_in_turn_whatever_the_order() -> None:
    found, again = (list(pooled(d, 0, 10000).drawn()) for d in (corpus(), corpus()[::-1]))
    assert found == again and found != list(pooled(corpus(), 1, 10000).drawn())
    letters = {text_digest(text(100 + i)) for i in range(2)}
    assert {t for t, _ in found[:6]} & letters and text_digest(text(200, 9000)) in {t for t, _ in found[:3]}
    assert len({t for t, _ in found}) < 33  # some are spared to be scored


def test_a_pool_keeps_no_more_than_it_needs() -> None:
    pool = Pool(0, 100)
    for i in range(50):
        pool.add(Document(text(i), f"{i}.txt"))
    assert sum(sum(map(len, t.pieces)) for heap in pool._strata.values() for _, t in heap) < 3 * pool.room


# all together


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A tiny model with a tokenizer of its own; calibrations take a few thousand tokens."""
    tokenizer = gpt2()
    monkeypatch.setattr(learn, "LEAST", 1024)
    monkeypatch.setattr(learn, "PER_DIMENSION", 8)
    return (
        make("llama", {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}),
        tokenizer,
    )


def learned(small: tuple[Any, Any], documents: list[Document], **choices: Any) -> learn.Learned:
    from kvstore.families.measure import require_layout

    encoder = TextEncoder(small[1])
    renderer = Renderer(make_template("plain", small[1], None, encoder=encoder), encoder)
    learner = Learner(Live(small[0], require_layout(small[0])), "0" * 64, Choices(**choices), {})
    return learner.learn(pooled(documents, choices.get("seed", 0), learner.tokens), renderer, 128)


def test_a_seed_gives_one_calibration_that_meets_its_target(small: tuple[Any, Any]) -> None:
    first, again = (learned(small, corpus(), target_kl=2e-3, tokens=2048) for _ in range(2))
    sealed = seal(first.calibration)
    assert sealed.digest == seal(again.calibration).digest != seal(learned(small, corpus(), target_kl=2e-3, tokens=2048, seed=1).calibration).digest
    record = sealed.record
    assert 1e-3 < record.kl[-1] < 4e-3 < record.kl[0] and record.metric == "fisher" and first.sampled == 0
    assert record.texts and len(record.kl) == 3 and first.bits[0] < first.bits[1] < first.bits[2]


def test_a_ratio_can_be_asked_for_and_one_tier(small: tuple[Any, Any]) -> None:
    found = learned(small, corpus(), target_ratio=12.0, tokens=1024, tiers=1, metric="identity", group_layers=1)
    assert 16 / found.bits[-1] == pytest.approx(12, rel=0.1) and len(found.calibration.bases) == 2 and len(seal(found.calibration).record.kl) == 1


def test_without_text_the_model_writes_its_own(small: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kvstore"):
        found = learned(small, [], tokens=512, metric="attention")
    assert found.sampled >= 512 + 256 and found.documents == 0 and seal(found.calibration).record.texts == ()
    assert "fewer than" in caplog.text


def test_choices_that_make_no_sense_are_refused() -> None:
    for wrong in (
        {"tiers": 4},
        {"target_kl": 0.0},
        {"target_ratio": 0.5},
        {"target_kl": 1e-3, "target_ratio": 8.0},
        {"metric": "hessian"},
        {"tokens": 0},
    ):
        with pytest.raises(InputError):
            Choices(**wrong).check()  # type: ignore[arg-type]


def test_a_build_calibrates_once_and_reads_back(small: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = small
    documents, path = corpus()[:8], tmp_path / "kv.zarr"
    dry = kvstore.build(documents, path, model, tokenizer, dry_run=True, reserve=16, certify="none")
    assert dry.calibration == "" and dry.compiled == 8 and not path.exists()
    first = kvstore.build(iter(documents), path, model, tokenizer, reserve=16, certify="none", target_kl=1e-3)
    assert first.compiled == 8 and first.seconds["calibrate"] > 0 and list(first.nbytes) == ["draft", "standard", "fine"]
    again = kvstore.build(documents, path, model, tokenizer, reserve=16, certify="none")
    assert (again.unchanged, again.compiled, again.calibration, again.seconds["calibrate"]) == (8, 0, first.calibration, 0.0)
    store = kvstore.open(path, model, tokenizer)
    from kvstore.families.capture import prefill
    from kvstore.families.measure import require_layout

    stored = store.artifact("notes/3.md").stored[0]
    sizes = [stored.nbytes(t) for t in ("draft", "standard", "fine")]
    assert sizes == sorted(sizes)
    assert store.load("notes/3.md", tier="fine").receipt.documents[1].action == "reused"
    assert prefill(model, require_layout(model), [1, 2, 3])  # the model is as it was


def test_calibrating_again_replaces_what_is_stored(small: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = small
    path, options = tmp_path / "kv.zarr", {"reserve": 16, "certify": "none"}
    first = kvstore.build(corpus()[:4], path, model, tokenizer, metric="identity", **options)
    report = kvstore.calibrate(corpus()[:6], path, model, tokenizer, metric="identity", tokens=512, tiers=2)
    assert report.current == report.digest != first.calibration and len(report.kl) == 2
    second = kvstore.build(corpus()[:4], path, model, tokenizer, **options)
    assert second.calibration == report.digest and second.compiled == 4 and list(second.nbytes) == ["standard", "fine"]
    assert len(kvstore.open(path).rows()) == 4
    third = kvstore.build(corpus()[:4], path, model, tokenizer, metric="identity", recalibrate=True, **options)
    assert (third.compiled == 4 and third.calibration not in (first.calibration, second.calibration)) or third.calibration == first.calibration


def test_a_store_half_recalibrated_serves_the_new_half(small: tuple[Any, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Documents that were not built again count as not stored; nothing of the other calibration is mixed in."""
    model, tokenizer = small
    path, options = tmp_path / "kv.zarr", {"reserve": 16, "certify": "none"}
    kvstore.build(corpus()[:2], path, model, tokenizer, metric="identity", **options)
    kvstore.calibrate(corpus()[:6], path, model, tokenizer, metric="identity", tokens=512, tiers=2)
    kvstore.build(corpus()[:1], path, model, tokenizer, **options)
    (new, old), store = corpus()[:2], kvstore.open(path, model, tokenizer)
    with caplog.at_level("WARNING"):
        assert store.compose([new.source], "Why?").receipt.documents[1].action == "reused"
    assert "1 documents were compiled with an older calibration" in caplog.text
    with pytest.raises(NotFoundError):
        store.compose([old.source], "Why?")
    assert store.compose([old], "Why?").receipt.documents[1].action == "prefilled"


def test_calibrating_again_forgets_no_regime_and_no_file(small: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = small
    monkeypatch.setattr(learn, "LEAST", 512)
    monkeypatch.setattr("kvstore.calibration.target.TRIES", 1)
    path, options = tmp_path / "kv.zarr", {"reserve": 16, "certify": "none", "metric": "identity", "system": "Be brief."}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").write_text(text(len(name) + ord(name[0])))
    kvstore.build([tmp_path / "one"], path, model, tokenizer, regime="both", **options)
    (before,) = kvstore.open(path).rows()
    kvstore.build([tmp_path / "one"], path, model, tokenizer, recalibrate=True, target_kl=0.1, **options)
    (after,) = kvstore.open(path).rows()
    assert after.encoding != before.encoding and after.passages == before.passages
    assert after.passages[0].isolated not in (None, after.passages[0].prefix)
    kvstore.calibrate([tmp_path / "one"], path, model, tokenizer, metric="identity", target_kl=0.2)
    with pytest.raises(InputError, match="names two files"):  # a.md of the other folder would be gone
        kvstore.build([tmp_path / "two"], path, model, tokenizer, **options)
    assert [r.id for r in kvstore.open(path).rows()] == [after.id]
