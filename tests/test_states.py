"""Models with a recurrent state: stored at the end of a segment bit for bit, loaded after the same prefix, refused by name anywhere else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn
from transformers import DynamicCache

import kvstore
from kvstore.calibration import metric
from kvstore.calibration.live import Live
from kvstore.calibration.sample import Excerpt
from kvstore.documents import Document
from kvstore.errors import FormatError, IncompatibleError, IntegrityError
from kvstore.families.assemble import dynamic_cache, share, static_cache, static_slots
from kvstore.families.capture import prefill
from kvstore.families.measure import inspect_model
from kvstore.families.slots import kv_layers
from kvstore.families.states import State, States, describe, keeps_state, put_states, state_bytes, states_from, take_states
from kvstore.gc import collect, remove
from kvstore.identity import Context
from kvstore.manifest import StateTensor
from kvstore.pack import Pack
from kvstore.pack_files import STATE
from kvstore.pack_writer import PackWriter
from kvstore.prefill import Prefiller
from kvstore.prompt import collate
from kvstore.storage.local import LocalStorage
from kvstore.validate import require_manifest
from kvstore.verify import verify
from kvstore.viewing import Kinds, SegmentView
from tests import tiny_models as tiny
from tests.plain_reader import PlainPack
from tests.synthetic import ENCODING, LAYOUT, MODEL, make_units
from tests.test_policies import _Encoder
from tests.tiny_models import one_thread  # noqa: F401  a fixture

IDS, REST = tuple(range(3, 43)), tuple(range(60, 71))
TEXTS = {
    "tower.md": "The silver tower stands on the hill above the river. " * 4,
    "gulls.md": "A lighthouse keeper counted gulls and wrote their number down every evening. " * 4,
    "mines.md": "Copper mines closed in the year of the long frost, and the town moved to the sea. " * 4,
}
QUERY = "What stands on the hill?"


def same(a: States, b: States) -> bool:
    return [(s.layer, s.name) for s in a] == [(s.layer, s.name) for s in b] and all(torch.equal(x.value, y.value) for x, y in zip(a, b, strict=True))


def logits(model: Any, ids: Sequence[int] | Tensor, cache: Any) -> Tensor:
    given = ids if isinstance(ids, Tensor) else torch.tensor([list(ids)])
    with torch.no_grad():
        found: Tensor = model(given, past_key_values=cache, use_cache=True).logits
    return found


# the cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_a_layout_lists_what_the_cache_keeps(name: str, dtype: torch.dtype) -> None:
    model, layout = tiny.measured(name, dtype)
    cache = prefill(model, layout, IDS)[1]
    held = [(i, f"{kind}0", t) for i, x in enumerate(cache.layers) if keeps_state(x)
            for kind, t in (("conv", x.conv_states[0]), ("recurrent", x.recurrent_states[0]))]  # fmt: skip
    assert [(t.layer, t.name, t.shape) for t in layout.state] == [(i, n, tuple(t.shape[1:])) for i, n, t in held] != []
    assert [t.dtype for t in layout.state] == [str(t.dtype).removeprefix("torch.") for *_, t in held]
    assert layout.state_nbytes == sum(t.nbytes for *_, t in held)
    assert "state" in layout.identity() and "state" not in msgspec.structs.replace(layout, state=()).identity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_a_copy_of_the_cache_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, layout = tiny.measured(name, dtype)
    live = prefill(model, layout, IDS)[1]
    taken = take_states(live)
    data = state_bytes(layout, taken)
    assert data is not None
    pairs = [(x.keys, x.values) for x in kv_layers(live)]
    copied, static = dynamic_cache(model.config, pairs, states_from(layout, data)), static_cache(model.config, pairs, 60, states_from(layout, data))
    for ids in (REST, REST[:1], REST[:3]):  # many at once, one alone, some
        wanted = logits(model, ids, live)
        assert torch.equal(logits(model, ids, copied), wanted)
        assert torch.allclose(logits(model, ids, static).float(), wanted.float(), atol=3e-5 if dtype == torch.float32 else 0.2)
    assert same(take_states(copied), take_states(live))
    assert state_bytes(layout, taken) == data, "what was taken must not change with the cache"


@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_shared_caches_have_states_of_their_own(name: str) -> None:
    model, layout = tiny.measured(name)
    cache = prefill(model, layout, IDS)[1]
    before, twin = take_states(cache), share(cache)
    first = logits(model, REST, twin)
    assert same(take_states(cache), before) and not same(take_states(twin), before)
    assert torch.equal(logits(model, REST, share(cache)), first)
    (whole,) = (prefill(model, layout, (*IDS, *REST))[0],)
    late = prefill(model, layout, REST, cache)[0]  # leaves `cache` as it was
    assert same(take_states(cache), before)
    assert all(torch.allclose(k[:, -len(REST) :], x, atol=1e-4) for (k, _), (x, _) in zip(whole, late, strict=True))


@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_keys_and_values_alone_are_refused(name: str) -> None:
    model, layout = tiny.measured(name)
    cache = prefill(model, layout, IDS)[1]
    pairs, states = [(x.keys, x.values) for x in kv_layers(cache)], take_states(cache)
    for make in (dynamic_cache, lambda c, p: static_cache(c, p, 60), lambda c, p: static_slots(c, p, 60)):
        with pytest.raises(IncompatibleError, match="recurrent state.*keys and values alone"):
            make(model.config, pairs)
    with pytest.raises(IncompatibleError, match="recurrent state"):
        dynamic_cache(model.config, pairs, [s for s in states if s.layer == states[0].layer])
    with pytest.raises(IncompatibleError, match="recurrent state"):
        put_states(DynamicCache(config=tiny.measured("llama")[0].config), states)
    empty = dynamic_cache(model.config, [(k[..., :0, :], v[..., :0, :]) for k, v in pairs])
    assert torch.equal(logits(model, IDS, empty), logits(model, IDS, DynamicCache(config=model.config)))


def test_states_that_are_not_the_layouts_are_refused() -> None:
    model, layout = tiny.measured("qwen3_next")
    states = take_states(prefill(model, layout, IDS)[1])
    data = state_bytes(layout, states)
    assert data is not None and same(states_from(layout, data), states)
    for other in (states[:-1], states[::-1], (replace(states[0], value=states[0].value.half()), *states[1:])):
        with pytest.raises(IncompatibleError, match="not the layout's"):
            state_bytes(layout, other)
    with pytest.raises(IncompatibleError, match="int32"):
        describe([State(0, "conv0", torch.zeros(1, 2, dtype=torch.int32))])
    with pytest.raises(IntegrityError, match="the layout says"):
        states_from(layout, data[:-1])


def test_a_model_that_keeps_more_than_its_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.supported("qwen3_next")
    block = next(m for m in model.modules() if type(m).__name__.endswith("GatedDeltaNet"))
    passes: dict[int, int] = {}
    forward = block.forward

    def counting(hidden_states: Tensor, cache_params: Any = None, **more: Any) -> Any:
        """As a model that keeps something of its own beside each cache."""
        passes[id(cache_params)] = passes.get(id(cache_params), 0) + 1
        return forward(hidden_states * passes[id(cache_params)], cache_params=cache_params, **more)

    monkeypatch.setattr(block, "forward", counting)
    found = inspect_model(model)
    assert found.layout is None and "goes on differently" in "; ".join(found.problems)


def test_a_model_that_does_not_go_on_from_its_own_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DynamicCache, "get_recurrent_state", lambda cache, layer_idx, state_idx=0: None)
    found = inspect_model(tiny.supported("falcon_h1"))
    assert found.layout is None and "otherwise than in one pass" in "; ".join(found.problems)


def test_states_of_convolutions_alone() -> None:
    model = tiny.make("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16})
    found = inspect_model(model)
    assert found.layout is not None and [(t.layer, t.name) for t in found.layout.state] == [(0, "conv0"), (2, "conv0")]
    live = prefill(model, found.layout, IDS)[1]
    copied = dynamic_cache(model.config, [(x.keys, x.values) for x in kv_layers(live)], take_states(live))
    assert torch.equal(logits(model, REST, copied), logits(model, REST, live))


@pytest.mark.parametrize("name", tiny.HYBRIDS)
def test_gradients_flow_through_recurrent_layers(name: str) -> None:
    """So that `transform` calibrates: against differences."""
    live, ids = Live(*tiny.measured(name)), (*IDS, *REST)
    x, at = live.values(ids)[: len(IDS)], len(IDS)
    gradient = metric._gradient(live, x, ids, torch.Generator().manual_seed(5))
    with torch.no_grad():
        drawn = torch.multinomial(live.following(x, ids[at:], ids[:at]).softmax(-1), 1, generator=torch.Generator().manual_seed(5))
        way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        ends = [live.following(x + s * 3e-3 * way, ids[at:], ids[:at]).double().log_softmax(-1).gather(-1, drawn).sum() for s in (1, -1)]
        assert torch.allclose(live.following(x, ids[at:], ids[:at]), logits(live.model, ids, None)[0, at:], atol=1e-4)
    assert float((gradient * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / 6e-3, rel=0.05, abs=2e-2)
    blocks = metric.fisher_blocks(live, [Excerpt(ids, 0)], 3, lambda tokens: None)
    assert bool((blocks.diagonal(dim1=-2, dim2=-1) > 0).any())


def test_policies_look_at_the_layers_that_attend() -> None:
    """By stored layer: Qwen3-Next's first is layer 1 of the model."""
    model, layout = tiny.measured("qwen3_next")
    view = SegmentView(Prefiller(model, layout), Kinds(_Encoder()), np.array(IDS), (REST,), 512)  # type: ignore[arg-type]
    for found in (view.mass(), view.reconstruction()):
        assert found.shape == (2, 2, len(IDS)) and (found.max((1, 2)) > 0).all()


