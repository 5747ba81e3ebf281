"""Tiny random models of many architectures, made from config classes: nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache

from kvstore.families.measure import require_layout
from kvstore.manifest import Layout

VOCAB, WINDOW = 160, 16
EAGER = ("gemma2", "gpt_oss", "bloom")  # capped scores, sinks, ALiBi: no sdpa
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.18, "head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "head_dim": ..., "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
NEXT = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """At this size threads only wait for each other: on a busy machine a pass takes 20 times as long with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def sliding(*types: str, **more: Any) -> dict[str, Any]:
    """Layers that slide where `types` has an s, full ones where it has an f."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return {"sliding_window": WINDOW, "num_hidden_layers": len(types), "layer_types": [names[t] for t in types], **more}


LONG = rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=128)

SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi": ("phi", {"head_dim": ..., **rope("default", partial_rotary_factor=0.5)}),
    "gpt_neox": (
        "gpt_neox",
        {"num_key_value_heads": ..., "head_dim": ..., **rope("default", partial_rotary_factor=0.25)},
    ),
    "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("olmo2", {"head_dim": ...}),
}

# beyond full attention with keys that one table of frequencies turns: windows, shared layers, latents, tables that follow the prompt's length
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", sliding(*"ssf", query_pre_attn_scalar=16)),
    "gemma3n": (
        "gemma3n_text",
        sliding(
            *"sfsfsf", num_kv_shared_layers=2, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, altup_num_inputs=2, laurel_rank=8
        ),
    ),
    "gpt_oss": ("gpt_oss", sliding(*"sfs", num_local_experts=4, num_experts_per_tok=2)),
    "cohere2": ("cohere2", sliding(*"sfs")),
    "olmo3": ("olmo3", sliding(*"sfs", head_dim=...)),
    "deepseek_v2": ("deepseek_v2", {**MLA, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**MLA, "num_mtp_layers": 0}),
    "phi3-longrope": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 128, **LONG}),
    "llama-dynamic": ("llama", rope("dynamic", factor=2.0)),
}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", NEXT),
    "falcon_h1": ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16}),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama4": (
        "llama4_text",
        {
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 1, 0],
            "moe_layers": [],
        },
        "chunked_attention",
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}, "values move with position"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "position_ids"),
}


def make(kind: str, fields: dict[str, Any], dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> nn.Module:
    """A model of `kind` with BASE fields, changed by `fields` (... leaves one out), weights lively and reproducible."""
    merged = {k: v for k, v in (BASE | fields).items() if v is not ...}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **merged)
    return enliven(AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype))


def enliven(model: nn.Module) -> nn.Module:
    """Norms and biases off their neutral values, so that nothing is equal by accident; in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@cache
def measured(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Layout]:
    """A supported model and its layout, made once a test process: tests leave it as it is."""
    model = supported(name, dtype)
    return model, require_layout(model)


