"""Token policies: what they choose, what they are told of attention, and what becomes of dropped tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contracts.policy import FakeView, PolicyContract
from synthetic_calibration import make_calibration, make_values
from tiny_models import SUPPORTED, OddAttention, make, measured, odd_model, one_thread  # noqa: F401
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import kvstore
from kvstore import Document
from kvstore.codecs import get_codec, kind_nbytes
from kvstore.codecs.masked import Mask, MaskedCodec, split, to_bits
from kvstore.errors import FormatError, IncompatibleError, InputError, IntegrityError
from kvstore.families import attention
from kvstore.families.assemble import dynamic_cache
from kvstore.families.masking import mask_dropped, masking, masks
from kvstore.manifest import CodecSpec
from kvstore.parts import Parts, policy_params, steps_of
from kvstore.policies import DROP, NAMES, Assignment, parse
from kvstore.policies.base import Classes
from kvstore.prefill import Prefiller
from kvstore.viewing import Assigner, Kinds, SegmentView

HEAD, CONTEXT = (1, 5, 9), 512
FAMILIES = sorted(SUPPORTED)


class TestUniform(PolicyContract):
    specs: ClassVar[list[str]] = ["uniform"]
    looks: ClassVar[bool] = False


class TestSinkRecent(PolicyContract):
    specs: ClassVar[list[str]] = [
        "sink+recent",
        "sink+recent:sinks=2,recent=0,rest=3",
        "sink+recent:rest=drop,recent=8",
        "sink+recent:keep=-2,rest=0",
    ]
    looks: ClassVar[bool] = False

    def test_keeps_both_ends(self) -> None:
        assert parse("sink+recent:sinks=2,recent=3,rest=2").classes(FakeView(8)).tolist() == [0, 0, 2, 2, 2, 0, 0, 0]


class TestH2O(PolicyContract):
    specs: ClassVar[list[str]] = ["h2o", "h2o:budget=50,rest=drop", "h2o:budget=7,recent=0", "h2o:recent=100,rest=-1,keep=-3"]

    def test_keeps_heavy_hitters_and_the_last(self) -> None:
        view = FakeView(10)
        view.scores = np.broadcast_to(np.array([9, 1, 8, 1, 1, 1, 1, 1, 1, 7], np.float32), view.scores.shape).copy()
        assert parse("h2o:budget=40").classes(view).tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 0, 0]


class TestKVzip(PolicyContract):
    specs: ClassVar[list[str]] = ["kvzip", "kvzip:budget=55,rest=drop", "kvzip:budget=1,rest=3"]

    def test_heads_share_the_budget_where_tokens_are_dropped(self) -> None:
        view = FakeView(20)
        view.scores[1] += 5.0
        kept = parse("kvzip:budget=33,rest=drop").classes(view) == 0
        assert kept[1].sum() == kept.sum() == 39


class TestFastGen(PolicyContract):
    specs: ClassVar[list[str]] = ["fastgen", "fastgen:recover=50,local=10", "fastgen:recover=1", "fastgen:rest=2"]

    def test_takes_the_cheapest_rule_that_recovers_enough(self) -> None:
        view = FakeView(100)
        view.scores[:] = 0.01
        view.scores[0, 0, view.special] = 100.0  # this head looks at control tokens alone
        view.scores[0, 1, view.punctuation] = 100.0
        view.scores[1, 0, 90:] = 100.0  # the nearest
        view.scores[1, 1, 31:34] = 100.0  # a few heavy hitters
        found = parse("fastgen:local=10,frequent=15").assign(view)
        assert found.profile is not None and found.profile.tolist() == [[0, 1], [2, 3], [5, 5]]
        assert (found.classes[0, 0] == 0).tolist() == view.special.tolist()
        assert (found.classes[1, 0] == 0).tolist() == (view.special | view.punctuation | (np.arange(100) >= 90)).tolist()
        assert (found.classes[2] == 0).all()

    def test_a_lower_threshold_never_keeps_more(self) -> None:
        kept = [int((parse(f"fastgen:recover={t}").classes(FakeView(200)) == 0).sum()) for t in (100, 95, 80, 50, 10)]
        assert kept == sorted(kept, reverse=True) and kept[0] == 1200 and kept[-1] < 400


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(InputError, match="uniform, sink\\+recent, fastgen, h2o, kvzip"):
        parse("snapkv")
    for broken in ("h2o:budget", "h2o:budget=3,budget=4"):
        with pytest.raises(InputError, match="key=value"):
            parse(broken)
    assert {parse(n).name for n in NAMES} == set(NAMES)


# what policies are told


class _Encoder:
    """A tokenizer of ids: 1 to 4 are control tokens, multiples of 7 commas."""

    control_ids: ClassVar[frozenset[int]] = frozenset({1, 2, 3, 4})

    class tokenizer:  # noqa: N801
        @staticmethod
        def decode(ids: list[int]) -> str:
            return " ," if ids[0] % 7 == 0 else " word"

    def text(self, text: str) -> list[int]:
        return [5, 6, 7]


def ids_of(tokens: int, seed: int = 1) -> list[int]:
    return torch.randint(5, 160, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def view_of(name: str, tokens: int = 40, chain: tuple[tuple[int, ...], ...] = (HEAD,)) -> SegmentView:
    model, layout = measured(name)
    return SegmentView(Prefiller(model, layout), Kinds(_Encoder()), ids_of(tokens), chain, CONTEXT)  # type: ignore[arg-type]


def plain_attention(name: str, ids: Sequence[int]) -> Tensor:
    """[layers, heads, tokens, tokens] as the model's own eager attention gives it."""
    model = make(*SUPPORTED[name], attention="eager")
    with torch.no_grad():
        return torch.stack(model(torch.tensor([list(ids)]), output_attentions=True).attentions)[:, 0]