# packs


STATEFUL = msgspec.structs.replace(LAYOUT, state=(StateTensor(1, "conv0", (3, 2), "bfloat16"), StateTensor(1, "recurrent0", (2, 2), "float32")))


def test_a_writer_takes_a_state_where_the_layout_has_one_and_only_there(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    units = make_units("ab" * 32, 5)
    writer = PackWriter(storage, MODEL.key, STATEFUL, ENCODING, {})
    for state in (None, b"", bytes(STATEFUL.state_nbytes - 1)):
        with pytest.raises(ValueError, match="recurrent state takes 28 bytes"):
            writer.add("ab" * 32, Context.root(), range(5), units, state=state)
    with pytest.raises(ValueError, match="recurrent state takes None bytes"):
        PackWriter(storage, MODEL.key, LAYOUT, ENCODING, {}).add("ab" * 32, Context.root(), range(5), units, state=bytes(28))
    writer.add("ab" * 32, Context.root(), range(5), units, state=bytes(range(28)))
    (tmp_path / "packs").mkdir()
    pack = Pack(storage, writer.close() or "")
    assert bytes(pack.state(pack.segment(0))) == bytes(range(28))


def replaced(pack: Pack, state: Any) -> Any:
    layout = msgspec.structs.replace(pack.layout, state=state)
    return msgspec.structs.replace(pack.manifest, layout=layout)


def test_manifests_that_no_writer_makes_are_refused(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    writer = PackWriter(storage, MODEL.key, STATEFUL, ENCODING, {})
    writer.add("ab" * 32, Context.root(), range(5), make_units("ab" * 32, 5), state=bytes(28))
    (tmp_path / "packs").mkdir()
    pack = Pack(storage, writer.close() or "")
    conv, recurrent = STATEFUL.state
    for state, said in (
        ((recurrent, conv), "not in the order"),
        ((conv, conv), "not in the order"),
        ((conv,), "take"),
        ((), "files are not those"),
        ((conv, msgspec.structs.replace(recurrent, shape=(1 << 31, 1 << 31))), "layout.state takes"),
    ):
        with pytest.raises(FormatError, match=said):
            require_manifest(replaced(pack, state), "here")
    tiers = tuple(msgspec.structs.replace(t, array=STATE) if t.array == "t0" else t for t in ENCODING.tiers)
    clashing = msgspec.structs.replace(pack.manifest, encoding=msgspec.structs.replace(ENCODING, tiers=tiers))
    with pytest.raises(FormatError, match="that of the recurrent states"):
        require_manifest(clashing, "here")


# stores


@dataclass(frozen=True)
class Built:
    """A store of one hybrid model, and what it was built from."""

    path: Path
    model: nn.Module
    tokenizer: Any
    report: kvstore.BuildReport

    def open(self, path: Path | None = None) -> kvstore.OpenStore:
        return kvstore.open(path or self.path, model=self.model, tokenizer=self.tokenizer)

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.path, to))

    def build(self, path: Path, **options: Any) -> kvstore.BuildReport:
        return build(path, self.model, self.tokenizer, **options)

    def chain(self, store: kvstore.OpenStore, source: str) -> tuple[tuple[int, ...], ...]:
        """Head and document, as they are stored."""
        return tuple(store.view.head().ids), tuple(store.artifact(source).token_ids)


