"""Keys: which model, which tokens in which context, in which encoding. Design section 3.

Only exact things enter a key. Numbers of the config that are not whole enter as their exact hexadecimal form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from kvstore.digest import Canonical, digest
from kvstore.errors import IncompatibleError, InputError
from kvstore.manifest import Layout, Model

# Config fields that change K or V, for every architecture that kvstore accepts. A field that is absent or None is left out. Fields of
# architectures unknown here are caught by the probe (kvstore.fingerprint), which compares K and V themselves.
KV_FIELDS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act hidden_activation rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps attention_bias mlp_bias qkv_bias use_qkv_bias "
    "qk_norm use_qk_norm qk_layernorm clip_qkv parallel_residual use_parallel_residual "
    "rope_parameters rope_theta rope_scaling rotary_pct partial_rotary_factor rotary_emb_base original_max_position_embeddings "
    "no_rope_layers no_rope_layer_interval layer_types sliding_window use_sliding_window max_window_layers attention_chunk_size "
    "attention_multiplier residual_multiplier embedding_multiplier scale_depth scale_emb query_pre_attn_scalar attn_logit_softcapping "
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers "
    "first_k_dense_replace n_routed_experts n_shared_experts routed_scaling_factor "
    "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim rope_interleave num_kv_shared_layers "
    "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
    "mamba_d_ssm mamba_norm_before_gate mamba_rms_norm ssm_in_multiplier ssm_out_multiplier ssm_multipliers "
    "attention_in_multiplier attention_out_multiplier key_multiplier mlp_multipliers"
).split()


def exact(value: Any) -> Canonical:
    """A config value in canonical form: whole numbers as int, others as hexadecimal floats, so 10000.0 equals 10000."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value.hex()
    if isinstance(value, Mapping):
        return {str(k): exact(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [exact(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def kv_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model's (text) config that change its KV, in canonical form."""
    return {name: exact(config[name]) for name in KV_FIELDS if config.get(name) is not None}


def weights_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]], vocab_size: int | None) -> str:
    """Digest of a checkpoint from name -> (dtype, shape, sha256 of the bytes).

    An output head that is byte for byte the input embedding (tied weights: some checkpoints hold it once, some twice) counts once.
    """
    embeddings: dict[tuple[str, str], list[str]] = {}
    for name, (dtype, shape, sha) in tensors.items():
        if len(shape) == 2 and shape[0] == vocab_size:
            embeddings.setdefault((dtype, sha), []).append(name)
    # of equal tables keep the one deepest in the module tree: `model.embed_tokens.weight`, not `lm_head.weight`
    tied = {n for names in embeddings.values() for n in sorted(names, key=lambda n: (-n.count("."), n))[1:]}
    rows: list[Canonical] = [[name, dtype, list(shape), sha] for name, (dtype, shape, sha) in sorted(tensors.items()) if name not in tied]
    return digest("kvstore/weights/1", rows)


def make_model(name: str, **fields: Any) -> Model:
    """A Model with its key. `name` is for display and stays outside the key."""
    unkeyed = Model(key="", name=name, **fields)
    body = {k: v for k, v in msgspec.to_builtins(unkeyed).items() if k not in ("key", "name")}
    return msgspec.structs.replace(unkeyed, key=digest("kvstore/model/1", body))


@dataclass(frozen=True)
class Context:
    """What stands before a segment: nothing (`root`), anchor ids whose own KV is not kept, or a parent segment.

    `tokens` is how many positions the context takes.
    """

    kind: str
    value: str | tuple[int, ...]
    tokens: int

    @classmethod
    def root(cls) -> Context:
        return cls("root", (), 0)

    @classmethod
    def anchor(cls, ids: Sequence[int]) -> Context:
        return cls("anchor", tuple(ids), len(ids)) if ids else cls.root()

    @classmethod
    def parent(cls, key: str, tokens: int) -> Context:
        return cls("parent", key, tokens)


def id_bytes(ids: Sequence[int]) -> bytes:
    """Token ids as uint32 little-endian. Raises InputError for what is none: numpy would wrap it silently."""
    array = np.asarray(ids)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 0xFFFFFFFF):
        raise InputError("token ids must be whole numbers from 0 to 2**32 - 1", remedy="check the tokenizer")
    return array.astype("<u4").tobytes()


def segment_key(model: Model, layout: Layout, context: Context, ids: Sequence[int]) -> str:
    """The name of a run of token ids prefilled by `model` after `context`, under the frequency table that `layout` names."""
    before = id_bytes(context.value) if isinstance(context.value, tuple) else context.value
    return digest(
        "kvstore/segment/1",
        {
            "model": model.key,
            "layout": layout.identity(),
            "context": [context.kind, before, context.tokens],
            "rope": layout.rope_regime,
            "ids": id_bytes(ids),
        },
    )


def artifact_id(segment: str, encoding_id: str) -> str:
    """The name of one segment in one encoding."""
    return digest("kvstore/artifact/1", [segment, encoding_id])


def difference(ours: Model, theirs: Model) -> list[str]:
    """Names of the fields in which two models differ; for configs the fields inside."""
    names = [f for f in ("dtype", "weights", "adapters", "quantization", "code") if getattr(ours, f) != getattr(theirs, f)]
    fields = sorted(ours.config.keys() | theirs.config.keys())
    return names + [f"config.{f}" for f in fields if ours.config.get(f) != theirs.config.get(f)]


def require_same(ours: Model, stored: Sequence[Model]) -> None:
    """Refuse a model that no stored artifact was made by, naming what differs from the nearest one."""
    if not stored or any(m.key == ours.key for m in stored):
        return
    nearest = min(stored, key=lambda m: len(difference(ours, m)))
    fields = ", ".join(_shown(f, nearest, ours) for f in difference(ours, nearest))
    raise IncompatibleError(
        f"the store was built by another model ({nearest.name}); different: {fields}",
        remedy="open it with the model it was built by, or build this corpus with the new model",
    )


def _shown(field: str, stored: Model, ours: Model) -> str:
    def value(m: Model) -> str:
        found = m.config.get(field[7:]) if field.startswith("config.") else getattr(m, field)
        return str(found)[:16]

    return f"{field} (stored {value(stored)}, given {value(ours)})"
