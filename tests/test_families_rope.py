"""Rotation equals transformers' own functions bit for bit, and its inverse undoes it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

from kvstore.families.rope import cos_sin, rotate, unrotate
from kvstore.manifest import RopeRecord

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = torch.cat([torch.arange(40), torch.arange(7000, 7030), torch.arange(131000, 131072)])


def record(dim: int, layout: Any = "half", start: int = 0, scaling: float = 1.0, arithmetic: Any = "model") -> RopeRecord:
    inv_freq = 10000.0 ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return RopeRecord(start, dim, layout, inv_freq.astype("<f4").tobytes().hex(), scaling, arithmetic, "default")


def keys(heads: int = 3, width: int = 32, dtype: torch.dtype = torch.float32, tokens: int = len(POSITIONS)) -> torch.Tensor:
    return torch.randn(heads, tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def tables(rope: RopeRecord, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, dim] the way LlamaRotaryEmbedding makes them, before any cast if dtype is float32."""
    angle = POSITIONS[None, :, None].float() * torch.from_numpy(rope.frequencies().copy())
    both = torch.cat((angle, angle), -1)
    return (both.cos() * rope.scaling).to(dtype), (both.sin() * rope.scaling).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rope", "module", "rounded"),
    [
        (record(32), modeling_llama, True),
        (record(32, scaling=1.1386294361119891), modeling_llama, True),
        (record(8), modeling_gpt_neox, True),
        (record(16, "interleaved"), modeling_glm4, True),
        (record(32, arithmetic="float32"), modeling_olmo2, False),
    ],
    ids=["llama", "yarn", "gpt_neox", "glm4", "olmo2"],
)
def test_equals_transformers_bit_for_bit(rope: RopeRecord, module: Any, rounded: bool, dtype: torch.dtype) -> None:
    k = keys(dtype=dtype)
    cos, sin = tables(rope, dtype if rounded else torch.float32)
    expected = module.apply_rotary_pos_emb(k[None], k[None], cos, sin)[1][0]
    assert expected.dtype == dtype
    assert torch.equal(rotate(k, POSITIONS, rope), expected)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_pairs_turn_by_position_times_frequency(layout: Any) -> None:
    rope = record(8, layout, start=24)
    turned = rotate(torch.ones(1, 1, 32), torch.tensor([3]), rope)[0, 0]
    first, second = (24, 28) if layout == "half" else (24, 25)
    assert turned[:24].tolist() == [1.0] * 24
    assert turned[first].item() == pytest.approx(math.cos(3) - math.sin(3), abs=1e-6)
    assert turned[second].item() == pytest.approx(math.cos(3) + math.sin(3), abs=1e-6)


def test_negative_frequencies_turn_the_other_way() -> None:
    rope = record(16)
    back = RopeRecord(0, 16, "half", (-rope.frequencies()).tobytes().hex(), 1.0, "model", "default")
    there = rotate(keys(width=16), POSITIONS, rope)
    assert torch.allclose(rotate(there, POSITIONS, back), keys(width=16), atol=1e-5)


@pytest.mark.parametrize("arithmetic", ["model", "float32"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_out_gets_the_same_bits_and_nothing_beside_it_changes(layout: Any, arithmetic: Any) -> None:
    rope = record(16, layout, start=16, arithmetic=arithmetic)
    token_major = keys(dtype=torch.bfloat16).transpose(0, 1).contiguous()  # as decoders hold it
    k = token_major.transpose(0, 1)
    cache = torch.full((1, 3, 400, 32), 7.0, dtype=torch.bfloat16)
    slot = cache[0, :, 100 : 100 + len(POSITIONS)]
    returned = rotate(k, POSITIONS, rope, out=slot, angles=cos_sin(POSITIONS, rope, k.dtype, "cpu"))
    assert returned.data_ptr() == slot.data_ptr()
    assert torch.equal(slot, rotate(k.contiguous(), POSITIONS, rope))
    rest = torch.cat([cache[:, :, :100], cache[:, :, 100 + len(POSITIONS) :]], 2)
    assert bool((rest == 7.0).all())
    assert torch.equal(token_major, keys(dtype=torch.bfloat16).transpose(0, 1))


def test_float32_keys_into_a_bfloat16_cache_round_once() -> None:
    rope, out = record(32), torch.empty(3, len(POSITIONS), 32, dtype=torch.bfloat16)
    assert torch.equal(rotate(keys(), POSITIONS, rope, out=out), rotate(keys(), POSITIONS, rope).bfloat16())


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_unrotate_is_the_inverse(layout: Any, dtype: torch.dtype, limit: float) -> None:
    rope, k = record(16, layout, start=8, scaling=1.25), keys(dtype=dtype)
    back = unrotate(rotate(k, POSITIONS, rope), POSITIONS, rope)
    assert back.dtype == dtype
    assert float((back.float() - k.float()).norm() / k.float().norm()) < limit
    assert torch.equal(back[..., :8], k[..., :8])


def test_gradient_reaches_the_keys() -> None:
    """The graph has the same bits as the fast path, and a rotation's gradient is the inverse rotation."""
    rope, g = record(16, "interleaved", start=8), torch.randn(3, len(POSITIONS), 32)
    k = keys().requires_grad_()
    turned = rotate(k, POSITIONS, rope)
    turned.backward(g)
    assert torch.equal(turned.detach(), rotate(keys(), POSITIONS, rope))
    assert k.grad is not None
    assert torch.allclose(k.grad, unrotate(g, POSITIONS, rope), atol=1e-6)


def test_positions_may_jump_and_repeat() -> None:
    rope, k = record(32), keys(tokens=4)
    at = torch.tensor([5, 5, 900, 0])
    whole = rotate(k, at, rope)
    for i, position in enumerate(at.tolist()):
        assert torch.equal(whole[:, i : i + 1], rotate(k[:, i : i + 1], torch.tensor([position]), rope))