def build(path: Path, model: Any, tokenizer: Any, **options: Any) -> kvstore.BuildReport:
    documents = [Document(text, source) for source, text in TEXTS.items()]
    return kvstore.build(documents, path, model, tokenizer, **{"codec": "raw", "certify": "none", "system": "Be brief.", **options})


OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"codec": "scalar", "lossless": True, "certify": "sample", "certify_documents": 1},
    "falcon_h1": {},
}
EXACT = {"qwen3_next": "lossless", "falcon_h1": "raw"}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, bundled_tokenizer: Any, one_thread: Any) -> Callable[[str], Built]:  # noqa: F811
    @cache
    def made(name: str) -> Built:
        kind, fields = tiny.HYBRIDS[name]
        model, path = tiny.make(kind, {**fields, "vocab_size": len(bundled_tokenizer)}), tmp_path_factory.mktemp(name) / "kv"
        return Built(path, model, bundled_tokenizer, build(path, model, bundled_tokenizer, **OPTIONS[name]))

    return made


@pytest.fixture(scope="module", params=tiny.HYBRIDS)
def built(request: pytest.FixtureRequest, families: Callable[[str], Built]) -> Built:
    return families(request.param)


@pytest.fixture(scope="module")
def store(built: Built) -> kvstore.OpenStore:
    return built.open()


