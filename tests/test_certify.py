"""What a build measures of its tiers, what is kept of it, and what loads make of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kvstore
from kvstore import Document, bundled, certify
from kvstore.certificates import (
    ArtifactScore,
    TierScore,
    add_report,
    make_report,
    merge,
    read_reports,
    report_names,
    t95,
    upper_bound,
)
from kvstore.certify import Certifier, Sampled
from kvstore.codecs import get_codec
from kvstore.codecs.scalar import ScalarCodec
from kvstore.documents import text_digest
from kvstore.encode import bits_of
from kvstore.errors import IncompatibleError, InputError, IntegrityError
from kvstore.families.assemble import dynamic_cache
from kvstore.families.rope import rotate
from kvstore.gc import collect
from kvstore.manifest import Row
from kvstore.models import ModelSource
from kvstore.plan import Planned, Task
from kvstore.prefill import Prefiller
from kvstore.scoring import compare
from kvstore.snapshot import Change
from kvstore.verify import verify
from tests.tiny_models import one_thread  # noqa: F401  (a fixture for every test here)

NAMES = ("hidden-garden.md", "silver-tower.md", "stone-bridge.md", "old-library.md")
TEXTS = {n: (bundled.corpus_path() / "places" / n).read_text(encoding="utf-8")[:500] for n in NAMES}
QUERY = "What is the access code of the silver tower?"


def documents(*names: str) -> list[Document]:
    return [Document(TEXTS[n], n) for n in names or NAMES]


@pytest.fixture(scope="module")
def model() -> Any:
    """In float32: the noise floor is then far below any tier."""
    return AutoModelForCausalLM.from_pretrained(bundled.model_path(), dtype=torch.float32).eval()


@pytest.fixture
def build(tmp_path: Path, model: Any, bundled_tokenizer: Any) -> Any:
    def run(found: Sequence[Document], **options: Any) -> kvstore.BuildReport:
        return kvstore.build(found, tmp_path / "kv.zarr", model, bundled_tokenizer, **{"codec": "scalar", **options})

    return run


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, model: Any, bundled_tokenizer: Any) -> tuple[Path, kvstore.BuildReport]:
    """Four documents with a system prompt before them, two of which were sampled. Read only."""
    path = tmp_path_factory.mktemp("sampled") / "kv.zarr"
    options: dict[str, Any] = {"codec": "scalar", "system": "You answer from the text.", "certify_documents": 2}
    return path, kvstore.build(documents(), path, model, bundled_tokenizer, **options)


@pytest.fixture(scope="module")
def store(sampled: tuple[Path, kvstore.BuildReport], model: Any, bundled_tokenizer: Any) -> kvstore.OpenStore:
    return kvstore.open(sampled[0], model, bundled_tokenizer)


def encoding_of(store: Any) -> str:
    return next(iter(store.encodings()))


# the figures


def test_students_t() -> None:
    table = {1: 6.314, 2: 2.920, 4: 2.132, 5: 2.015, 7: 1.895, 10: 1.812, 20: 1.725, 60: 1.671, 10_000: 1.645}
    assert {n: round(t95(n), 3) for n in table} == pytest.approx(table, abs=0.0015)


def test_the_upper_bound_is_by_document() -> None:
    kls = [0.1, 0.2, 0.3, 0.2]
    plain = 0.2 + t95(3) * np.std(kls, ddof=1) / 2
    assert upper_bound(["a", "b", "c", "d"], [50.0] * 4, kls) == pytest.approx(plain)
    halves = upper_bound(["a", "a", "b", "b", "c", "c", "d", "d"], [25.0] * 8, [k for k in kls for _ in "xx"])
    assert halves == pytest.approx(plain)  # two artifacts of one document tell no more than one
    assert upper_bound(["a", "a"], [1.0, 2.0], [0.1, 0.2]) is None


def score(artifact: str, kl: float, tokens: int = 100, document: str = "") -> ArtifactScore:
    return ArtifactScore(artifact * 64, (document or artifact) * 64, tokens, 1e-5, (TierScore("fine", kl, 2 * kl, 4 * kl, 0.5, -kl),))


def test_reports_are_read_together() -> None:
    first = make_report("0" * 64, "1" * 64, [score("a", 0.4), score("b", 0.1)], {"fine": 0.9}, {})
    second = make_report("0" * 64, "1" * 64, [score("a", 0.2), score("c", 0.6, tokens=200)], {"fine": 0.7}, {})
    merged = merge([first, second])
    fine = merged.tiers["fine"]
    assert (fine.documents, fine.tokens, fine.p99, fine.max) == (3, 400, 0.9, 2.4)  # the later score of a counts
    assert fine.kl == pytest.approx((0.2 + 0.1 + 2 * 0.6) / 4) and fine.upper is not None and fine.upper > fine.kl
    assert merged.artifacts["a" * 64]["fine"] == 0.2
    assert merge([]).tiers == {}


def test_kl_is_that_of_the_definition() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]] * 40), torch.tensor([[0.25, 0.5, 0.25]] * 40)
    found = compare(p.log() + 3.0, q.log(), [1] * 39)
    assert found.kl == pytest.approx([0.5 * np.log(2.0) - 0.25 * np.log(2.0)] * 40, rel=1e-5)
    assert (found.agreement, found.change) == (0.0, pytest.approx(np.log(2.0), rel=1e-5))
    same = compare(p.log(), p.log(), [0] * 40)
    assert (same.kl.max(), same.agreement, same.change) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(("tokens", "split", "scored"), [(32, 16, 16), (48, 32, 16), (90, 60, 30), (3000, 2000, 256)])
def test_splits(tokens: int, split: int, scored: int) -> None:
    found = Sampled("a", "", Task("", None, ((1,),), tuple(range(tokens))))  # type: ignore[arg-type]
    assert (found.split, len(found.scored), found.scored[0]) == (split, scored, split)


# a build's report


def test_a_build_measures_a_sample(sampled: tuple[Path, kvstore.BuildReport], store: kvstore.OpenStore) -> None:
    report = sampled[1]
    assert report.seconds["certify"] > 0 and report.notes == [] and report.poor_fit == []
    standard, fine = report.quality["standard"], report.quality["fine"]
    assert list(report.quality) == ["standard", "fine"] and standard["documents"] == fine["documents"] == 2
    assert standard["noise"] < fine["kl"] < standard["kl"] < standard["upper"]
    assert standard["kl"] < standard["p99"] <= standard["max"] and standard["agreement"] > 0.8
    (kept,) = read_reports(store.storage, encoding_of(store))
    assert [msgspec.structs.asdict(t) for t in kept.tiers] == list(report.quality.values())
    own, bound = merge([kept]).artifacts, store.quality(encoding_of(store), kept.model).tiers["fine"].upper
    found = {a.stored[0].id: a.quality["fine"] for a in map(store.artifact, NAMES)}
    assert {k for k in found if k in own} == own.keys() and len(own) == 2
    assert all(kl == (own[k]["fine"] if k in own else bound) for k, kl in found.items())


def test_the_score_is_what_a_load_would_say(store: kvstore.OpenStore, model: Any) -> None:
    """The same figure from the parts: parent and beginning encoded, decoded by the codec, rotated by hand, and read on after."""
    (kept,) = read_reports(store.storage, encoding_of(store))
    wanted = kept.artifacts[0]
    stored = next(s for s in (store.artifact(n).stored[0] for n in NAMES) if s.id == wanted.artifact)
    ids, head, prefiller = stored.ids.tolist(), tuple(store.templates()[0].head.ids), Prefiller(model, stored.pack.layout)
    split = min(2 * len(ids) // 3, len(ids) - 16)
    parts = [rebuilt(prefiller.run(head, ()), stored, 0), rebuilt(prefiller.run(ids[:split], (head,)), stored, len(head))]
    layers = [(torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2)) for a, b in zip(*parts, strict=True)]
    rest = torch.tensor([ids[split : split + 256]])
    with torch.inference_mode():
        live = model(torch.tensor([[*head, *ids]])).logits[0, len(head) + split :][: rest.shape[1]].double().log_softmax(-1)
        found = model(rest, past_key_values=dynamic_cache(model.config, layers)).logits[0].double().log_softmax(-1)
    kl = float((live.exp() * (live - found)).sum(-1).mean())
    assert wanted.tokens == rest.shape[1] and wanted.tiers[0].kl == pytest.approx(kl, rel=1e-3)


def rebuilt(values: Any, stored: Any, position: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V [1, heads, tokens, head_dim] at the base tier."""
    spec, layout, found = stored.encoding.codecs[0], stored.pack.layout, []
    codec = get_codec(spec.name, spec.version, spec.params)
    for layer, one in enumerate(values):
        bits = bits_of([one])
        out = np.empty(bits.shape, np.float32)
        codec.decode(codec.encode(bits, layout.dtype)[:1], out)
        keys, vals = (torch.from_numpy(x).view(-1, layout.kv_heads, layout.head_dim).transpose(0, 1) for x in out[0])
        positions = torch.arange(position, position + keys.shape[1])
        found.append((rotate(keys, positions, layout.ropes[layout.rope_of[layer]])[None], vals[None]))
    return found