def supported(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    kind, fields = (SUPPORTED | FAMILIES | HYBRIDS)[name]
    return make(kind, fields, dtype, "eager" if kind in EAGER else "sdpa")


def refused(name: str) -> nn.Module:
    kind, fields, _ = REFUSED[name]
    return make(kind, fields, attention="eager" if kind in EAGER else "sdpa")


def twirl(q: torch.Tensor, k: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Interleaved rotation of the last 2 * phase.shape[-1] channels; q, k [B, H, T, D], phase [B, T, dim / 2]."""
    return _twirl_one(q, phase), _twirl_one(k, phase)


def _twirl_one(x: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    rest, turned = x[..., : -2 * phase.shape[-1]], x[..., -2 * phase.shape[-1] :]
    c, s = (f.to(x.dtype)[:, None] for f in (phase.cos(), phase.sin()))
    a, b = turned[..., 0::2], turned[..., 1::2]
    return torch.cat([rest, torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)], -1)


SPEEDS = (0.9, 0.31, 0.05, 0.004)


class OddAttention(nn.Module):
    """Attention with a rotary of its own: function, place, layout and frequencies are nobody else's."""

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.heads, self.head_dim = layer_idx, config.num_attention_heads, config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.q = nn.Linear(config.hidden_size, self.heads * self.head_dim)
        self.kv = nn.Linear(config.hidden_size, 2 * self.kv_heads * self.head_dim)
        self.o = nn.Linear(self.heads * self.head_dim, config.hidden_size)
        self.set_speeds(torch.tensor(SPEEDS))

    def set_speeds(self, speeds: torch.Tensor) -> None:
        self.register_buffer("wobble", speeds, persistent=False)

    def phase(self, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids[..., None].float() * self.wobble.float()

    def turn(self, q: torch.Tensor, k: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return twirl(q, k, phase)

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, past_key_values: Cache, **kwargs: Any) -> tuple[torch.Tensor, None]:
        batch, tokens, _ = hidden_states.shape
        shape = (batch, tokens, -1, self.head_dim)
        q = self.q(hidden_states).view(shape).transpose(1, 2)
        k, v = (x.view(shape).transpose(1, 2) for x in self.kv(hidden_states).chunk(2, -1))
        q, k = self.turn(q, k, self.phase(position_ids))
        k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        mask = torch.ones(tokens, k.shape[2], dtype=torch.bool).tril(k.shape[2] - tokens)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(batch, tokens, -1)), None


class Inline(OddAttention):
    """Rotates without a function that could be watched, as a fused kernel would."""

    def turn(self, q: torch.Tensor, k: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turned = [x.clone() for x in (q, k)]
        c, s = (f.to(q.dtype)[:, None] for f in (phase.cos(), phase.sin()))
        for x, y in zip((q, k), turned, strict=True):
            a, b = x[..., 8::2], x[..., 9::2]
            y[..., 8::2], y[..., 9::2] = a * c - b * s, b * c + a * s
        return turned[0], turned[1]


class Backwards(OddAttention):
    """Turns the other way, as some models do."""

    def phase(self, position_ids: torch.Tensor) -> torch.Tensor:
        return -super().phase(position_ids)


class Twirler:
    """Called like a function without being one, as hub kernels are; also scales cos and sin."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor = torch.ones(16)
        factor[8:] = 1.005
        q, k = twirl(query, key, phase)
        return q, k * factor.to(k.dtype)


twirler = Twirler()


class Kernelled(OddAttention):
    def turn(self, q: torch.Tensor, k: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return twirler(query=q, key=k, phase=phase)


class Stretching(OddAttention):
    """Keys also grow with their position, which is no rotation."""

    def turn(self, q: torch.Tensor, k: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = twirl(q, k, phase)
        return q, k * (1.0 + phase[:, None, :, -1:]).to(k.dtype)


class Broken(OddAttention):
    """Cannot run here."""

    def turn(self, q: torch.Tensor, k: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError("no such kernel")


class Drifting(OddAttention):
    """Rewrites its frequencies by the length of the prompt, in place and by a new buffer, under a name of its own."""

    def phase(self, position_ids: torch.Tensor) -> torch.Tensor:
        if int(position_ids.max()) > 100:
            self.wobble.mul_(0.5)
            self.register_buffer("wobble", self.wobble.clone(), persistent=False)
        return super().phase(position_ids)


class Hidden(OddAttention):
    """Its frequencies are plain numbers, in no buffer."""

    def set_speeds(self, speeds: torch.Tensor) -> None:
        self.speeds = speeds.tolist()

    def phase(self, position_ids: torch.Tensor) -> torch.Tensor:
        return position_ids[..., None].float() * torch.tensor(self.speeds)


def odd_model(attention: type[OddAttention], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama whose attention is replaced by `attention`."""
    torch.manual_seed(0)
    config = LlamaConfig(**BASE)
    model = LlamaForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = attention(config, index)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))
    return enliven(model).to(dtype)