@pytest.fixture(scope="module")
def falcon(families: Callable[[str], Built]) -> Built:
    return families("falcon_h1")


@pytest.fixture(scope="module")
def opened(falcon: Built) -> kvstore.OpenStore:
    return falcon.open()


def live(built: Built, store: kvstore.OpenStore, chain: Sequence[tuple[int, ...]]) -> Any:
    return share(Prefiller(built.model, store.view.layout).context(tuple(chain)))


def test_a_loaded_prefix_goes_on_as_the_live_one(built: Built, store: kvstore.OpenStore) -> None:
    prefix, chain = store.load("gulls.md"), built.chain(store, "gulls.md")
    cache, wanted = prefix.cache, live(built, store, chain)
    assert prefix.input_ids[0].tolist() == [i for ids in chain for i in ids]
    assert all(torch.equal(x.keys, y.keys) and torch.equal(x.values, y.values) for x, y in zip(kv_layers(cache), kv_layers(wanted), strict=True))
    assert same(take_states(cache), take_states(wanted)) and take_states(cache)
    for ids in (IDS, REST[:1], REST):
        assert torch.equal(logits(built.model, ids, cache), logits(built.model, ids, wanted))
    assert same(take_states(prefix.cache), take_states(live(built, store, chain))), "the prefix must not change with the cache made of it"


def test_prompts_answer_as_the_live_model_does(built: Built, store: kvstore.OpenStore) -> None:
    prompt = store.compose(["gulls.md", "mines.md"], QUERY)  # the second one is not stored after the first
    assert [d.action for d in prompt.receipt.documents] == ["reused", "reused", "prefilled"]
    n = prompt.receipt.cached_tokens
    cache = live(built, store, built.chain(store, "gulls.md"))
    assert torch.equal(logits(built.model, prompt.input_ids[:, n:], prompt.cache), logits(built.model, prompt.input_ids[:, n:], cache))
    plain = {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)}
    chosen = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = built.model.generate(**plain, **chosen)
    for inputs in (prompt.inputs, prompt.inputs, prompt.static(8)):
        assert torch.equal(built.model.generate(**inputs, **chosen), wanted)
    turn = prompt.follow(built.model.generate(**prompt.inputs, **chosen, return_dict_in_generate=True), QUERY)
    m = turn.receipt.cached_tokens
    assert torch.allclose(logits(built.model, turn.input_ids[:, m:], turn.cache)[:, -1], logits(built.model, turn.input_ids, None)[:, -1], atol=1e-3)