@pytest.mark.parametrize("chunk", [1 << 24, 700])
@pytest.mark.parametrize("name", FAMILIES)
def test_mass_is_that_of_plain_attention(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)
    view = view_of(name)
    own = plain_attention(name, [*HEAD, *view.ids.tolist()])[:, :, len(HEAD) :, len(HEAD) :]
    later = own - torch.diag_embed(own.diagonal(dim1=-2, dim2=-1))
    expected = later.sum(-2).unflatten(1, (view.kv_heads, -1)).sum(2)
    np.testing.assert_allclose(view.mass(), expected.numpy(), atol=1e-4)
    assert view.mass() is view.mass()


def test_what_a_choice_recovers_is_that_of_plain_attention() -> None:
    view = view_of("llama", 30)
    kept = np.random.default_rng(0).random((2, view.layers, view.kv_heads, 30)) < 0.4
    found = view.recovered(kept, np.array([0, 5]))
    whole = plain_attention("llama", [*HEAD, *view.ids.tolist()])[:, :, len(HEAD) :]
    places = torch.arange(30)
    for choice, window in enumerate((1, 5)):
        near = places[None] > places[:, None] - window
        seen = torch.from_numpy(kept[choice])[:, :, None] | near
        share = whole[..., : len(HEAD)].sum(-1) + (whole[..., len(HEAD) :] * seen.repeat_interleave(2, 1)).sum(-1)
        np.testing.assert_allclose(found[choice], share.mean(-1).unflatten(1, (2, 2)).amin(2).numpy(), atol=1e-5)
    np.testing.assert_allclose(view.recovered(np.ones_like(kept[:1]), np.array([0])), 1.0, atol=1e-5)


