"""What the vLLM connector does without vLLM: matching, flooring, slots, shards, preemption, and loads into a paged cache like vLLM's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import kvstore
from kvstore import Document, bundled
from kvstore.errors import IncompatibleError, InputError, NotFoundError
from kvstore.integrations.vllm_cache import Engine, block_range, own_heads, require_served, slots, stored_layers
from kvstore.integrations.vllm_loads import Loads
from kvstore.integrations.vllm_plan import Matcher, Part, Settings, choose_encoding, clip, require_tier
from kvstore.integrations.vllm_requests import Load, Requests
from kvstore.manifest import StateTensor
from kvstore.prefixes import PrefixIndex
from kvstore.quality import Quality

BLOCK = 8
SALT = "kvstore-approx:blocks"
TEXTS = {
    "tower.md": "The silver tower stands at the end of the harbour road. The access code of the silver tower is 4821. Nobody lives there.",
    "lantern.md": "An old lantern hangs by the door of the inn. The keeper of the old lantern is Mercer. He lights it when the fog comes in.",
    "garden.md": "Behind the house lies a garden with a wall of grey stone. The colour of the quiet garden is crimson in the autumn.",
}
QUERY = "What is the access code of the silver tower?"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> kvstore.OpenStore:
    path, model = tmp_path_factory.mktemp("vllm") / "kv.zarr", str(bundled.model_path())
    documents = [Document(text, name) for name, text in TEXTS.items()]
    options: dict[str, Any] = {"dtype": "float32", "regime": "both", "codec": "scalar", "lossless": True, "system": "You answer from the text."}
    kvstore.build(documents, path, model, certify="none", **options)
    return kvstore.open(path, model, dtype="float32")


@pytest.fixture(scope="module")
def matcher(store: kvstore.OpenStore) -> Matcher:
    return matcher_of(store, Quality())


def matcher_of(store: kvstore.OpenStore, quality: Quality, block_size: int = BLOCK) -> Matcher:
    view = store.view
    return Matcher(store, PrefixIndex(store, view.model, view.encoding_id), [tuple(view.renderer.anchor_ids)], quality, block_size)


def ids_of(store: kvstore.OpenStore, *names: str) -> list[int]:
    view = store.view
    return [*view.renderer.head_ids, *(i for n in names for i in view.renderer.document(TEXTS[n])), *view.renderer.query(QUERY)]


def stored_tokens(store: kvstore.OpenStore, *names: str) -> int:
    return len(store.view.renderer.head_ids) + sum(store[n].tokens for n in names)


@dataclass
class Request:
    """What is read of vLLM's."""

    prompt_token_ids: Sequence[int] | None
    request_id: str = "r"
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    mm_features: tuple[Any, ...] = ()
    lora_request: Any = None
    cache_salt: str | None = None
    num_preemptions: int = 0
    made: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids or ()) + self.made


# matching


def test_the_longest_chain_is_offered_down_to_whole_blocks(store: kvstore.OpenStore, matcher: Matcher) -> None:
    ids, whole = ids_of(store, "tower.md"), stored_tokens(store, "tower.md")
    offer = matcher.offer(ids, len(ids) - 1)
    assert whole % BLOCK and offer.tokens == whole // BLOCK * BLOCK and offer.exact
    assert [(p.first, p.at) for p in offer.parts] == [(0, 0), (0, len(store.view.renderer.head_ids))]
    assert sum(p.count for p in offer.parts) == offer.tokens and {p.tier for p in offer.parts} == {"lossless"}
    assert offer.parts[1].key == store.row("tower.md").passages[0].prefix


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_one_token_is_left_to_compute(store: kvstore.OpenStore, block_size: int) -> None:
    """A prompt that is stored whole: the last token, or its whole block, must be computed."""
    ids = ids_of(store, "tower.md")[: stored_tokens(store, "tower.md")]
    offer = matcher_of(store, Quality(), block_size).offer(ids, len(ids) - 1)
    assert offer.tokens == (len(ids) - 1) // block_size * block_size < len(ids)