def test_chains_of_documents_take_the_last_state(falcon: Built, tmp_path: Path) -> None:
    falcon.build(tmp_path / "kv", chains=[{"documents": ["tower.md", "mines.md"], "count": 2}])
    store = falcon.open(tmp_path / "kv")
    prompt = store.compose(["tower.md", "mines.md"], QUERY)
    assert [d.action for d in prompt.receipt.documents] == ["reused"] * 3
    wanted = live(falcon, store, (*falcon.chain(store, "tower.md"), tuple(store.artifact("mines.md").token_ids)))
    assert same(take_states(prompt.cache), take_states(wanted))
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(kv_layers(prompt.cache), kv_layers(wanted), strict=True))
    state = store.view.layout.state_nbytes + 4
    assert prompt.receipt.documents[1].nbytes == store.load("tower.md").receipt.documents[1].nbytes - state


def test_states_are_exact_at_every_tier(built: Built, store: kvstore.OpenStore) -> None:
    wanted = live(built, store, built.chain(store, "tower.md"))
    for tier in store["tower.md"].tiers:
        cache = store.load("tower.md", tier=tier).cache
        equal = all(torch.equal(x.keys, y.keys) for x, y in zip(kv_layers(cache), kv_layers(wanted), strict=True))
        assert same(take_states(cache), take_states(wanted)) and equal == (tier in EXACT.values())


def test_bytes_count_the_state_once_a_load(built: Built, store: kvstore.OpenStore) -> None:
    stored, state = store["tower.md"].stored[0], store.view.layout.state_nbytes + 4
    assert built.report.nbytes["state"] == 4 * state == 4 * stored.state_nbytes
    units = sum(stored.segment.nbytes([t.array]) for t in stored.encoding.tiers)
    assert stored.nbytes() == units + state
    receipt, tier = store.load("tower.md").receipt, stored.encoding.tiers[-1].name
    head = store.stored(store.row("tower.md").head or "", stored.pack.manifest.encoding_id)
    assert [d.nbytes for d in receipt.documents] == [head.nbytes(tier) - state, stored.nbytes(tier)]
    assert store.load("tower.md", max_bytes=receipt.nbytes).receipt.nbytes == receipt.nbytes
    assert "exactly" in built.report.serves and "recurrent" in built.report.serves


def test_quality_is_measured_with_exact_states(built: Built) -> None:
    for tier in built.report.quality.values():
        assert 0 <= tier["kl"] < 5 and tier["noise"] < 1e-4
    assert set(built.report.quality) == ({"standard", "fine"} if "standard" in built.report.nbytes else set())


def test_zarr_and_a_reader_of_the_page_alone_see_the_states(built: Built, store: kvstore.OpenStore) -> None:
    stored = store["mines.md"].stored[0]
    wanted = [s.value for s in take_states(live(built, store, built.chain(store, "mines.md")))]
    row = next(i for i in range(len(stored.pack.rows)) if stored.pack.segment(i).key == stored.segment.key)
    array = zarr.open_array(str(store.storage.path(f"{stored.pack.folder}/{STATE}")), mode="r")
    assert array.shape == (len(stored.pack.rows), stored.pack.layout.state_nbytes)
    assert bytes(np.asarray(array[row])) == b"".join(t.numpy().tobytes() for t in wanted) == bytes(stored.pack.state(stored.segment))
    plain = PlainPack(store.storage.path(stored.pack.folder))
    assert plain.state(plain.rows[row]) == [t.flatten().tolist() for t in wanted]


# damage and collection


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_of_a_state_is_found(falcon: Built, tmp_path: Path) -> None:
    copied = falcon.open(falcon.copy(tmp_path / "kv"))
    assert verify(copied).ok
    stored = copied["tower.md"].stored[0]
    path = copied.storage.path(f"{stored.pack.folder}/{STATE}/c.0.0")
    flip(path, stored.segment.ranges[STATE][0] + 17)
    with pytest.raises(IntegrityError, match="state.*damaged"):
        falcon.open(copied.path).load("tower.md")
    falcon.open(copied.path).load("gulls.md")
    assert [p.what for p in verify(copied).problems] == [f"segment {stored.segment.key[:12]}, state: fails its crc32c"]
    flip(path, stored.segment.ranges[STATE][0] + 17)
    flip(path, path.stat().st_size - 10)
    assert any("shard index is damaged" in p.what for p in verify(copied).problems)


