"""Chains of documents: compiled from a query log, reused in their order only, cut where tokens part, kept and dropped with their documents."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import kvstore
from kvstore import Document, chain_log
from kvstore.build_report import BuildReport
from kvstore.detail import show
from kvstore.diff import diff
from kvstore.errors import InputError, NotFoundError
from kvstore.gc import collect, remove
from kvstore.inventory import documents as listed
from kvstore.inventory import stats
from kvstore.models import ModelSource
from kvstore.snapshot import Change
from kvstore.verify import verify
from tests import tiny_models as tiny
from tests.small_tokenizers import gpt2
from tests.test_end_to_end import QUERY, TEXTS, live_logits, stored_logits

NAMES = ["lantern.md", "tower.md", "garden.md"]
LOG = [
    {"documents": NAMES[:2], "count": 5},
    {"documents": NAMES, "count": 3, "query": "What?", "time": "an unknown field"},
    {"documents": ["garden.md", "tower.md"]},
    {"documents": ["tower.md", "nowhere.md", "lantern.md"], "count": 2},
]
Built = tuple[Path, BuildReport]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource(None, dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def documents(**texts: str) -> list[Document]:
    return [Document(texts.get(name[:-3], text), name) for name, text in TEXTS.items()]


def build(path: Path, source: ModelSource, given: Sequence[Document] | None = None, **options: Any) -> BuildReport:
    given = documents() if given is None else given
    return kvstore.build(given, path, source, **{"codec": "scalar", "lossless": True, "certify": "none", **options})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, source: ModelSource) -> Built:
    path = tmp_path_factory.mktemp("chains") / "kv.zarr"
    return path, build(path, source, chains=LOG)


@pytest.fixture(scope="module")
def store(built: Built, source: ModelSource) -> kvstore.OpenStore:
    return kvstore.open(built[0], source.model, source.tokenizer)


def parts_of(store: kvstore.OpenStore, given: Sequence[str | Document], query: str = QUERY) -> list[list[int]]:
    """Head, documents and question, as segments that are prefilled one after another."""
    renderer = store.view.renderer
    texts = [TEXTS[d] if isinstance(d, str) else d.text for d in given]
    return [list(renderer.head_ids), *(list(renderer.document(t)) for t in texts), list(renderer.query(query))]


def cropped_logits(model: Any, before: list[list[int]], cached: int, rest: list[int]) -> torch.Tensor:
    """Logits of `rest` after the first `cached` tokens of segments that were prefilled one after another, as a build does it."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for part in before:
            model(torch.tensor([part]), past_key_values=cache, use_cache=True)
        cache.crop(cached - cache.get_seq_length())
        logits: torch.Tensor = model(torch.tensor([rest]), past_key_values=cache, use_cache=True).logits
    return logits


def actions(prompt: kvstore.Prompt) -> list[str]:
    return [d.action for d in prompt.receipt.documents[1:]]


# composing


def test_a_chained_prefix_equals_the_live_one_bit_for_bit(store: kvstore.OpenStore, source: ModelSource) -> None:
    for names in (NAMES[:2], NAMES):
        prompt = store.compose(names, QUERY, tier="lossless")
        parts = parts_of(store, names)
        assert actions(prompt) == ["reused"] * len(names) and prompt.receipt.exact
        assert prompt.receipt.cached_tokens == sum(map(len, parts[:-1]))
        assert torch.equal(stored_logits(source.model, prompt), live_logits(source.model, parts))


def test_another_order_is_never_taken_as_exact(store: kvstore.OpenStore, source: ModelSource) -> None:
    names = ["tower.md", "lantern.md", "garden.md"]
    prompt = store.compose(names, QUERY, tier="lossless")
    assert actions(prompt) == ["reused", "prefilled", "prefilled"]
    parts = parts_of(store, names)
    assert prompt.receipt.cached_tokens == len(parts[0]) + len(parts[1])
    assert torch.equal(stored_logits(source.model, prompt), live_logits(source.model, [*parts[:2], [i for p in parts[2:] for i in p]]))


