"""Rotary position embedding from a RopeRecord, in the model's own arithmetic.

A pair (a, b) of channels at position p becomes (a cos - b sin, b cos + a sin), cos and sin of p * inv_freq times the
record's scaling. `model` arithmetic rounds cos and sin to the keys' dtype and multiplies in it; `float32` multiplies in
float32 and rounds once; `rounded` does that with cos and sin rounded before. They repeat the attention layers of transformers
operation for operation, so equal inputs give equal bits on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from kvstore.manifest import RopeRecord


@dataclass(frozen=True)
class Angles:
    """cos and sin, [T, dim / 2], in the dtype of the products. Made once a rope and prompt, shared by its layers."""

    cos: Tensor
    sin: Tensor


def cos_sin(positions: Tensor, record: RopeRecord, dtype: torch.dtype, device: torch.device | str) -> Angles:
    """cos and sin at `positions` (int64 [T]) for keys of `dtype` on `device`, scaling included."""
    inv_freq = torch.from_numpy(record.frequencies().copy()).to(device)
    angle = positions.to(device=device, dtype=torch.float32)[:, None] * inv_freq[None]
    cos, sin = angle.cos(), angle.sin()
    if record.scaling != 1.0:
        cos, sin = cos * record.scaling, sin * record.scaling
    if record.arithmetic != "float32":
        cos, sin = cos.to(dtype), sin.to(dtype)
    product = dtype if record.arithmetic == "model" else torch.float32
    return Angles(cos.to(product), sin.to(product))


def rotate(k: Tensor, positions: Tensor, record: RopeRecord, *, out: Tensor | None = None, angles: Angles | None = None) -> Tensor:
    """Keys before RoPE [..., T, head_dim] to keys as the model caches them at `positions` (int64 [T]).

    `out` (same shape, any strides, any dtype, not overlapping `k`) receives the result without a further copy; `angles`
    spares the cosines where layers share a record. Differentiable where `k` requires a gradient and `out` is not given.
    """
    angles = angles or cos_sin(positions, record, k.dtype, k.device)
    if out is None and k.requires_grad and torch.is_grad_enabled():
        return _rotate_functional(k, angles, record)
    if out is None:
        out = torch.empty_like(k)
    _copy_rest(k, out, record)
    source, target = _slice(k, record), _slice(out, record)
    if angles.cos.dtype == source.dtype == target.dtype:
        _rotate_into(source, angles, record.layout, target)
    else:
        wide = source.to(angles.cos.dtype)
        turned = torch.empty_like(wide)
        _rotate_into(wide, angles, record.layout, turned)
        target.copy_(turned)
    return out


def unrotate(k: Tensor, positions: Tensor, record: RopeRecord) -> Tensor:
    """Keys as cached at `positions` back to keys before RoPE, computed in float32 and returned in the dtype of `k`.

    The inverse of `rotate` up to rounding (0.3 % in bfloat16): the scaling is divided out once.
    """
    inverse = msgspec.structs.replace(record, scaling=1.0 / record.scaling, arithmetic="float32")
    angle = cos_sin(positions, inverse, torch.float32, k.device)
    back = Angles(angle.cos, -angle.sin)
    out = torch.empty_like(k)
    _copy_rest(k, out, record)
    turned = torch.empty_like(source := _slice(k, record).float())
    _rotate_into(source, back, record.layout, turned)
    _slice(out, record).copy_(turned)
    return out


def _slice(k: Tensor, record: RopeRecord) -> Tensor:
    return k[..., record.start : record.start + record.dim]


def _copy_rest(k: Tensor, out: Tensor, record: RopeRecord) -> None:
    """Channels outside the rotated slice pass through."""
    end = record.start + record.dim
    for rest in (slice(0, record.start), slice(end, k.shape[-1])):
        if rest.start < rest.stop:
            out[..., rest].copy_(k[..., rest])


def _pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channel of every pair, [..., T, dim / 2]."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _rotate_into(x: Tensor, angles: Angles, layout: str, out: Tensor) -> None:
    """All of one dtype. Never addcmul: its fused rounding differs from the models' in the last bit."""
    (a, b), (first, second) = _pairs(x, layout), _pairs(out, layout)
    torch.mul(a, angles.cos, out=first)
    first.sub_(b * angles.sin)
    torch.mul(b, angles.cos, out=second)
    second.add_(a * angles.sin)


def _rotate_functional(k: Tensor, angles: Angles, record: RopeRecord) -> Tensor:
    """`rotate` as a graph of out-of-place operations, for gradients at the keys."""
    a, b = (x.to(angles.cos.dtype) for x in _pairs(_slice(k, record), record.layout))
    turned = (a * angles.cos - b * angles.sin, b * angles.cos + a * angles.sin)
    joined = torch.cat(turned, -1) if record.layout == "half" else torch.stack(turned, -1).flatten(-2)
    end = record.start + record.dim
    return torch.cat((k[..., : record.start], joined.to(k.dtype), k[..., end:]), -1)


def residual(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`, in float32; inf where only `want` is zero."""
    difference, scale = float((got.float() - want.float()).norm()), float(want.float().norm())
    return difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))


def tolerance(dtype: torch.dtype, position: int) -> float:
    """The largest residual that rounding explains in keys of `dtype` at positions up to `position`.

    Two units in the last place, 1e-5 at least; a float32 angle near `position` is itself off by up to 2**-24 of it.
    """
    return max(2.0 * torch.finfo(dtype).eps, 1e-5, position * 2.0**-23)
