"""What a model caches and how its keys turn with position, found by running it: no model is known by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
import torch
from torch import nn

from kvstore.errors import IncompatibleError
from kvstore.families.fit import Fit, Table, fit_rotation, moved, tables
from kvstore.families.probe import PROBE_TOKENS, Singles, furthest_position, probe_ids, untouched, watch
from kvstore.families.prove import Proof, nearby_floats, prove
from kvstore.families.prove_states import state_of
from kvstore.families.refuse import cache_problems, config_problems, listed, new_cache, rope_kinds, rope_limit, rope_regime, text_config
from kvstore.families.rope import tolerance
from kvstore.families.slots import kv_layers
from kvstore.manifest import Layout, RopeRecord, ValueDtype

KINDS = ("keys", "values")
DEEPER = 16


@dataclass
class Inspection:
    """`layout` where the model is supported, else `problems`: what was found and what was expected, one line each.

    `measurements` (plain values, as far as it came): cache_classes, offsets, keys and values ([kv_heads, head_dim]),
    dtype, values_move, tolerance, tables, layers (a dict each), state_nbytes, capture, ropes (a dict each).
    """

    layout: Layout | None = None
    problems: list[str] = field(default_factory=list)
    measurements: dict[str, Any] = field(default_factory=dict)


def require_layout(model: nn.Module) -> Layout:
    """The layout of a supported model. Raises IncompatibleError that lists what was measured."""
    found = inspect_model(model)
    if found.layout is None:
        raise IncompatibleError(
            f"{type(model).__name__}: " + "; ".join(found.problems),
            remedy="`kvstore doctor` shows all measurements; this model's cache cannot be stored yet",
        )
    return found.layout


def inspect_model(model: nn.Module) -> Inspection:
    """Measure how `model` (a causal language model of transformers, any device and dtype) caches and rotates.

    Four to eight passes over 16 single tokens and two over 64. The model's mode and buffers are left as they were.
    """
    found = Inspection(problems=config_problems(model))
    if text_config(model) is None:
        return found
    cache = new_cache(model)
    found.measurements["cache_classes"] = [type(layer).__name__ for layer in cache.layers]
    found.problems += cache_problems(cache)
    if found.problems:
        return found
    with untouched(model):
        try:
            _measure(model, found)
        except Exception as error:  # any code of any model may run here, and its failure is a finding
            found.layout = None
            found.problems.append(f"the probe could not be run: {type(error).__name__}: {error}")
    return found


def _measure(model: nn.Module, found: Inspection) -> None:
    """Fill in `found`, stopping at the first kind of problem."""
    singles, far = Singles(model, probe_ids(model)), furthest_position(model)
    offsets = sorted({9, far // 3, far})
    found.measurements["offsets"] = [0, *offsets]
    for look in (_check_shapes, _check_finite, _check_values):
        look(singles, offsets, found)
        if found.problems:
            return
    fits = _fit_layers(model, singles, offsets, found)
    state, problems = state_of(model)
    if state:
        found.measurements["state_nbytes"] = sum(t.nbytes for t in state)
    found.problems += problems
    if not found.problems:
        layout = _layout(model, singles, fits, far, found)
        found.layout = None if layout is None else msgspec.structs.replace(layout, state=state)


def _check_shapes(singles: Singles, offsets: Sequence[int], found: Inspection) -> None:
    """Keys and values of one shape [kv_heads, head_dim] in all layers (latent attention: two widths of one head), of one dtype that is stored."""
    layers = kv_layers(singles.cache(0))
    shapes = [(tuple(x.keys.shape), tuple(x.values.shape)) for x in layers]
    dtypes = {str(t.dtype).removeprefix("torch.") for x in layers for t in (x.keys, x.values)}
    (_, heads, _, width), (_, v_heads, _, v_width) = shapes[0]
    found.measurements |= {"keys": [heads, width], "values": [v_heads, v_width], "dtype": min(dtypes)}
    if (heads, width) != (v_heads, v_width) and ((heads, v_heads) != (1, 1) or (width + v_width) % 2):
        text = f"keys are [{heads}, {width}] and values [{v_heads}, {v_width}]"
        found.problems.append(f"layer 0: {text}; expected one shape [kv_heads, head_dim], or one head of an even number of channels together")
    odd = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
    if odd:
        found.problems.append(f"{listed(odd)}: keys, values {shapes[odd[0]]}; expected {shapes[0]} as in layer 0")
    if len(dtypes) != 1 or not dtypes <= set(get_args(ValueDtype)):
        found.problems.append(f"the cache holds {', '.join(sorted(dtypes))}; expected one of {', '.join(get_args(ValueDtype))}")


def _check_finite(singles: Singles, offsets: Sequence[int], found: Inspection) -> None:
    """Nothing can be measured on keys that are NaN or infinite, and NaN passes every comparison with a limit."""
    passes = [kv_layers(singles.cache(position)) for position in (0, *offsets)]
    both = [[t for x in passes for t in (x[i].keys, x[i].values)] for i in range(len(passes[0]))]
    bad = [i for i, tensors in enumerate(both) if not all(bool(t.isfinite().all()) for t in tensors)]
    if bad:
        found.problems.append(f"{listed(bad)}: keys or values are not finite; expected finite numbers")


def _check_values(singles: Singles, offsets: Sequence[int], found: Inspection) -> None:
    """A token alone has the same values at every position, unless positions enter elsewhere. Latent attention may turn them instead of keys."""
    count, dtype = len(kv_layers(singles.cache(0))), singles.pair(0, 0)[1].dtype
    moves = [[max(moved(singles.pair(i, 0)[kind], singles.pair(i, d)[kind]) for d in offsets) for kind in (0, 1)] for i in range(count)]
    found.measurements["values_move"] = max(values for _, values in moves)
    found.measurements["turned"] = "keys"
    if is_latent(found) and max(keys for keys, _ in moves) <= still(dtype):
        found.measurements["turned"] = "values"
        return
    bad = [i for i, (_, values) in enumerate(moves) if values > room(still(dtype), dtype, i)]
    if bad:
        text = f"values move with position (by {moves[bad[0]][1]:.2g} of their size)"
        found.problems.append(f"{listed(bad)}: {text}; expected keys alone to move")


def is_latent(found: Inspection) -> bool:
    """Whether keys and values differ in width, as measured."""
    return bool(found.measurements["keys"] != found.measurements["values"])


def _fit_layers(model: nn.Module, singles: Singles, offsets: list[int], found: Inspection) -> list[Fit | None]:
    """Per layer the rotation of its keys, None where they do not move."""
    turned = found.measurements["turned"]
    first = singles.pair(0, 0)[KINDS.index(turned)]
    known, limit = tables(model, first.shape[-1]), tolerance(first.dtype, offsets[-1])
    found.measurements |= {"tolerance": limit, "tables": [t.name for t in known], "layers": []}
    fits: list[Fit | None] = []
    for layer in range(len(kv_layers(singles.cache(0)))):
        fits.append(_fit_layer(singles, layer, known, offsets, found))
    bad = [i for i, row in enumerate(found.measurements["layers"]) if row["residual"] > room(limit, first.dtype, i)]
    if bad:
        found.problems.append(_unexplained(singles, turned, bad, fits[bad[0]], offsets[-1], limit))
    elif not any(fits):
        found.problems.append(f"no layer's {turned} move with position_ids; expected RoPE (ALiBi and learned positions are not handled)")
    return fits


def _fit_layer(singles: Singles, layer: int, known: list[Table], offsets: list[int], found: Inspection) -> Fit | None:
    turned = found.measurements["turned"]

    def keys_at(position: int) -> torch.Tensor:
        return singles.pair(layer, position)[KINDS.index(turned)]

    dtype = keys_at(0).dtype
    move = max(moved(keys_at(0), keys_at(d)) for d in offsets)
    row: dict[str, Any] = {"layer": layer, "keys_move": move, "rotated": None, "residual": 0.0}
    found.measurements["layers"].append(row)
    if move <= still(dtype):
        return None
    limit = room(tolerance(dtype, offsets[-1]), dtype, layer)
    fit = fit_rotation(keys_at, known, offsets, dtype, limit)
    if fit is None:
        row |= {"rotated": turned, "residual": move}
        return None
    if fit.table is None and fit.residual <= limit:
        # the next layers probably share it, and a table fitted twice would differ in the last bits
        known.append(Table("fitted", torch.from_numpy(fit.record.frequencies().copy())))
    record = fit.record
    row |= {"rotated": turned, "start": record.start, "dim": record.dim, "layout": record.layout}
    row |= {"table": fit.table or "fitted", "residual": fit.residual}
    return fit


def _unexplained(singles: Singles, turned: str, bad: list[int], fit: Fit | None, far: int, limit: float) -> str:
    layer = bad[0]
    best = fit.describe() if fit is not None else "none could be tried"
    near, away = (singles.pair(layer, position)[KINDS.index(turned)].float().norm() for position in (0, far))
    return (
        f"{listed(bad)}: {turned} move with position and no rotation explains it. Best for layer {layer}: {best}, expected "
        f"at most {limit:.2g}; the {turned}' norm at position {far} is {float(away / near):.4g} times that at 0, expected 1"
    )


def _layout(model: nn.Module, singles: Singles, fits: list[Fit | None], far: int, found: Inspection) -> Layout | None:
    """Group layers by rotation, prove that their keys can be seen before it, and put the layout together."""
    (heads, width), (_, v_width) = found.measurements["keys"], found.measurements["values"]
    turned, config = found.measurements["turned"], text_config(model)
    named = [None if f is None else msgspec.structs.replace(f.record, kind=_kind(model, f, i)) for i, f in enumerate(fits)]
    records = list(dict.fromkeys(r for r in named if r is not None))
    rope_of = tuple(None if r is None else records.index(r) for r in named)
    sources = {rope_of[i]: f.table for i, f in enumerate(fits) if f is not None}
    samples = [s for start in (0, max(0, far + 1 - PROBE_TOKENS)) for s in watch(model, probe_ids(model), start, KINDS.index(turned))]
    proofs = [prove(record, [s for s in samples if rope_of[s.layer] == i], nearby_floats(model, sources[i])) for i, record in enumerate(records)]
    hooked = all(proof is not None for proof in proofs)
    loose = [i for i, row in enumerate(found.measurements["layers"]) if row["residual"] > found.measurements["tolerance"]]
    if loose and not hooked:  # then rounding alone was to explain the residual, and there is no proof that it does
        found.problems.append(_unexplained(singles, found.measurements["turned"], loose, fits[loose[0]], far, found.measurements["tolerance"]))
        return None
    ropes = [p.record for p in proofs if p] if hooked else [_unproved(model, r, sources[i]) for i, r in enumerate(records)]
    found.measurements["capture"] = "hooked" if hooked else "unrotated"
    found.measurements["ropes"] = [_row(r, p if hooked else None) for r, p in zip(ropes, proofs, strict=True)]
    return Layout(
        layers=len(fits), kv_heads=heads, head_dim=(width + v_width) // 2, dtype=found.measurements["dtype"],
        capture="hooked" if hooked else "unrotated", rope_of=rope_of, ropes=tuple(ropes),
        latent=(width, v_width) if is_latent(found) else None, rotated=turned, rope_regime=rope_regime(config), rope_limit=rope_limit(config),
    )  # fmt: skip


def _unproved(model: nn.Module, record: RopeRecord, table: str | None) -> RopeRecord:
    """Where keys are computed back from the cache, scaling cannot be measured: it is read beside the table, else 1."""
    owner, _, name = (table or "").rpartition(".")
    scaling = getattr(model.get_submodule(owner), name.replace("inv_freq", "attention_scaling"), 1.0) if table else 1.0
    return msgspec.structs.replace(record, scaling=scaling if isinstance(scaling, float) else 1.0, arithmetic="float32")


def _row(record: RopeRecord, proof: Proof | None) -> dict[str, Any]:
    row = {"kind": record.kind, "start": record.start, "dim": record.dim, "layout": record.layout}
    row |= {"scaling": record.scaling, "arithmetic": record.arithmetic}
    return row | {"exact": bool(proof and proof.exact), "residual": proof.residual if proof else None}


def _kind(model: nn.Module, fit: Fit, layer: int) -> str:
    """The rope type that the config gives for this layer, `fitted` where no table of the model was found."""
    if fit.table in (None, "fitted"):
        return "fitted"
    config = text_config(model)
    kinds = rope_kinds(config)
    layer_types = getattr(config, "layer_types", None) or [""]
    return kinds.get("") or kinds.get(layer_types[layer % len(layer_types)]) or "unnamed"


def still(dtype: torch.dtype) -> float:
    """Relative change below which a tensor counts as not moving; a token alone shows none on most hardware."""
    return max(torch.finfo(dtype).eps, 1e-6)


def room(limit: float, dtype: torch.dtype, layer: int) -> float:
    """`limit`, wider in later layers of half precision: attention to a sink beside the token itself gives scores whose rounding differs by position.

    What a position really changes is far larger, and that the keys seen before RoPE become the cached ones is held to `limit` in every layer.
    """
    return limit if layer == 0 or dtype == torch.float32 else DEEPER * limit
