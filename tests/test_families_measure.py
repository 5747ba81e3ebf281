"""What is measured on models of many architectures, what is refused, and that the model stays as it was."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)
from torch import nn

from kvstore.errors import IncompatibleError
from kvstore.families.measure import inspect_model, require_layout
from kvstore.families.probe import probe_ids
from kvstore.manifest import RopeRecord

DTYPES = (torch.float32, torch.bfloat16)
GEOMETRY = {  # start, dim, layout of heads of 16 channels
    "phi": (0, 8, "half"),
    "gpt_neox": (0, 4, "half"),
    "glm4": (0, 8, "interleaved"),
}
KINDS = {"llama-llama3": "llama3", "llama-linear": "linear", "llama-yarn": "yarn"}


def rotary(model: nn.Module) -> Any:
    return next(m for m in model.modules() if hasattr(m, "inv_freq"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", tiny.SUPPORTED)
def test_the_record_is_the_models_own_rotary_module(name: str, dtype: torch.dtype) -> None:
    model = tiny.supported(name, dtype)
    found = inspect_model(model)
    assert found.problems == []
    assert found.layout is not None
    (rope,) = found.layout.ropes
    assert (rope.start, rope.dim, rope.layout) == GEOMETRY.get(name, (0, 16, "half"))
    assert np.array_equal(rope.frequencies(), rotary(model).inv_freq.numpy())
    assert rope.scaling == rotary(model).attention_scaling
    assert rope.kind == KINDS.get(name, "default")
    assert rope.arithmetic == ("float32" if name == "olmo2" and dtype != torch.float32 else "model")
    assert found.layout.rope_of == ((0, None, 0) if name == "smollm3" else (0, 0, 0))
    assert found.layout.capture == "hooked"
    assert found.measurements["ropes"][0]["exact"] is True


def test_yarn_has_a_scaling_to_measure() -> None:
    assert tiny.measured("llama-yarn")[1].ropes[0].scaling == pytest.approx(1.1386, abs=1e-4)


def test_layout_says_shapes_and_dtype() -> None:
    layout = tiny.measured("qwen3", torch.bfloat16)[1]
    assert (layout.layers, layout.kv_heads, layout.head_dim, layout.dtype) == (3, 2, 16, "bfloat16")
    assert tiny.measured("gpt_neox")[1].kv_heads == 4


def test_half_precision_is_measured_too() -> None:
    assert tiny.measured("llama", torch.float16)[1].dtype == "float16"


def test_eager_attention_gives_the_same_layout() -> None:
    assert require_layout(tiny.make("llama", {}, attention="eager")) == tiny.measured("llama")[1]


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_refused_by_what_was_found(name: str) -> None:
    with pytest.raises(IncompatibleError, match=tiny.REFUSED[name][2]) as caught:
        require_layout(tiny.refused(name))
    assert "expected" in str(caught.value)
    assert "kvstore doctor" in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", [tiny.OddAttention, tiny.Inline, tiny.Hidden])
def test_a_rotary_nobody_knows_is_found(attention: type[tiny.OddAttention], dtype: torch.dtype) -> None:
    found = inspect_model(tiny.odd_model(attention, dtype))
    assert found.layout is not None, found.problems
    (rope,) = found.layout.ropes
    assert (rope.start, rope.dim, rope.layout) == (8, 8, "interleaved")
    speeds = torch.tensor(tiny.SPEEDS).to(dtype if attention is not tiny.Hidden else torch.float32).float()
    assert rope.frequencies() == pytest.approx(speeds.numpy(), abs=1e-6 if dtype == torch.float32 else 1e-4)
    assert rope.kind == ("fitted" if attention is tiny.Hidden else "default")
    assert found.layout.capture == ("unrotated" if attention is tiny.Inline else "hooked")
    assert found.measurements["ropes"][0]["exact"] is (attention is tiny.OddAttention or rope_is_exact(found, rope))


def test_a_rotation_the_other_way_has_negative_frequencies() -> None:
    found = inspect_model(tiny.odd_model(tiny.Backwards, torch.bfloat16))
    assert found.layout is not None, found.problems
    assert found.layout.ropes[0].frequencies() == pytest.approx(-np.array(tiny.SPEEDS), rel=4e-3)
    assert found.measurements["ropes"][0]["exact"] is True
    assert found.measurements["layers"][0]["table"].endswith("wobble")


def test_a_scaling_that_no_attribute_holds_is_measured() -> None:
    """The rotation is called as an object with keyword arguments, in a class that inherits its `forward`."""
    found = inspect_model(tiny.odd_model(tiny.Kernelled))
    assert found.layout is not None, found.problems
    assert found.layout.capture == "hooked"
    assert found.layout.ropes[0].scaling == pytest.approx(1.005, abs=1e-5)
    assert found.measurements["ropes"][0]["exact"] is False


def rope_is_exact(found: Any, rope: RopeRecord) -> bool:
    """Frequencies fitted to float32 keys may come out right to the last bit; nothing promises it."""
    return rope.kind == "fitted" and found.measurements["ropes"][0]["residual"] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_no_rotation_explains_is_refused_with_its_measurements(dtype: torch.dtype) -> None:
    with pytest.raises(IncompatibleError) as caught:
        require_layout(tiny.odd_model(tiny.Stretching, dtype))
    text = str(caught.value)
    assert "no rotation explains it" in text
    assert "residual" in text
    assert "the keys' norm at position 511 is 3." in text


def test_a_failing_model_is_a_finding_not_a_crash() -> None:
    found = inspect_model(tiny.odd_model(tiny.Broken))
    assert found.layout is None
    assert found.problems == ["the probe could not be run: RuntimeError: no such kernel"]


def test_keys_that_are_not_finite_are_refused() -> None:
    model = tiny.supported("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(IncompatibleError, match=r"layers? 1.*: keys or values are not finite"):
        require_layout(model)


def test_keys_of_zero_are_keys_without_rope() -> None:
    model = tiny.supported("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.zero_()
    assert require_layout(model).rope_of == (0, None, 0)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="no transformers config"):
        require_layout(nn.Linear(2, 2))


def test_the_model_stays_as_it_was() -> None:
    """Mixed training modes, dropout, a random state, buffers: all untouched, and the measurement does not feel them."""
    model = tiny.make("llama", {"attention_dropout": 0.5})
    model.train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert require_layout(model) == tiny.measured("llama")[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[n], t) for n, t in (*model.named_parameters(), *model.named_buffers()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_buffers_that_a_pass_rewrites_are_put_back() -> None:
    model = tiny.odd_model(tiny.Drifting)
    before = {n: b.clone() for n, b in model.named_buffers()}
    buffers = dict(model.named_buffers())
    with pytest.raises(IncompatibleError, match="no rotation explains it"):
        require_layout(model)
    after = dict(model.named_buffers())
    assert all(after[n] is buffers[n] and torch.equal(after[n], before[n]) for n in before)


def test_measurements_are_plain_values() -> None:
    for found in (inspect_model(tiny.measured("llama")[0]), inspect_model(tiny.refused("gpt2"))):
        again = msgspec.json.decode(msgspec.json.encode(found.measurements))
        assert again == found.measurements
    assert {"cache_classes", "offsets", "keys", "values", "dtype"} <= set(again)


def test_probe_ids_are_fixed_inside_the_vocabulary_and_not_special() -> None:
    for fields in ({}, {"vocab_size": 32000}, {"vocab_size": 66}):
        ids = probe_ids(tiny.make("llama", fields))
        assert len(ids) == 64
        assert not set(ids) & {0, 1, 2}
        assert max(ids) < fields.get("vocab_size", tiny.VOCAB)
        assert len(set(ids)) >= 63
        assert ids == probe_ids(tiny.make("llama", fields))