def test_a_document_stored_deep_in_a_chain_is_not_stored_alone(store: kvstore.OpenStore) -> None:
    """Its K and V after two others are not its K and V after the head, and the store knows only keys of what stood before."""
    keys = {c.key for name in NAMES for c in store.row(name).chained}
    prompt = store.compose(["garden.md"], QUERY, tier="lossless")
    key = store.row("garden.md").passages[0].prefix
    assert key not in keys and actions(prompt) == ["reused"]
    deep, alone = (store.stored(k, store.view.encoding_id) for k in (store.row("garden.md").chained[0].key, key or ""))
    assert deep.ids.tolist() == alone.ids.tolist() and deep.segment.position > alone.segment.position


CHANGED = Document(TEXTS["tower.md"].replace("4821", "4822"), "tower.md")


def test_a_sibling_serves_up_to_where_the_tokens_part(store: kvstore.OpenStore, source: ModelSource) -> None:
    for asked in ([CHANGED], ["lantern.md", CHANGED], ["lantern.md", CHANGED, "garden.md"]):
        prompt = store.compose(asked, QUERY, tier="lossless")
        parts = parts_of(store, asked)
        at = asked.index(CHANGED) + 1
        ours, theirs = parts[at], store.view.renderer.document(TEXTS["tower.md"])
        common = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        document = prompt.receipt.documents[at]
        assert (document.action, document.why, document.cut, document.stored) == ("prefilled", "changed since build", common, common)
        assert (document.context, document.fidelity, document.nbytes > 0) == ("same prefix", "lossless", True)
        assert f"prefilled, the first {common} of them reused (changed since build)" in str(prompt.receipt)
        assert prompt.receipt.cached_tokens == sum(map(len, parts[:at])) + common
        assert prompt.receipt.exact
        assert [d.cut for d in prompt.receipt.documents[at + 1 :]] == [None] * (len(asked) - at)
        rest = [i for p in parts for i in p][prompt.receipt.cached_tokens :]
        logits = stored_logits(source.model, prompt)
        assert torch.equal(logits, cropped_logits(source.model, [*parts[:at], list(theirs)], prompt.receipt.cached_tokens, rest))
        assert torch.allclose(logits, live_logits(source.model, [[i for p in parts for i in p]])[:, -len(rest) :], atol=1e-3)


def test_a_cut_cache_holds_what_the_whole_one_begins_with(store: kvstore.OpenStore) -> None:
    for tier in ("standard", "fine", "lossless"):
        whole, cut = (store.compose(["lantern.md", d], QUERY, tier=tier) for d in ("tower.md", CHANGED))
        n = cut.receipt.cached_tokens
        assert n < whole.receipt.cached_tokens
        assert all(torch.equal(a[0][..., :n, :], b[0]) and torch.equal(a[1][..., :n, :], b[1]) for a, b in zip(whole.layers, cut.layers, strict=True))


def test_a_wrapper_in_common_is_no_hit_and_other_modes_do_not_cut(store: kvstore.OpenStore) -> None:
    short = Document("The silver tower is gone. " + TEXTS["garden.md"], "x.md")
    receipt = store.compose([short], QUERY).receipt
    assert (receipt.documents[1].action, receipt.documents[1].cut, receipt.documents[1].fidelity) == ("prefilled", None, "live")
    blocks = store.compose([CHANGED], QUERY, reuse="blocks").receipt
    assert blocks.documents[1].cut is None and "computed alone" in blocks.documents[1].why


