"""vLLM's cache as the connector must know it: blocks, the heads of a rank, layers, and what is refused. Needs no vLLM; torch-free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import IncompatibleError, InputError
from kvstore.manifest import Layout


def block_range(block_ids: Sequence[int], start: int, end: int, block_size: int) -> tuple[int, ...]:
    """The blocks of positions `start : end`; both lie on block boundaries."""
    if start % block_size or end % block_size or end > len(block_ids) * block_size:
        raise InputError(f"positions {start} to {end} do not fill blocks of {block_size}", code="blocks")
    return tuple(block_ids[start // block_size : end // block_size])


def slots(blocks: Sequence[int], block_size: int) -> npt.NDArray[np.int64]:
    """int64 [len(blocks) * block_size]: the cache slot of each token in `blocks`, in order."""
    return (np.asarray(blocks, np.int64)[:, None] * block_size + np.arange(block_size)).reshape(-1)


def own_heads(rank: int, ranks: int, heads: int) -> slice:
    """The KV heads of one tensor-parallel rank: an equal share each, or, where ranks outnumber heads, one head for several neighbouring ranks.

    Raises IncompatibleError where they cannot be shared out evenly.
    """
    if max(ranks, heads) % min(ranks, heads):
        raise IncompatibleError(f"{heads} KV heads cannot be shared by {ranks} tensor-parallel ranks", remedy="choose another tensor_parallel_size")
    if ranks >= heads:
        first = rank // (ranks // heads)
        return slice(first, first + 1)
    share = heads // ranks
    return slice(rank * share, (rank + 1) * share)


def stored_layers(names: Sequence[str], layers: int, model_layers: int, pipeline: int) -> dict[str, int]:
    """Which stored layer each attention layer of vLLM's takes, by the number in its name: `model.layers.3.self_attn.attn`.

    `layers` are stored, `model_layers` has the model, of which a worker sees a part where `pipeline` stages are more than one.
    Raises IncompatibleError where that is not one stored layer each.
    """
    numbers = {name: [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", f".{name}.")] for name in names}
    vague = [name for name, found in numbers.items() if len(found) != 1]
    order = sorted(names, key=lambda name: numbers[name])
    whole = len(names) == layers if pipeline == 1 else layers == model_layers
    if vague or not whole or len({numbers[n][0] for n in names}) < len(names):
        raise IncompatibleError(
            f"layers: vLLM caches {len(names)} ({', '.join(vague or order[:2])}...), the store holds {layers}",
            remedy="serve this model without the connector, and without speculative layers if it has them",
        )
    return {name: i if pipeline == 1 else numbers[name][0] for i, name in enumerate(order)}


@dataclass(frozen=True)
class Engine:
    """What vLLM says of its cache and its model, in plain values; `heads` and the rest are of one tensor-parallel rank.

    `spec` is the kind of its cache groups, `changes` whatever makes the running model another than its checkpoint.
    """

    spec: str
    groups: int
    dtype: str
    heads: int
    key_width: int
    value_width: int
    ranks: int
    context_parallel: int = 1
    quantized: str = ""
    changes: tuple[str, ...] = ()


def require_served(engine: Engine, layout: Layout) -> None:
    """Raises IncompatibleError, naming the field, where vLLM's cache is not what the stored layout fills."""
    odd = [
        ("latent attention", layout.latent, None),
        ("rotated tensor", layout.rotated, "keys"),
        ("RoPE regime", layout.rope_regime, "static"),
        ("recurrent state", len(layout.state), 0),
        ("cache groups", engine.groups, 1),
        ("cache kind", engine.spec, "FullAttentionSpec"),
        ("cache quantization", engine.quantized, ""),
        ("cache dtype", engine.dtype, layout.dtype),
        ("context parallelism", engine.context_parallel, 1),
        ("KV heads a rank", engine.heads, _count(own_heads(0, engine.ranks, layout.kv_heads))),
        ("head size", (engine.key_width, engine.value_width), (layout.head_dim, layout.head_dim)),
        ("model changed by", ", ".join(engine.changes), ""),
    ]
    wrong = [f"{name} is {found!r}, served is {served!r}" for name, found, served in odd if found != served]
    if wrong:
        raise IncompatibleError(f"the vLLM connector cannot serve this: {'; '.join(wrong)}", remedy="change it, or run without the connector")


def _count(part: slice) -> int:
    return int(part.stop - part.start)