def test_a_worse_codec_measures_worse(build: Any, sampled: tuple[Path, kvstore.BuildReport], monkeypatch: pytest.MonkeyPatch) -> None:
    version, params = ScalarCodec.version, ScalarCodec.default_params(64)
    assert version == 1
    monkeypatch.setattr(ScalarCodec, "default_params", staticmethod(lambda head_dim: params | {"key_step": 1500, "value_step": 1500}))
    report = build(documents(), certify="all", system="You answer from the text.")
    for tier in ("standard", "fine"):
        assert report.quality[tier]["documents"] == 4
        assert report.quality[tier]["kl"] > 2 * sampled[1].quality[tier]["upper"] and report.quality[tier]["agreement"] < 1


def test_both_regimes_of_a_document_are_scored_as_one_document(build: Any) -> None:
    report = build(documents(*NAMES[:2]), regime="both", system="You answer from the text.", lossless=True)
    assert report.quality["fine"]["documents"] == 2 and list(report.quality) == ["standard", "fine"]
    found = kvstore.open(report.store)
    (kept,) = read_reports(found.storage, encoding_of(found))
    assert len(kept.artifacts) == 4 and len({a.document for a in kept.artifacts}) == 2
    assert all(found[n].quality["lossless"] == 0 for n in NAMES[:2])