def test_a_text_that_a_longer_one_begins_with_is_reused_whole(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual templates end documents in a way that no text goes on with; a file template may not."""
    from kvstore import chains
    from kvstore.lookup import Block

    view = store.view
    ids = tuple(view.renderer.document(TEXTS["tower.md"]))
    placed = chains.walk(view, [view.head(), Block("part", ids[:20])], cut=True)[-1]
    assert (placed.receipt.action, placed.receipt.cut, placed.held) == ("reused", None, 20)
    assert chains.walk(view, [view.head(), Block("part", ids[:20])])[-1].stored is None


@pytest.mark.parametrize("name", ["mistral-window", "deepseek_v2", "falcon_h1"])
def test_other_kinds_of_models_chain_and_cut_as_far_as_they_may(name: str, tmp_path: Path) -> None:
    """Sliding windows and latents hold at any cut; a recurrent state is known at the end of a segment only."""
    tokenizer = gpt2()
    kind, fields = {**tiny.FAMILIES, **tiny.HYBRIDS}[name]
    model = tiny.make(kind, {**fields, "vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": None, "eos_token_id": None})
    given = [Document(f"The {word} of the harbour is old. " * n, f"{n}.md") for n, word in enumerate(("wall", "gate", "light"), 1)]
    log = [{"documents": ["1.md", "2.md", "3.md"], "count": 2}]
    kvstore.build(given, tmp_path / "kv", model, tokenizer, codec="raw", reserve=16, certify="none", chains=log)
    store = kvstore.open(tmp_path / "kv", model, tokenizer)
    changed = Document(given[2].text + "It is not.", "3.md")
    for asked, cut in (("3.md", False), (changed, True)):
        prompt = store.compose(["1.md", "2.md", asked], "Is it old?")
        last, n = prompt.receipt.documents[-1], prompt.receipt.cached_tokens
        assert (last.cut is not None) == (cut and name != "falcon_h1")
        assert n == sum(d.stored for d in prompt.receipt.documents) and [d.action for d in prompt.receipt.documents[:3]] == ["reused"] * 3
        with torch.inference_mode():
            inputs = prompt.inputs
            ours = model(inputs["input_ids"][:, n:], past_key_values=inputs["past_key_values"], use_cache=True).logits[:, -1]
            assert torch.allclose(ours, model(prompt.input_ids).logits[:, -1], atol=1e-4)


# order


def test_cached_order_reuses_the_longest_chain_and_says_so(store: kvstore.OpenStore, source: ModelSource) -> None:
    given = ["garden.md", "tower.md", "lantern.md"]
    as_given, prompt = (store.compose(given, QUERY, tier="lossless", order=order) for order in ("given", "cached"))
    assert [d.source for d in prompt.receipt.documents[1:]] == NAMES and actions(prompt) == ["reused"] * 3
    assert (prompt.receipt.order, prompt.receipt.given) == ("cached", tuple(given))
    assert "given: garden.md, tower.md, lantern.md" in str(prompt.receipt)
    assert (as_given.receipt.order, as_given.receipt.given) == ("given", None)
    assert torch.equal(stored_logits(source.model, prompt), live_logits(source.model, parts_of(store, NAMES)))
    assert torch.equal(prompt.input_ids, torch.tensor([[i for p in parts_of(store, NAMES) for i in p]]))


def test_cached_order_keeps_what_no_chain_holds_behind_in_the_given_order(store: kvstore.OpenStore) -> None:
    new = [Document("Snow fell on the hill for three days.", "new.md"), Document("A ship came in.", "ship.md")]
    prompt = store.compose([new[0], "tower.md", new[1], "lantern.md"], QUERY, order="cached")
    assert [d.source for d in prompt.receipt.documents[1:]] == ["lantern.md", "tower.md", "new.md", "ship.md"]
    unchanged = store.compose(["lantern.md", "tower.md", new[0]], QUERY, order="cached").receipt
    assert (unchanged.order, unchanged.given) == ("cached", None)
    with pytest.raises(InputError, match="unknown order"):
        store.compose(["lantern.md", "tower.md"], QUERY, order="best")  # type: ignore[arg-type]


def test_the_search_for_an_order_gives_up_in_time(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstore import chains

    monkeypatch.setattr(chains, "_TRIES", 5)
    view, looked = store.view, []
    found = type(view).find
    monkeypatch.setattr(type(view), "find", lambda self, key: looked.append(key) or found(self, key))
    many = [view.blocks(name) for name in NAMES * 8]
    assert sorted(chains.ordered(view, many, "cached")) == list(range(24))
    assert len(looked) <= 6


# building


def test_the_report_says_what_the_log_is_served(built: Built, store: kvstore.OpenStore) -> None:
    report = built[1].chains
    assert report is not None
    tokens = {name: store[name].tokens for name in NAMES}
    lantern, tower, garden = (tokens[n] for n in NAMES)
    assert (report.requests, report.unknown, report.missing) == (11, 2, "nowhere.md")
    assert (report.segments, report.compiled, report.tokens) == (2, 2, tower + garden)
    assert report.budget == lantern + tower + garden
    whole = 8 * (lantern + tower) + 3 * garden + garden + tower + 2 * tower
    assert report.served.requests == pytest.approx(8 / 11)
    assert report.served.tokens == pytest.approx((whole - tower) / whole)
    assert report.before.requests == 0
    assert report.before.tokens == pytest.approx((8 * lantern + garden + 2 * tower) / whole)


def test_a_build_without_changes_compiles_nothing_and_keeps_the_snapshot(built: Built, source: ModelSource) -> None:
    path, first = built
    for log in (LOG, None):
        again = build(path, source, chains=log)
        assert (again.segments, again.compiled, again.snapshot, again.packs) == (0, 0, first.snapshot, [])
    assert (again.chains, first.chains is not None) == (None, True)


@pytest.fixture
def own(built: Built, tmp_path: Path) -> Path:
    """A copy to change."""
    import shutil

    return Path(shutil.copytree(built[0], tmp_path / "kv.zarr"))


def chains_of(path: Path) -> dict[str, int]:
    return {row.source: len(row.chained) for row in kvstore.open(path).rows()}


@pytest.mark.parametrize(("changed", "left"), [("lantern", (0, 0, 0)), ("tower", (0, 0, 0)), ("garden", (0, 1, 0))])
def test_a_changed_document_drops_its_chains(own: Path, source: ModelSource, changed: str, left: tuple[int, ...]) -> None:
    """And those that go on after it; others stay. With the log they are compiled anew."""
    assert chains_of(own) == {"lantern.md": 0, "tower.md": 1, "garden.md": 1}
    now = documents(**{changed: "Everything is different now, and nobody knows why it is so."})
    build(own, source, now)
    assert chains_of(own) == dict(zip(NAMES, left, strict=True))
    assert verify(own).ok
    again = build(own, source, now, chains=LOG)
    assert again.chains is not None and again.chains.compiled == 2 - sum(left)
    assert chains_of(own) == {"lantern.md": 0, "tower.md": 1, "garden.md": 1}


def test_a_removed_document_takes_the_chains_after_it_along(own: Path, source: ModelSource) -> None:
    store = kvstore.open(own)
    remove(store, ["tower.md"])
    assert chains_of(own) == {"lantern.md": 0, "garden.md": 0}
    collect(store, keep_snapshots=1, grace_seconds=0.0, rewrite_share=0.0)
    held = {r["key"].tobytes().hex() for p in store.index.packs() for r in store.index.pack(p).rows}
    assert held == {k for row in store.rows() for k in row.segment_keys()}, "nothing of the removed document is left, in no chain"
    assert verify(own).ok


def test_a_source_that_is_gone_takes_them_along_too(tmp_path: Path, source: ModelSource) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, text in TEXTS.items():
        (corpus / name).write_text(text)
    options: dict[str, Any] = {"codec": "raw", "certify": "none"}
    kvstore.build(corpus, tmp_path / "s", source, chains=LOG, **options)
    assert sum(chains_of(tmp_path / "s").values()) == 2
    (corpus / "lantern.md").unlink()
    report = kvstore.build(corpus, tmp_path / "s", source, **options)
    assert (report.removed, chains_of(tmp_path / "s")) == (1, {"tower.md": 0, "garden.md": 0})


def test_metadata_and_wider_regimes_leave_chains_alone(own: Path, source: ModelSource) -> None:
    build(own, source, [replace(d, metadata={"page": 1}) for d in documents()], regime="both")
    assert chains_of(own) == {"lantern.md": 0, "tower.md": 1, "garden.md": 1}


def test_gc_keeps_chains_and_their_beginnings(own: Path, source: ModelSource) -> None:
    store = kvstore.open(own, source.model, source.tokenizer)
    remove(store, ["garden.md"])
    report = collect(store, keep_snapshots=1, grace_seconds=0.0, rewrite_share=0.0)
    assert report.artifacts_dropped == 2 and len(report.packs_rewritten) == 2, "garden.md and its chain lay in packs with what stays"
    prompt = store.compose(NAMES[:2], QUERY, tier="lossless")
    assert actions(prompt) == ["reused"] * 2
    assert torch.equal(stored_logits(source.model, prompt), live_logits(source.model, parts_of(store, NAMES[:2])))
    assert verify(own).ok


def test_another_log_takes_the_place_of_the_first(own: Path, source: ModelSource) -> None:
    other = build(own, source, chains=[{"documents": ["garden.md", "lantern.md"], "count": 2}])
    assert other.chains is not None and other.chains.compiled == 1
    assert chains_of(own) == {"lantern.md": 1, "tower.md": 0, "garden.md": 0}
    build(own, source, chains=[])
    assert chains_of(own) == {"lantern.md": 0, "tower.md": 0, "garden.md": 0}


@pytest.mark.parametrize(("budget", "segments"), [(0, 0), (39, 0), (40, 1), (70, 1), (71, 2)])
def test_a_budget_takes_the_most_popular_first(own: Path, source: ModelSource, budget: int, segments: int) -> None:
    """tower.md has 40 tokens, garden.md, which follows it, 31."""
    report = build(own, source, chains=LOG, chain_budget=budget, dry_run=True).chains
    assert report is not None and report.segments == segments
    assert report.compiled == 0 and chains_of(own) == {"lantern.md": 0, "tower.md": 1, "garden.md": 1}
    with pytest.raises(InputError, match="budget of -1"):
        build(own, source, chains=LOG, chain_budget=-1, dry_run=True)


def test_isolated_documents_get_chains_from_their_first_passage_on(tmp_path: Path, source: ModelSource) -> None:
    """With a system prompt, a document stored alone is not stored after the head: a chain brings its first segment along."""
    build(tmp_path / "s", source, regime="isolated", codec="raw", lossless=False, system="Answer.", chains=LOG, chain_budget=1000)
    assert chains_of(tmp_path / "s") == {"lantern.md": 1, "tower.md": 2, "garden.md": 1}
    store = kvstore.open(tmp_path / "s", source.model, source.tokenizer)
    prompt = store.compose(NAMES, QUERY)
    assert actions(prompt) == ["reused"] * 3
    parts = parts_of(store, NAMES)
    assert torch.equal(stored_logits(source.model, prompt), live_logits(source.model, parts))


def test_passages_of_a_document_are_a_chain_of_their_own(tmp_path: Path, source: ModelSource) -> None:
    text = "\n\n".join(f"{t} Paragraph {i}." for i, t in enumerate(TEXTS.values()))
    given = [Document(text, "long.md"), Document(TEXTS["tower.md"], "tower.md")]
    log = [{"documents": ["long.md", "tower.md"], "count": 2}, {"documents": ["long.md#1", "long.md#0"], "count": 9}]
    build(tmp_path / "s", source, given, codec="raw", lossless=False, passage_tokens=64, chains=log, chain_budget=1000)
    store = kvstore.open(tmp_path / "s", source.model, source.tokenizer)
    assert len(store.row("long.md").passages) == 3
    for names, count in ((["long.md", "tower.md"], 4), (["long.md#1", "long.md#0"], 2), (["long.md#2", "long.md#0"], 1)):
        receipt = store.compose(names, QUERY).receipt
        assert sum(d.action == "reused" for d in receipt.documents[1:]) == count
    detail = show(store, "tower.md")
    assert [s.after for s in detail.segments if s.regime == "chain"] == [("long.md#0", "long.md#1", "long.md#2")]


def test_an_interrupted_build_keeps_the_links_that_are_done(tmp_path: Path, source: ModelSource) -> None:
    def stop(report: BuildReport, doing: str) -> None:
        if doing == "chain of tower.md":
            raise KeyboardInterrupt

    first = build(tmp_path / "s", source, chains=LOG, progress=stop)
    assert first.interrupted and chains_of(tmp_path / "s") == {"lantern.md": 0, "tower.md": 0, "garden.md": 0}
    again = build(tmp_path / "s", source, chains=LOG)
    assert again.chains is not None and again.chains.compiled == 1, "what was compiled before the interrupt was stored"
    assert chains_of(tmp_path / "s") == {"lantern.md": 0, "tower.md": 1, "garden.md": 1} and verify(tmp_path / "s").ok


def test_caches_of_chains_are_bounded(source: ModelSource) -> None:
    from kvstore.families.measure import require_layout
    from kvstore.prefill import Prefiller

    layout = require_layout(source.model)
    token = layout.values_per_token * 4
    ids = [tuple(range(10 * i + 3, 10 * i + 13)) for i in range(6)]
    bounded, free = Prefiller(source.model, layout, kept=45 * token), Prefiller(source.model, layout)
    for n in (6, 3, 5, 1):
        ours, theirs = (p.capture((7, 8, 9), tuple(ids[:n]), keep=True) for p in (bounded, free))
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(ours.layers, theirs.layers, strict=True))
        assert sum(map(bounded._nbytes, bounded._caches)) <= 45 * token or len(bounded._caches) == 2
    assert len(free._caches) > len(bounded._caches)


# logs


@settings(max_examples=60, deadline=None)
@given(
    lists=st.lists(st.tuples(st.lists(st.sampled_from("abc?"), max_size=4), st.integers(1, 4)), max_size=8),
    budget=st.integers(0, 60),
    alone=st.sets(st.sampled_from("abc")),
)
def test_choices_are_closed_affordable_and_worth_what_is_said(lists: list[tuple[list[str], int]], budget: int, alone: set[str]) -> None:
    """Against counting request by request. `a` has two passages, `?` is not known."""
    places = {"a": [(("a", 0), 5), (("a", 1), 7)], "b": [(("b", 0), 3)], "c": [(("c", 0), 11)]}
    room = 25
    trie = chain_log.count([chain_log.Request(tuple(names), count=n) for names, n in lists], places.get, room)
    chosen = chain_log.choose(trie, lambda place: place[0] in alone, budget)
    assert sum(n.tokens for n in chosen) <= budget and all(n.count >= 2 for n in chosen)
    paths: set[tuple[object, ...]] = set()

    def walk(node: chain_log.Node, path: tuple[object, ...]) -> None:
        for child in node.after.values():
            if child in chosen or (not path and child.place[0] in alone):
                paths.add((*path, child.place))
            walk(child, (*path, child.place))

    walk(trie.root, ())
    assert all(len(p) == 1 or p[:-1] in paths for p in paths), "nothing without what it follows"
    served = tokens = total = 0
    for names, n in lists:
        known = list(itertools.takewhile(lambda name: name in places, names))
        steps = [step for name in known for step in places[name]]
        fit = [s for i, s in enumerate(steps) if sum(t for _, t in steps[: i + 1]) <= room]
        depth = max((d for d in range(len(fit) + 1) if all(tuple(p for p, _ in fit[: i + 1]) in paths for i in range(d))), default=0)
        served += n * (bool(names) and depth == len(steps) and len(known) == len(names))
        tokens, total = tokens + n * sum(t for _, t in fit[:depth]), total + n * sum(t for _, t in fit)
    found = chain_log.share(trie, lambda node, depth: node in chosen or (depth == 1 and node.place[0] in alone))
    assert found.requests == pytest.approx(served / max(1, sum(n for names, n in lists if names)))
    assert found.tokens == pytest.approx(tokens / max(1, total))


HOSTILE = {
    "not JSON": "{",
    "a list": '["a.md"]',
    "no documents": '{"query": "x"}',
    "documents is text": '{"documents": "a.md"}',
    "a number among them": '{"documents": ["a.md", 1]}',
    "null": '{"documents": null}',
    "count of nothing": '{"documents": ["a.md"], "count": 0}',
    "negative count": '{"documents": ["a.md"], "count": -4}',
    "fractional count": '{"documents": ["a.md"], "count": 1.5}',
    "truth as count": '{"documents": ["a.md"], "count": true}',
    "huge count": '{"documents": ["a.md"], "count": 1e30}',
    "deep": '{"documents": ' + "[" * 5000 + "]" * 5000 + "}",
    "not UTF-8": '{"documents": ["\udcff"]}',
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_broken_line_is_named(line: str, own: Path, source: ModelSource, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"documents": ["tower.md"]}\n\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(InputError, match=r"log\.jsonl, line 3"):
        build(own, source, chains=log)
    assert chains_of(own) == {"lantern.md": 0, "tower.md": 1, "garden.md": 1}, "the chains of before are as they were"


def test_names_that_are_none_end_a_chain(own: Path, source: ModelSource) -> None:
    strange = ["", "\ud800", "#", "tower.md#1", "tower.md#99999999999999999999", "../tower.md", "\0", "tower.md#-1", "T" * 100_000]
    log = [{"documents": [name, "tower.md"], "count": 5} for name in strange] + [{"documents": []}, {"documents": ["tower.md#0"] * 400, "count": 2}]
    report = build(own, source, chains=log, dry_run=True, chain_budget=10**9).chains
    assert report is not None and report.missing == "", "the empty name, the first of them"
    assert (report.requests, report.unknown) == (47, 47)
    assert 40 < report.segments + 1 < 400, "a document may be repeated, up to the model's context"


def test_a_log_that_is_not_there_is_an_input_error(own: Path, source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        build(own, source, chains=tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="request 2"):
        build(own, source, chains=[{"documents": ["tower.md"]}, {"documents": 3}])


# what is shown and checked


def test_listings_count_chains(own: Path, built: Built) -> None:
    store = kvstore.open(own)
    assert {d.source: d.chains for d in listed(store)} == {"lantern.md": 0, "tower.md": 1, "garden.md": 1}
    sizes = {d.source: d.nbytes for d in listed(store)}
    assert sizes["tower.md"] > 1.5 * store["tower.md"].nbytes()
    assert (stats(store).chains, stats(store).artifacts) == (2, 6)
    changed = {c.after.source: c.fields for c in diff(store, 1, 2).changed}
    assert changed == {"tower.md": ("chains",), "garden.md": ("chains",)}
    detail = show(store, "garden.md")
    (chain,) = [s for s in detail.segments if s.regime == "chain"]
    assert chain.after == ("lantern.md", "tower.md") and chain.position == 1 + sum(store[n].tokens for n in chain.after)


def test_rows_without_chains_are_written_as_ever(own: Path) -> None:
    rows = {r["source"]: r for r in json.loads((own / ".kvstore/snapshots/000000000002.json").read_text())["rows"]}
    assert rows.keys() == {"tower.md", "garden.md"}, "a delta"
    first = json.loads((own / ".kvstore/snapshots/000000000001.json").read_text())
    assert all("chains" not in r for r in first["rows"]) and all(r["chains"] for r in rows.values())


def test_verify_finds_a_chain_that_is_none(own: Path) -> None:
    store = kvstore.open(own)
    row = store.row("garden.md")
    (link,) = row.chained
    wrong = {
        "does not stand after": msgspec.structs.replace(link, parent=row.passages[0].prefix),
        "a passage that it does not have": msgspec.structs.replace(link, passage=1),
        "missing artifact": msgspec.structs.replace(link, key="ab" * 32),
        "is stored with": msgspec.structs.replace(link, key=store.row("tower.md").chained[0].key, parent=store.row("tower.md").chained[0].parent),
    }
    for said, chained in wrong.items():
        store.snapshots.commit(Change((msgspec.structs.replace(row, chains=(chained,)),)), "broken")
        assert [p for p in verify(own).problems if p.severity == "error" and said in p.what], said
        assert all(s.regime != "chain" or s.after is not None for s in _shown(own))


def _shown(path: Path) -> list[Any]:
    """`show` survives what it cannot make sense of, or refuses it by name."""
    try:
        return show(kvstore.open(path), "garden.md").segments
    except NotFoundError:
        return []


def test_match_names_the_chains(store: kvstore.OpenStore) -> None:
    found = store.match(TEXTS["garden.md"])
    assert found.exact and found.sources == ("garden.md",) and found.chains == (("lantern.md", "tower.md"),)
    assert store.match(TEXTS["lantern.md"]).chains == ()