def test_a_prompt_that_leaves_a_document_takes_what_it_shares_with_it(store: kvstore.OpenStore, matcher: Matcher) -> None:
    ids = ids_of(store, "tower.md")
    at = len(store.view.renderer.head_ids) + 20
    other = [*ids[:at], ids[at] ^ 1, *ids[at + 1 :]]
    assert matcher.offer(other, len(other) - 1).tokens == at // BLOCK * BLOCK


def test_nothing_is_offered_for_other_ids(store: kvstore.OpenStore, matcher: Matcher) -> None:
    ids = ids_of(store, "tower.md")
    assert matcher.offer([ids[0] ^ 1, *ids[1:]], len(ids) - 1).tokens == 0
    assert matcher.offer([], -1).tokens == 0


def test_documents_compiled_alone_are_taken_only_where_the_request_says_so(store: kvstore.OpenStore, matcher: Matcher) -> None:
    names = ("lantern.md", "tower.md", "garden.md")
    ids = ids_of(store, *names)
    exact, approximate = (matcher.offer(ids, len(ids) - 1, approximate=a) for a in (False, True))
    assert exact.tokens == stored_tokens(store, "lantern.md") // BLOCK * BLOCK and exact.exact
    assert approximate.tokens == stored_tokens(store, *names) // BLOCK * BLOCK and not approximate.exact
    alone = [store.row(n).passages[0].isolated for n in names[1:]]
    assert [p.key for p in approximate.parts[2:]] == alone and [p.first for p in approximate.parts] == [0, 0, 0, 0]
    one = matcher.offer(ids_of(store, "tower.md"), 10_000, approximate=True)
    assert one.exact and one.parts == matcher.offer(ids_of(store, "tower.md"), 10_000).parts


def test_quality_is_chosen_as_everywhere(store: kvstore.OpenStore) -> None:
    ids = ids_of(store, "tower.md")
    tiers = [{p.tier for p in matcher_of(store, q).offer(ids, len(ids) - 1).parts} for q in (Quality("standard"), Quality(max_kl=0.0))]
    assert tiers == [{"standard"}, {"lossless"}]


def test_what_cannot_be_promised_is_not_offered(store: kvstore.OpenStore, caplog: pytest.LogCaptureFixture) -> None:
    ids = ids_of(store, "tower.md")
    assert matcher_of(store, Quality(max_bytes=1)).offer(ids, len(ids) - 1).tokens == 0
    assert "no stored tier fits 1 bytes" in caplog.text


def test_settings_are_checked_by_name(store: kvstore.OpenStore) -> None:
    parsed = Settings.parse({"store": "kv.zarr", "tier": "fine", "encoding": "ab"})
    assert (parsed.store, parsed.quality.tier, parsed.encoding) == ("kv.zarr", "fine", "ab")
    with pytest.raises(InputError, match="kv_connector_extra_config has tiers"):
        Settings.parse({"store": "kv.zarr", "tiers": "fine"})
    with pytest.raises(InputError, match="names no store"):
        Settings.parse({"tier": "fine"})
    with pytest.raises(InputError, match="exclude each other"):
        Settings.parse({"store": "kv.zarr", "tier": "fine", "max_kl": 0.1})
    with pytest.raises(InputError, match="workers='2'"):
        Settings.parse({"store": "kv.zarr", "workers": "2"})


def test_the_encoding_and_its_tier_are_checked_at_the_start(store: kvstore.OpenStore) -> None:
    view = store.view
    assert choose_encoding(store, view.model.key, view.encoding_id[:6]) == view.encoding_id
    with pytest.raises(InputError, match="standard, fine, lossless"):
        choose_encoding(store, view.model.key, "x")
    encoding = store.encodings()[view.encoding_id]
    require_tier(encoding, Quality("fine"))
    with pytest.raises(NotFoundError, match="no tier 'draft'"):
        require_tier(encoding, Quality("draft"))
    spec = encoding.codecs[0]
    dropping = msgspec.structs.replace(spec, params={**spec.params, "policy": "h2o:rest=drop"})
    with pytest.raises(IncompatibleError, match="dropped tokens"):
        require_tier(msgspec.structs.replace(encoding, codecs=(dropping, *encoding.codecs[1:])), Quality("fine"))


# requests