@pytest.mark.parametrize("repeated", [2048, 16])
def test_reconstruction_is_the_largest_attention_while_repeating(repeated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.viewing.REPEATED", repeated)
    view = view_of("llama", 24)
    ids, request = view.ids.tolist(), [5, 6, 7]
    runs = [request + ids] if repeated > 24 else [request + ids[:16], request + ids[8:16] + ids[16:]]
    best = torch.zeros(view.layers, view.kv_heads, 24)
    for run in runs:
        whole = plain_attention("llama", [*HEAD, *ids, *run])[:, :, len(HEAD) + 24 :, len(HEAD) : len(HEAD) + 24]
        best = torch.maximum(best, whole.amax(2).unflatten(1, (view.kv_heads, -1)).amax(2))
    np.testing.assert_allclose(view.reconstruction(), best.numpy(), atol=1e-5)


def test_no_room_to_repeat_is_refused_by_name() -> None:
    view = view_of("llama", 40)
    view.context_tokens = 50
    with pytest.raises(InputError, match="kvzip"):
        view.reconstruction()


def test_kinds_of_tokens() -> None:
    kinds, ids = Kinds(_Encoder()), np.array([1, 7, 8, 14, 3])  # type: ignore[arg-type]
    assert kinds.special(ids).tolist() == [True, False, False, False, True]
    assert kinds.punctuation(ids).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_even_by_an_error(implementation: str) -> None:
    model, layout = make(*SUPPORTED["llama"], attention=implementation), measured("llama")[1]
    ids = torch.tensor([ids_of(12)])
    with torch.no_grad():
        before = model(ids).logits
    view = SegmentView(Prefiller(model, layout), Kinds(_Encoder()), ids_of(20), (HEAD,), CONTEXT)  # type: ignore[arg-type]
    view.mass(), view.reconstruction()
    with pytest.raises(RuntimeError, match="stop"), attention.observing(model, lambda *found: (_ for _ in ()).throw(RuntimeError("stop"))):
        model.get_decoder()(ids)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_attention_that_cannot_be_observed_or_masked_is_refused_by_name() -> None:
    model = odd_model(OddAttention)
    with pytest.raises(IncompatibleError, match=r"cannot be observed: layers \[0, 1, 2\]"), attention.observing(model, lambda *found: None):
        model.get_decoder()(torch.tensor([[5, 6, 7]]), past_key_values=DynamicCache(config=model.config))
    with pytest.raises(IncompatibleError, match=r"cannot mask dropped tokens: layers \[0, 1, 2\]"):
        mask_dropped(model)
    assert model.config._attn_implementation == "sdpa" and not masks(model)
    other = make(*SUPPORTED["llama"])
    other.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(IncompatibleError, match="flex_attention"):
        mask_dropped(other)


# what becomes of dropped tokens at load


def marked(cache: DynamicCache, gone: Tensor, start: int) -> DynamicCache:
    """`cache` with keys of dropped [layers, kv_heads, tokens] as NaN and values as 0, as a load leaves them."""
    layers = []
    for layer, flags in zip(cache.layers, gone, strict=True):
        keys, values = layer.keys.clone(), layer.values.clone()
        keys[:, :, start : start + flags.shape[1]][:, flags], values[:, :, start : start + flags.shape[1]][:, flags] = torch.nan, 0.0
        layers.append((keys, values))
    return layers  # type: ignore[return-value]


def without(layers: Any, gone: Tensor, start: int) -> Callable[..., Any]:
    """An attention by hand, in float64, whose weight on dropped tokens is exactly 0: the reference."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **rest: Any) -> Any:
        flags = torch.zeros(gone.shape[1], key.shape[2], dtype=torch.bool)
        flags[:, start : start + gone.shape[2]] = gone[module.layer_idx]
        group = query.shape[1] // key.shape[1]
        k, v = (x.nan_to_num(0).repeat_interleave(group, 1).double() for x in (key, value))
        scores = query.double() @ k.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        places = torch.arange(key.shape[2])
        future = places[None] > places[-query.shape[2] :, None]
        scores = scores.masked_fill(future, -torch.inf).masked_fill(flags.repeat_interleave(group, 0)[None, :, None], -torch.inf)
        return (scores.softmax(-1) @ v).to(query.dtype).transpose(1, 2), None

    return attend


def lost(model: nn.Module, layout: Any, tokens: int = 30) -> tuple[list[tuple[Tensor, Tensor]], Tensor, list[int]]:
    """Marked layers, what is marked [layers, kv_heads, tokens], and the ids."""
    ids, cache = ids_of(tokens), DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    gone = torch.rand(layout.layers, layout.kv_heads, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    return marked(cache, gone, 0), gone, ids  # type: ignore[return-value]


def after(model: nn.Module, cache: Any, ids: Sequence[int], steps: int = 2) -> Tensor:
    """Logits after a question of several tokens and some single ones."""
    with torch.no_grad():
        found = [model(torch.tensor([list(ids[:-steps])]), past_key_values=cache, use_cache=True).logits]
        found += [model(torch.tensor([[i]]), past_key_values=cache, use_cache=True).logits for i in ids[-steps:]]
    return torch.cat(found, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_tokens_have_no_weight_in_prefill_and_in_steps(name: str, implementation: str) -> None:
    model, layout = make(*SUPPORTED[name], attention=implementation), measured(name)[1]
    layers, gone, _ = lost(model, layout)
    question = ids_of(9, seed=5)
    unmasked = after(model, dynamic_cache(model.config, layers), question)
    assert unmasked.isnan().all()  # never quietly wrong
    mask_dropped(model)
    found = after(model, dynamic_cache(model.config, layers), question)
    from transformers import AttentionInterface

    AttentionInterface.register("test_without", without(layers, gone, 0))
    with attention.switched(model, "test_without"):
        expected = after(model, dynamic_cache(model.config, layers), question)
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, after(model, dynamic_cache(model.config, [(k.nan_to_num(0), v) for k, v in layers]), question))


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_weights_on_dropped_tokens_are_below_a_millionth(name: str) -> None:
    model, layout = make(*SUPPORTED[name], attention="eager"), measured(name)[1]
    layers, gone, _ = lost(model, layout)
    seen: list[Tensor] = []
    own = __import__("sys").modules[type(model).__module__].eager_attention_forward

    def spying(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        seen.append(out[1])
        return out

    mask_dropped(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(__import__("sys").modules[type(model).__module__], "eager_attention_forward", spying)
        after(model, dynamic_cache(model.config, layers), ids_of(9, seed=5))
    for index, weights in enumerate(seen):
        flags = gone[index % layout.layers].repeat_interleave(weights.shape[1] // layout.kv_heads, 0)[None, :, None]
        assert float((weights[..., : gone.shape[2]] * flags).max()) < 1e-6
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_marks_follow_the_cache_through_crops_batches_joins_and_static_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = make(*SUPPORTED["llama"]), measured("llama")[1]
    layers, _, ids = lost(model, layout)
    question = ids_of(6, seed=7)
    mask_dropped(model)
    whole = after(model, dynamic_cache(model.config, layers), question)
    grown = dynamic_cache(model.config, layers)
    after(model, grown, question)
    grown.crop(-len(question))
    torch.testing.assert_close(after(model, grown, question), whole)
    doubled = dynamic_cache(model.config, layers)
    doubled.batch_repeat_interleave(2)
    with torch.no_grad():
        rows = model(torch.tensor([question, question]), past_key_values=doubled, use_cache=True).logits
    torch.testing.assert_close(rows[:1, :4], whole[:, :4])
    torch.testing.assert_close(rows[1:, :4], whole[:, :4])
    still = StaticCache(config=model.config, max_cache_len=64)
    for index, (keys, values) in enumerate(layers):
        still.update(keys, values, index)
    mask = torch.ones(1, len(ids) + len(question), dtype=torch.long)
    with torch.no_grad():
        static = model(torch.tensor([question]), attention_mask=mask, past_key_values=still, use_cache=True).logits
    torch.testing.assert_close(static[:, :4], whole[:, :4], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("kvstore.families.masking.ROWS", 64)  # a row at a time
    torch.testing.assert_close(after(model, dynamic_cache(model.config, layers), question), whole, atol=1e-5, rtol=1e-5)
    joined = [(torch.cat([k, k], 2), torch.cat([v, v], 2)) for k, v in layers]
    assert after(model, dynamic_cache(model.config, joined), question).isfinite().all()


def test_without_dropped_tokens_a_masking_model_is_the_same_bit_for_bit_and_can_go_back() -> None:
    for implementation in ("sdpa", "eager"):
        model = make(*SUPPORTED["qwen3"], attention=implementation)
        ids = torch.tensor([ids_of(20)])
        with torch.no_grad():
            before = model(ids).logits
            with masking(model):
                assert masks(model) and torch.equal(model(ids).logits, before)
            assert not masks(model)
            mask_dropped(model)
            mask_dropped(model)
            assert torch.equal(model(ids).logits, before)
        model.set_attn_implementation(implementation)
        assert not masks(model)


# in codecs


def masked(codec: str, policy: str = "h2o:budget=40,keep=0,recent=50,rest=drop") -> MaskedCodec:
    calibration = make_calibration() if codec == "transform" else None
    params = {"key_step": 450, "value_group": 8, "value_step": 560} if codec == "scalar" else {}
    found = get_codec(codec, 1, {**params, "policy": policy}, calibration)
    assert isinstance(found, MaskedCodec)
    return found


@pytest.mark.parametrize("codec", ["scalar", "transform"])
@pytest.mark.parametrize("tokens", [1, 31, 32, 100])
def test_dropped_values_come_back_as_nan_keys_and_zero_values_and_cost_little(codec: str, tokens: int) -> None:
    coder = masked(codec)
    values = make_values(tokens, draw=1)[:2]
    bits = to_bits(values, "bfloat16")
    gone = np.random.default_rng(0).random((2, 2, tokens)) < 0.7
    profile = np.array([[1, 2], [3, 4]], np.uint8)
    records = coder.encode_masked(bits, "bfloat16", 0, Mask(gone, profile))
    _, mask = split(records[0])
    assert (mask.dropped == gone).all() and (mask.profile == profile).all()
    assert coder.peek_tokens(records[0]) == tokens
    whole = coder.inner.encode(bits, "bfloat16", 0)
    if tokens == 100:
        limit = 0.8 if codec == "scalar" else 0.95  # of 16 channels a token; with means instead of likely values transform would take 1.35
        assert sum(map(len, records)) < limit * sum(map(len, whole))
    for count in range(1, len(records) + 1):
        out = np.zeros(bits.shape, np.float32)
        coder.decode(records[:count], out)
        heads = out.reshape(2, 2, tokens, 2, -1)
        flags = gone.transpose(0, 2, 1)
        assert np.isnan(heads[:, 0][flags]).all() and (heads[:, 1][flags] == 0).all()
        kept, expected = heads[:, 0][~flags], values.reshape(2, 2, tokens, 2, -1)[:, 0][~flags]
        if kept.size:
            assert np.isfinite(kept).all() and np.abs(kept - expected).mean() < 1.5 * np.abs(expected).mean()


def test_one_row_where_all_heads_agree_and_nothing_where_nothing_is_dropped() -> None:
    coder, bits = masked("scalar"), to_bits(make_values(64)[:1], "bfloat16")
    alike = np.broadcast_to(np.arange(64) % 3 == 0, (1, 2, 64))
    differing = alike.copy()
    differing[0, 1, 5] ^= True
    none = np.zeros((1, 2), np.uint8)
    section = {name: len(Mask(flags, none).bytes()) for name, flags in (("alike", alike), ("differing", differing))}
    assert section == {"alike": 4 + 4 + 8, "differing": 4 + 4 + 16}
    out = np.empty(bits.shape, np.float32)
    coder.decode(coder.encode(bits, "bfloat16"), out)
    assert np.isfinite(out).all()


def test_damaged_masks_are_damage() -> None:
    coder, bits = masked("scalar"), to_bits(make_values(40)[:1], "bfloat16")
    records = coder.encode_masked(bits, "bfloat16", 0, Mask(np.random.default_rng(1).random((1, 2, 40)) < 0.5, np.zeros((1, 2), np.uint8)))
    out = np.empty(bits.shape, np.float32)
    for at, value in ((12, 0), (12, 3), (14, 7), (18, 9), (27, 0xFF)):  # heads, kind, a choice of a head there is not, padding of a row
        broken = bytearray(records[0])
        broken[at] = value
        with pytest.raises(IntegrityError):
            coder.decode([bytes(broken), records[1]], out)
    with pytest.raises(IntegrityError):
        coder.decode([records[0][:12], records[1]], out)
    with pytest.raises(IntegrityError):
        coder.decode([records[0][:24], records[1]], out)


def test_codecs_refuse_policies_that_they_cannot_do() -> None:
    for name, policy in (("raw", "h2o"), ("scalar", "h2o"), ("scalar", "sink+recent:keep=-1,rest=drop"), ("transform", "fastgen:rest=1")):
        with pytest.raises(IncompatibleError, match="rest=drop|--codec transform"):
            policy_params(parse(policy), name)
    assert policy_params(parse("uniform"), "raw") == {} == policy_params(None, "scalar")
    assert policy_params(parse("h2o:budget=20"), "transform") == {"policy": "h2o:budget=20,keep=0,recent=50,rest=1"}
    assert policy_params(parse("fastgen"), "scalar") == {"policy": "fastgen:frequent=30,local=30,recover=95,rest=drop"}
    for params in ({"policy": "h2o"}, {"policy": "nobody"}, {"policy": "uniform"}):  # not canonical, unknown, never written
        with pytest.raises(FormatError, match="policy"):
            get_codec("transform", 1, params, make_calibration())


def test_step_classes_reach_the_codec_and_are_what_the_record_says() -> None:
    coder = get_codec("transform", 1, {"policy": parse("h2o").spec}, make_calibration())
    bits = to_bits(make_values(60)[:2], "bfloat16")
    steps = np.repeat(np.array([0, 2], np.int8), 30)
    errors = []
    for given in (None, steps):
        out = np.empty(bits.shape, np.float32)
        options = {} if given is None else {"steps": given}
        coder.decode(coder.encode(bits, "bfloat16", 0, **options), out)
        errors.append(np.square(out - make_values(60)[:2]).mean(axis=(0, 1, 3)))
    assert errors[1][30:].mean() > 10 * errors[0][30:].mean() and errors[1][:30].mean() < 2 * errors[0][:30].mean()


def test_classes_of_heads_become_one_step_or_are_refused() -> None:
    def steps(*heads: Sequence[int]) -> list[int] | None:
        found = steps_of(np.array(heads, np.int8)[None])
        return None if found is None else found.tolist()

    assert steps([0, DROP, 0], [DROP, DROP, 0]) is None
    assert steps([1, DROP, 0], [DROP, DROP, 0]) == [1, 3, 0]
    with pytest.raises(IncompatibleError, match="rest=drop"):
        steps([0, 1], [0, 2])
    layout = measured("llama")[1]
    part = Parts(Assignment(np.array([0, DROP, 1], np.int8)), layout).cell(1, 2, 1, 5)
    assert part.steps is not None and part.steps.tolist() == [3, 1]
    assert part.mask is not None and part.mask.dropped.shape == (2, layout.kv_heads, 2) and part.mask.dropped[..., 0].all()


def test_bytes_by_kind_leave_the_mask_out() -> None:
    coder, bits = masked("scalar"), to_bits(make_values(64)[:1], "bfloat16")
    spec = CodecSpec("scalar", 1, coder.params)
    records = coder.encode_masked(bits, "bfloat16", 0, Mask(np.zeros((1, 2, 64), np.bool_), np.zeros((1, 2), np.uint8)))
    plain = coder.inner.encode(bits, "bfloat16", 0)
    for level in (0, 1):
        found = kind_nbytes(spec, level, records[level], "bfloat16")
        assert found is not None and found == type(coder.inner).kind_nbytes(plain[level], coder.inner.params, "bfloat16")


# from build to answer

TEXTS = {
    "tower.md": "The silver tower stands at the end of the harbour road. The access code of the silver tower is 4821. Nobody lives there.",
    "lantern.md": "An old lantern hangs by the door of the inn. The keeper of the old lantern is Mercer. He lights it when the fog comes in.",
}
QUERY = "What is the access code of the silver tower?"


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory, bundled_model: Any, bundled_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    documents = [Document(text, name) for name, text in TEXTS.items()]
    report = kvstore.build(
        documents, path, bundled_model, bundled_tokenizer, regime="both", codec="scalar", lossless=True, policy="h2o:budget=90,rest=drop"
    )
    assert 0 < report.quality["fine"]["kl"] < 2 and report.seconds["policy"] > 0
    assert bundled_model.config._attn_implementation == "sdpa"
    return path


def test_a_load_with_dropped_tokens_needs_a_model_that_masks_them(dropping: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    store = kvstore.open(dropping, bundled_model, bundled_tokenizer)
    with pytest.raises(IncompatibleError, match=r"tower.md has dropped tokens.*mask_dropped"):
        store.compose(["tower.md"], QUERY, tier="fine")
    with pytest.raises(IncompatibleError, match="tower.md"):
        store.load("tower.md", tier="standard")
    with pytest.raises(IncompatibleError, match="h2o:budget=90"):
        store.read("tower.md", tier="fine")
    exact = store.compose(["tower.md"], QUERY, tier="lossless")
    assert exact.receipt.exact and not exact.masked and all(k.isfinite().all() for k, _ in exact.layers)
    with masking(bundled_model):
        prompt = store.compose(["tower.md"], QUERY, tier="fine")
        assert prompt.masked and any(k.isnan().any() for k, _ in prompt.layers) and all(v.isfinite().all() for _, v in prompt.layers)
        out = bundled_model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)
        assert "4821" in bundled_tokenizer.decode(out[0, prompt.input_ids.shape[1] :])
        static = bundled_model.generate(**prompt.static(8), max_new_tokens=6, do_sample=False)
        assert torch.equal(out, static)
        several = store.compose(["lantern.md", "tower.md"], QUERY, reuse="blocks", tier="fine")
        batch = kvstore.collate([prompt, several])
        rows = bundled_model.generate(**batch, max_new_tokens=6, do_sample=False)
        assert "4821" in bundled_tokenizer.decode(rows[0, -6:])
    for use in (lambda: prompt.cache, lambda: prompt.inputs, lambda: prompt.static(4), lambda: kvstore.collate([prompt])):
        with pytest.raises(IncompatibleError, match="mask_dropped"):
            use()


def test_the_share_of_dropped_tokens_is_the_policys_and_the_head_is_whole(dropping: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    store = kvstore.open(dropping, bundled_model, bundled_tokenizer)
    with masking(bundled_model):
        prompt = store.compose(["tower.md"], QUERY, tier="standard")
    head, tokens = prompt.receipt.documents[0].tokens, prompt.receipt.documents[1].tokens
    gone = torch.stack([k[0, :, head : head + tokens, 0].isnan() for k, _ in prompt.layers])
    assert gone.float().mean() == pytest.approx(0.1, abs=0.02)
    assert not any(k[0, :, :head].isnan().any() for k, _ in prompt.layers)
    smaller = store["tower.md"].nbytes("fine")
    assert smaller < store["tower.md"].nbytes("lossless") / 2


def test_a_model_that_kvstore_loads_masks_by_itself(dropping: Path) -> None:
    store = kvstore.open(dropping, kvstore.bundled.model_path())
    assert store.compose(["tower.md"], QUERY, tier="fine").masked
    assert masks(store.model)


def test_the_policy_is_part_of_the_encodings_identity(dropping: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    store = kvstore.open(dropping)
    (encoding,) = store.encodings().values()
    assert encoding.codec("scalar").params["policy"] == "h2o:budget=90,keep=0,recent=50,rest=drop"
    assert "policy" not in encoding.codec("lossless").params


def test_a_build_refuses_before_anything_is_stored(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    with pytest.raises(IncompatibleError, match="--codec transform"):
        kvstore.build([Document("text", "a")], tmp_path / "s", bundled_model, bundled_tokenizer, codec="scalar", policy="h2o")
    with pytest.raises(InputError, match="choose one of"):
        kvstore.build([Document("text", "a")], tmp_path / "s", bundled_model, bundled_tokenizer, codec="scalar", policy="best")


def test_the_head_is_left_alone() -> None:
    model, layout = measured("llama")
    assign = Assigner(parse("h2o:rest=drop"), Prefiller(model, layout), _Encoder(), CONTEXT)  # type: ignore[arg-type]
    assert assign(HEAD, ()) is None
    found = assign(ids_of(20), (HEAD,))
    assert found is not None
    classes: Classes = found.classes
    assert classes.shape == (layout.layers, layout.kv_heads, 20)