def test_what_calls_for_no_report(build: Any) -> None:
    assert build(documents(NAMES[0]), codec="raw").quality == {}
    assert build(documents(NAMES[0]), certify="none").quality == {}
    assert not kvstore.open(build(documents(NAMES[0]), codec="raw").store).storage.names(".kvstore/quality")
    for wrong in ({"certify": "some"}, {"certify_documents": 0}):
        with pytest.raises(InputError):
            build(documents(NAMES[0]), **wrong)


def test_short_documents_give_none_and_it_is_said(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvstore"):
        report = build([Document("The keeper is Mercer.", "a"), Document("The owner is Vickers.", "b")])
    assert report.quality == {} and "nothing to score in 2 new documents (2 shorter than 32 tokens)" in report.notes[0]
    assert kvstore.open(report.store)["a"].quality == {"standard": None, "fine": None}


def test_an_unchanged_build_measures_nothing_and_loads_no_model(tmp_path: Path) -> None:
    source = ModelSource(None, dtype="float32")
    first = kvstore.build(documents(), tmp_path / "s", source, codec="scalar")
    again = ModelSource(None, dtype="float32")
    report = kvstore.build(documents(), tmp_path / "s", again, codec="scalar")
    assert first.quality and report.quality == {} and report.seconds["certify"] == 0 and "model" not in again.__dict__
    found = kvstore.open(tmp_path / "s")
    assert len(report_names(found.storage, encoding_of(found))) == 1


# the sample


def planned(source: str, text: str, tokens: int = 64) -> Planned:
    row = Row(source, "0" * 64, "0" * 64, "0" * 64, text_digest(text), "", None, ())
    return Planned(row, (Task("head", None, (), (1,)), Task(source, None, ((1,),), tuple(range(tokens)))), True)  # type: ignore[arg-type]


def certifier(store: kvstore.OpenStore, **options: Any) -> Certifier:
    record = store.models()[0]
    return Certifier(record.model, record.layout, store.encodings()[encoding_of(store)], **options)


def test_the_sample_is_the_same_in_any_order(store: kvstore.OpenStore) -> None:
    found = []
    for order in (range(50), reversed(range(50))):
        one = certifier(store, documents=5)
        for n in order:
            one.offer(planned(f"{n}.md", f"text {n}"))
        found.append(sorted(s[0].source for *_, s in one.chosen))
    assert found[0] == found[1] and len(found[0]) == 5


def test_documents_that_calibrated_never_score(store: kvstore.OpenStore, model: Any) -> None:
    one = certifier(store)
    one.calibrated = {text_digest("seen")}
    one.offer(planned("seen.md", "seen"))
    result = one.finish(store, Prefiller(model, one.layout), {})
    assert result.report is None and "1 calibrated the codec" in result.notes[0]
    one.offer(planned("unseen.md", "unseen"))
    assert [s[0].source for *_, s in one.chosen] == ["unseen.md"]


def test_the_calibrations_texts_are_those_left_out(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(record=SimpleNamespace(texts=("a" * 64,), kl=(0.1, 0.01)))
    monkeypatch.setattr(certify.registry, "find", lambda digest: found)
    record, encoding = store.models()[0], store.encodings()[encoding_of(store)]
    spec = msgspec.structs.replace(encoding.codecs[0], calibration="c" * 64)
    one = Certifier(record.model, record.layout, msgspec.structs.replace(encoding, codecs=(spec,)))
    assert one.calibrated == {"a" * 64} and one._usual(store) == 0.01


def test_documents_that_fit_badly_are_named(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = build(documents(NAMES[0]))
    assert first.poor_fit == [] and first.quality["fine"]["upper"] is None
    found = kvstore.open(first.store)
    (kept,) = read_reports(found.storage, encoding_of(found))
    better = [msgspec.structs.replace(a, tiers=tuple(msgspec.structs.replace(t, kl=t.kl / 1000) for t in a.tiers)) for a in kept.artifacts]
    add_report(found.storage, make_report(kept.model, kept.encoding, better, {"standard": 0.0, "fine": 0.0}, {}))
    with caplog.at_level(logging.WARNING, "kvstore"):
        second = build(documents(*NAMES[:3]))
    assert second.poor_fit == [NAMES[1], NAMES[2]] and "fits badly" in second.notes[0]
    assert NAMES[1] in caplog.text and "--lossless" in caplog.text


def test_output_that_is_not_finite_gives_no_certificate(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = compare, iter(range(100))

    def broken(live: Any, found: Any, following: Any) -> Any:
        """Two noise floors, two tiers of the first document, then those of the second: one of them."""
        return replace(whole(live, found, following), change=float("nan") if next(calls) == 4 else 0.0)

    monkeypatch.setattr(certify, "compare", broken)
    report = build(documents(*NAMES[:2]))
    assert report.quality == {} and "not finite" in report.notes[0]
    found = kvstore.open(report.store)
    assert report_names(found.storage, encoding_of(found)) == []  # that of the sound one would promise the other's quality


# what loads make of it


def test_max_kl_takes_the_cheapest_tier_that_keeps_it(store: kvstore.OpenStore) -> None:
    name = next(n for n in NAMES if store.known(store[n].stored[0], store[n].encoding.tiers[0]).source == "artifact")
    coarse, fine = (store[name].quality[t] for t in ("standard", "fine"))
    assert coarse is not None and fine is not None

    def chosen(limit: float) -> Any:
        return store.load(name, max_kl=limit).receipt.documents[-1]

    found = chosen(coarse * 1.01)
    assert (found.fidelity, found.kl, found.kl_from) == ("standard", coarse, "artifact") and f"standard (KL {coarse:.2g})" in str(found.shown)
    assert chosen(fine * 1.01).fidelity == "fine"
    assert store.read(name, max_kl=coarse * 1.01)[2]["kl"] == coarse
    with pytest.raises(IncompatibleError, match="no stored tier has a KL of at most") as caught:
        chosen(fine / 2)
    assert caught.value.code == "too-coarse"
    other = next(n for n in NAMES if store.known(store[n].stored[0], store[n].encoding.tiers[0]).source == "report")
    receipt = store.compose([other], QUERY, tier="fine").receipt
    assert receipt.documents[-1].kl_from == "report" and "fine (KL up to " in str(receipt)


def test_unmeasured_tiers_are_refused_unless_there_is_an_exact_one(build: Any, model: Any, bundled_tokenizer: Any) -> None:
    report = build(documents(NAMES[0]), certify="none")
    found = kvstore.open(report.store, model, bundled_tokenizer)
    with pytest.raises(IncompatibleError) as caught:
        found.load(NAMES[0], max_kl=10.0)
    assert caught.value.code == "unmeasured"
    assert "KL not measured" in str(found.load(NAMES[0]).receipt)
    build(documents(NAMES[0]), certify="none", lossless=True)
    exact = next(id for id, e in kvstore.open(report.store).encodings().items() if len(e.tiers) == 3)
    both = kvstore.open(report.store, model, bundled_tokenizer, encoding=exact)
    assert both.load(NAMES[0], max_kl=10.0).receipt.documents[-1].fidelity == "lossless"


def test_a_damaged_report_is_refused(build: Any, model: Any, bundled_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    report = build(documents(*NAMES[:2]))
    found = kvstore.open(report.store, model, bundled_tokenizer)
    (name,) = report_names(found.storage, encoding_of(found))
    path = found.storage.path(name)
    path.write_text(path.read_text().replace('"agreement":', '"agreement": ', 1).replace('"documents":2', '"documents":3', 1))
    found = kvstore.open(report.store, model, bundled_tokenizer)
    with pytest.raises(IntegrityError, match="does not match its digest"):
        found.quality(encoding_of(found), found.models()[0].model.key)
    with pytest.raises(IntegrityError):
        found.load(NAMES[0], max_kl=10.0)
    assert found.load(NAMES[0], tier="fine").receipt.documents[-1].kl is None and "does not match" in caplog.text
    assert [(p.where, p.severity) for p in verify(found).problems] == [(name, "error")]
    (path.parent / "000002.json").write_text("{}")
    (path.parent / "notes.txt").write_text("")
    assert sorted(p.severity for p in verify(found).problems) == ["error", "error", "notice"]


def test_a_report_under_another_encodings_name_is_refused(build: Any) -> None:
    found = kvstore.open(build(documents(*NAMES[:2])).store)
    (name,) = report_names(found.storage, encoding_of(found))
    other = found.storage.path(".kvstore/quality") / ("0" * 64)
    found.storage.path(name).parent.rename(other)
    assert found["silver-tower.md"].quality["fine"] is None
    with pytest.raises(IntegrityError):
        found.quality("0" * 64, found.models()[0].model.key)


def test_reports_are_of_one_model(store: kvstore.OpenStore) -> None:
    """Encodings without a calibration are the same for every model; what they lose is not."""
    key = store.models()[0].model.key
    assert store.quality(encoding_of(store), key).tiers and not store.quality(encoding_of(store), "f" * 64).tiers


def test_gc_takes_the_reports_of_encodings_that_no_pack_has(build: Any) -> None:
    report = build(documents(*NAMES[:2]))
    lossy = encoding_of(found := kvstore.open(report.store))
    kept = report_names(found.storage, lossy)
    assert collect(found, grace_seconds=0.0).reports_removed == [] and report_names(found.storage, lossy) == kept
    build(documents(*NAMES[:2]), codec="raw")
    found = kvstore.open(report.store)
    found.snapshots.commit(Change(removed=tuple(r.id for r in found.rows(encoding=lossy))), "rm")
    rules: dict[str, Any] = {"keep_snapshots": 1, "grace_seconds": 0.0}
    assert collect(found, dry_run=True, **rules).reports_removed == [lossy] and report_names(found.storage, lossy) == kept
    assert collect(found, **rules).reports_removed == [lossy] and not report_names(found.storage, lossy)
    assert verify(found).ok


def test_an_interrupt_costs_the_report_alone(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Certifier, "finish", interrupted)
    report = build(documents(NAMES[0]))
    assert report.interrupted and report.snapshot == 1 and len(kvstore.open(report.store)) == 1