def test_computed_tokens_are_subtracted_and_the_right_blocks_are_filled(store: kvstore.OpenStore, matcher: Matcher) -> None:
    requests, ids = Requests(matcher), ids_of(store, "tower.md")
    total = matcher.offer(ids, len(ids) - 1).tokens
    assert requests.matched(Request(ids), 0) == total
    assert requests.matched(Request(ids), 2 * BLOCK) == total - 2 * BLOCK  # asked again, before blocks were given
    blocks = list(range(40, 40 + len(ids) // BLOCK + 1))
    requests.allocated("r", blocks, total - 2 * BLOCK)
    (load,) = requests.take_due()
    assert requests.take_due() == []
    assert (load.start, load.tokens, load.blocks) == (2 * BLOCK, total - 2 * BLOCK, tuple(blocks[2 : total // BLOCK]))
    assert load.parts[0].at == 2 * BLOCK
    requests.allocated("r", blocks, 0)  # vLLM tells again when the load is over
    assert requests.take_due() == []
    assert requests.matched(Request(ids), total + BLOCK) == 0


def test_a_preempted_request_is_loaded_again_and_a_failed_one_is_not(store: kvstore.OpenStore, matcher: Matcher) -> None:
    requests, ids = Requests(matcher), ids_of(store, "tower.md")
    total = requests.matched(Request(ids), 0)
    requests.allocated("r", range(100), total)
    (load,) = requests.take_due()
    requests.returned({"r"}, {load.blocks[1]})
    assert requests.matched(Request(ids), 0) == 0
    assert requests.matched(Request(ids, num_preemptions=1, made=3), 0) == total
    requests.allocated("r", range(50, 150), total)
    assert requests.take_due()[0].blocks[0] == 50
    requests.returned({"r"}, {load.blocks[1]})
    taken = requests.closed("r")
    assert taken is not None and (taken["tokens"], taken["failed"], taken["context"], taken["tiers"]) == (total, False, "same prefix", ["lossless"])
    assert requests.closed("r") is None


def test_what_was_loaded_is_told_although_a_later_preemption_needed_no_load(store: kvstore.OpenStore, matcher: Matcher) -> None:
    requests, ids = Requests(matcher), ids_of(store, "tower.md")
    total = requests.matched(Request(ids), 0)
    requests.allocated("r", range(100), total)
    assert requests.matched(Request(ids, num_preemptions=1), total) == 0  # vLLM's own cache still has it
    taken = requests.closed("r")
    assert taken is not None and taken["tokens"] == total and len(requests.take_due()) == 1


def test_a_resumed_request_may_take_its_whole_prompt(store: kvstore.OpenStore) -> None:
    ids = ids_of(store, "tower.md")[: stored_tokens(store, "tower.md")]
    requests = Requests(matcher_of(store, Quality(), 1))
    assert requests.matched(Request(ids), 0) == len(ids) - 1
    assert requests.matched(Request(ids, num_preemptions=1, made=1), 0) == len(ids)


def test_a_failed_load_counts_no_tokens(store: kvstore.OpenStore, matcher: Matcher) -> None:
    requests, ids = Requests(matcher), ids_of(store, "tower.md")
    requests.allocated("r", range(100), requests.matched(Request(ids), 0))
    requests.returned({"r"}, {0})
    taken = requests.closed("r")
    assert taken is not None and taken["failed"] and taken["tokens"] == 0


@pytest.mark.parametrize("field", ["prompt_embeds", "prompt_is_token_ids", "mm_features", "lora_request"])
def test_requests_whose_kv_depends_on_more_than_ids_are_offered_nothing(store: kvstore.OpenStore, matcher: Matcher, field: str) -> None:
    plain = Request(ids_of(store, "tower.md"))
    assert Requests(matcher).matched(plain, 0) > 0
    assert Requests(matcher).matched(replace(plain, **{field: (object(),)}), 0) == 0
    assert Requests(matcher).matched(replace(plain, prompt_token_ids=None), 0) == 0


def test_the_salt_decides(store: kvstore.OpenStore, matcher: Matcher) -> None:
    ids = ids_of(store, "lantern.md", "tower.md")
    found = {salt: Requests(matcher).matched(Request(ids, cache_salt=salt), 0) for salt in (None, "tenant-7", "x" + SALT, SALT)}
    assert found[None] == found["tenant-7"] == found["x" + SALT] < found[SALT]


# blocks, heads, layers


def test_slots() -> None:
    assert slots([5, 2], 4).tolist() == [20, 21, 22, 23, 8, 9, 10, 11] and slots([], 4).dtype == np.int64
    assert block_range([7, 8, 9], 4, 12, 4) == (8, 9)
    for start, end in ((2, 8), (0, 6), (0, 16)):
        with pytest.raises(InputError, match="do not fill blocks"):
            block_range([7, 8, 9], start, end, 4)


def test_clipping_keeps_positions() -> None:
    parts = [Part("a", "e", "t", 0, 10, 0), Part("b", "e", "t", 0, 20, 10), Part("c", "e", "t", 0, 5, 30)]
    clipped = clip(parts, 8, 16)
    assert [(p.key, p.first, p.count, p.at) for p in clipped] == [("a", 8, 2, 8), ("b", 0, 6, 10)]
    assert clip(parts, 0, 35) == tuple(parts) and clip(parts, 40, 48) == ()


@pytest.mark.parametrize(("ranks", "heads"), [(1, 8), (2, 8), (8, 8), (4, 2), (8, 1)])
def test_ranks_share_the_heads(ranks: int, heads: int) -> None:
    """As vLLM shards: neighbouring heads together; where heads are fewer, neighbouring ranks hold the same one."""
    found = [list(range(heads))[own_heads(r, ranks, heads)] for r in range(ranks)]
    assert sorted({h for own in found for h in own}) == list(range(heads)) and {len(own) for own in found} == {max(1, heads // ranks)}
    assert [own[0] for own in found] == [r * heads // ranks for r in range(ranks)]


@pytest.mark.parametrize(("ranks", "heads"), [(3, 8), (6, 4)])
def test_heads_that_cannot_be_shared_are_refused(ranks: int, heads: int) -> None:
    with pytest.raises(IncompatibleError, match=f"{heads} KV heads"):
        own_heads(0, ranks, heads)


def test_layers_by_the_number_in_their_name() -> None:
    names = [f"model.layers.{i}.self_attn.attn" for i in (10, 2, 0)]
    assert stored_layers(names, 3, 12, 1) == {names[0]: 2, names[1]: 1, names[2]: 0}  # layers without KV between them are not stored
    assert stored_layers(names, 12, 12, 4) == {names[0]: 10, names[1]: 2, names[2]: 0}  # one stage of four
    for wrong in ((names, 4, 4, 1), (names, 3, 12, 2), ([*names, "model.attn"], 4, 4, 1), ([*names, "draft.layers.0.attn"], 4, 4, 1)):
        with pytest.raises(IncompatibleError, match="layers: vLLM caches"):
            stored_layers(*wrong)


ENGINE = Engine("FullAttentionSpec", 1, "float32", 2, 64, 64, 1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"spec": "SlidingWindowSpec"}, "cache kind"),
        ({"groups": 2}, "cache groups"),
        ({"dtype": "bfloat16"}, "cache dtype"),
        ({"quantized": "fp8"}, "cache quantization"),
        ({"heads": 1}, "KV heads a rank"),
        ({"key_width": 32}, "head size"),
        ({"context_parallel": 2}, "context parallelism"),
        ({"changes": ("quantization fp8",)}, "model changed by"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_by_name(store: kvstore.OpenStore, change: dict[str, Any], name: str) -> None:
    require_served(ENGINE, store.view.layout)
    require_served(replace(ENGINE, heads=1, ranks=2), store.view.layout)
    with pytest.raises(IncompatibleError, match=f"{name} is"):
        require_served(replace(ENGINE, **change), store.view.layout)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"latent": (64, 64)}, "latent attention"),
        ({"rotated": "values"}, "rotated tensor"),
        ({"rope_regime": "short", "rope_limit": 128}, "RoPE regime"),
        ({"state": (StateTensor(0, "conv0", (2,), "float32"),)}, "recurrent state"),
    ],
)
def test_a_layout_that_vllm_keeps_in_another_way_is_refused_by_name(store: kvstore.OpenStore, change: dict[str, Any], name: str) -> None:
    with pytest.raises(IncompatibleError, match=f"{name} is"):
        require_served(ENGINE, msgspec.structs.replace(store.view.layout, **change))


# loads


class Paged:
    """A paged cache: per layer K and V [blocks * BLOCK, heads, head_dim], NaN where nothing was written."""

    def __init__(self, layers: int, heads: int, width: int, blocks: int = 100):
        self.layers = [torch.full((2, blocks * BLOCK, heads, width), float("nan")) for _ in range(layers)]

    def writer(self, layer: int) -> Any:
        def write(keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> None:
            self.layers[layer][0, at], self.layers[layer][1, at] = keys, values

        return write


def loaded(store: kvstore.OpenStore, matcher: Matcher, ids: list[int], start: int, rank: int, ranks: int) -> tuple[Paged, Load, Loads]:
    """A prompt's offer from position `start` on, loaded by one of several ranks into shuffled blocks."""
    layout, heads = store.view.layout, own_heads(rank, ranks, store.view.layout.kv_heads)
    offer = matcher.offer(ids, len(ids) - 1, approximate=True)
    blocks = np.random.default_rng(1).permutation(100)[start // BLOCK : offer.tokens // BLOCK].tolist()
    load = Load("r", start, tuple(blocks), clip(offer.parts, start, offer.tokens))
    paged = Paged(layout.layers, heads.stop - heads.start, layout.head_dim)
    loads = Loads(store, layout, {i: paged.writer(i) for i in range(layout.layers)}, heads, BLOCK, 1)
    loads.start([load])
    return paged, load, loads


def ended(loads: Loads) -> set[str]:
    until = time.monotonic() + 30
    while not (found := loads.finish()) and time.monotonic() < until:
        time.sleep(0.01)
    loads.close()
    return found


@pytest.mark.parametrize(("start", "rank", "ranks"), [(0, 0, 1), (3 * BLOCK, 1, 2)])
def test_a_load_puts_the_same_values_into_the_cache_as_compose(store: kvstore.OpenStore, matcher: Matcher, start: int, rank: int, ranks: int) -> None:
    """Documents side by side, the second one moved: what Hugging Face is given is what vLLM's slots hold, each rank its own heads."""
    names = ["lantern.md", "tower.md"]
    paged, load, loads = loaded(store, matcher, ids_of(store, *names), start, rank, ranks)
    assert ended(loads) == {"r"} and loads.take_damaged() == set()
    at, heads = torch.from_numpy(slots(load.blocks, BLOCK)), own_heads(rank, ranks, 2)
    given = store.compose(names, QUERY, reuse="blocks", tier="lossless").layers
    for (keys, values), cache in zip(given, paged.layers, strict=True):
        for whole, found in zip((keys, values), cache, strict=True):
            assert torch.equal(found[at].transpose(0, 1), whole[0, heads, start : start + load.tokens])
        untouched = torch.ones(cache.shape[1], dtype=torch.bool)
        untouched[at] = False
        assert cache[:, untouched].isnan().all()


def test_damaged_bytes_and_failing_writers_are_reported_as_blocks(
    store: kvstore.OpenStore, matcher: Matcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids, layout = ids_of(store, "tower.md"), store.view.layout
    parts = matcher.offer(ids, len(ids) - 1).parts
    gone = [replace(p, key="0" * 64) for p in parts]

    def broken(keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> None:
        raise RuntimeError("no such slot")

    for wrong, write, message in ((gone, lambda *_: None, "is not stored"), (list(parts), broken, "no such slot")):
        loads = Loads(store, layout, {0: write}, slice(0, 2), BLOCK, 1)
        loads.start([Load("r", 0, (3, 4), tuple(clip(wrong, 0, 2 * BLOCK)))])
        assert ended(loads) == {"r"} and loads.take_damaged() == {3, 4} and loads.take_damaged() == set()
        assert message in caplog.text


def test_planning_needs_neither_vllm_nor_torch() -> None:
    code = "import sys, kvstore.integrations.vllm_requests; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