def test_gc_keeps_states_and_drops_damaged_ones(falcon: Built, tmp_path: Path) -> None:
    copied = falcon.open(falcon.copy(tmp_path / "kv"))
    wanted = take_states(copied.load("gulls.md").cache)
    remove(copied, ["mines.md"])
    found = collect(copied, keep_snapshots=1, grace_seconds=0, rewrite_share=0)
    assert found.packs_rewritten and found.artifacts_dropped == 1 and verify(copied).ok
    assert same(take_states(falcon.open(copied.path).load("gulls.md").cache), wanted)
    stored = copied["tower.md"].stored[0]
    flip(copied.storage.path(f"{stored.pack.folder}/{STATE}/c.0.0"), stored.segment.ranges[STATE][0])
    found = collect(copied, keep_snapshots=1, grace_seconds=0, drop_damaged=True)
    assert found.artifacts_dropped == 1 and any("state" in d for d in found.damaged)
    assert same(take_states(falcon.open(copied.path).load("gulls.md").cache), wanted)


# refusals


@pytest.mark.parametrize("regime", ["isolated", "both"])
def test_other_regimes_are_refused(falcon: Built, tmp_path: Path, regime: str) -> None:
    with pytest.raises(IncompatibleError, match=f"regime {regime}.*recurrent state.*--regime prefix"):
        falcon.build(tmp_path / "kv", regime=regime)


def test_policies_that_drop_tokens_are_refused(falcon: Built, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="h2o with dropped tokens.*recurrent state"):
        falcon.build(tmp_path / "kv", codec="scalar", policy="h2o:rest=drop")


@pytest.mark.parametrize("reuse", ["blocks", "epic", "cacheblend", "query"])
def test_approximate_reuse_is_refused(opened: kvstore.OpenStore, reuse: Any) -> None:
    with pytest.raises(IncompatibleError, match="recurrent state.*reuse='prefix'"):
        opened.compose(["tower.md", "gulls.md"], QUERY, reuse=reuse)


def test_documents_alone_are_refused(opened: kvstore.OpenStore) -> None:
    with pytest.raises(IncompatibleError, match="without what stood before it.*recurrent state.*load"):
        opened.read("tower.md")


def test_a_prefix_that_ends_within_a_segment_is_computed_live(opened: kvstore.OpenStore) -> None:
    """A document that only begins like a stored one has no state at its end."""
    prompt = opened.compose([Document(TEXTS["tower.md"] + "It fell.", "tower.md")], QUERY)
    assert [d.action for d in prompt.receipt.documents] == ["reused", "prefilled"]
    assert prompt.receipt.cached_tokens == len(opened.view.head().ids)


def test_a_line_appended_to_a_document_is_computed_after_it(falcon: Built, opened: kvstore.OpenStore) -> None:
    """All that is stored of it is a beginning of the new text, and its state stands there."""
    prompt = opened.compose([Document(TEXTS["tower.md"].strip() + "\nIt fell.", "tower.md")], QUERY)
    n = prompt.receipt.cached_tokens
    assert prompt.receipt.documents[1].cut and n > len(opened.view.head().ids)
    found = logits(falcon.model, prompt.inputs["input_ids"][:, n:], prompt.inputs["past_key_values"])
    live = logits(falcon.model, prompt.input_ids, None)
    assert torch.allclose(found[:, -1], live[:, -1], atol=1e-4)


def test_batches_of_unequal_lengths_are_refused_and_equal_ones_are_not(falcon: Built, opened: kvstore.OpenStore) -> None:
    one, other = (opened.compose([s], QUERY) for s in ("tower.md", "gulls.md"))
    with pytest.raises(IncompatibleError, match="different lengths.*recurrent state"):
        collate([one, other])
    batch = collate([one, one])
    n = one.receipt.cached_tokens
    found = logits(falcon.model, batch["input_ids"][:, n:], batch["past_key_values"])
    assert torch.allclose(found, logits(falcon.model, one.input_ids[:, n:], one.cache).expand_as(found), atol=1e-4)
    with pytest.raises(IncompatibleError, match="others do not"):
        collate([one, replace(one, states=())])
