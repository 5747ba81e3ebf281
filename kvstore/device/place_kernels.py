"""Values [tokens, group] into a cache: rounded, rotated and transposed in one pass, operation for operation as `kvstore.placing`.

To be launched without fused multiply-add (`enable_fp_fusion=False`): models round products and sums by themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

BFLOAT16: tl.constexpr = tl.constexpr(0)
FLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT32: tl.constexpr = tl.constexpr(2)


@triton.jit
def _bits(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of a float32 rounded to a type, to nearest even, as an integer of its size."""
    if KIND == BFLOAT16:
        u = x.to(tl.uint32, bitcast=True)
        out = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
    elif KIND == FLOAT16:
        out = x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        out = x.to(tl.int32, bitcast=True)
    return out


@triton.jit
def _wide(bits, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 that bits stand for."""
    if KIND == BFLOAT16:
        out = (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == FLOAT16:
        out = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        out = bits.to(tl.float32, bitcast=True)
    return out


@triton.jit
def _rounded(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    return _wide(_bits(x, KIND), KIND)


@triton.jit
def _values(sums, mean, factor, rows, columns, wanted):  # type: ignore[no-untyped-def]
    """float32 [rows, columns]: sums times what a step is worth, plus the mean. Wanted rows and columns only."""
    found = tl.load(sums + rows[:, None] + columns[None, :], mask=wanted, other=0.0)
    return found * factor + tl.load(mean + columns[None, :], mask=wanted, other=0.0)


@triton.jit(do_not_specialize=["names_at", "count", "units", "factor", "first_plane", "start", "half"],
            do_not_specialize_on_alignment=["names", "keys", "values", "cos", "sin"])  # fmt: skip
def place(  # type: ignore[no-untyped-def]
    sums, mean, names, targets, keys, values, cos, sin, names_at, count, units, factor, first_plane, heads, width, size, start, half,
    key_layer, key_head, key_row, value_layer, value_head, value_row,
    KIND: tl.constexpr, PRODUCT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`count` rows of `sums` float32 [count, size] into layers that share a rope.

    `names[names_at + row]`: unit << 12 | token, or -1; `targets` int32 [4, units]: row and position of a unit's token 0, first and end of its wanted
    tokens. `keys`, `values`: of the first of these layers, whose K is plane `first_plane` of a row, as integers of KIND's size; strides in elements.
    `cos`, `sin` [positions, half], bits of type PRODUCT, turn `2 * half` channels from `start` on.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, plane = tl.program_id(1) % heads, tl.program_id(1) // heads
    name = tl.load(names + names_at + row, mask=row < count, other=-1)
    unit, token = name >> 12, name & 0xFFF
    named = name >= 0
    wanted = named & (token >= tl.load(targets + 2 * units + unit, mask=named, other=0))
    wanted = wanted & (token < tl.load(targets + 3 * units + unit, mask=named, other=0))
    into = (tl.load(targets + unit, mask=wanted, other=0) + token).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    within = wanted[:, None] & (channel < width)[None, :]
    base = ((first_plane + plane) * heads + head) * width
    rows = row.to(tl.int64) * size
    x = _values(sums, mean, factor, rows, base + channel, within)
    layer = (plane // 2).to(tl.int64)
    if plane % 2 == 1:
        out = values + layer * value_layer + head * value_head + into[:, None] * value_row + channel[None, :]
        tl.store(out, _bits(x, KIND), mask=within)
    else:
        out = keys + layer * key_layer + head * key_head + into[:, None] * key_row + channel[None, :]
        if half == 0:
            tl.store(out, _bits(x, KIND), mask=within)
        else:
            c = channel - start
            turned = (c >= 0) & (c < 2 * half)
            if INTERLEAVED:
                first, pair, partner = c % 2 == 0, c // 2, start + (c ^ 1)
            else:
                first, pair, partner = c < half, tl.where(c < half, c, c - half), start + tl.where(c < half, c + half, c - half)
            both = wanted[:, None] & turned[None, :]
            other = _rounded(_values(sums, mean, factor, rows, base + partner, both), KIND)
            position = (tl.load(targets + units + unit, mask=wanted, other=0) + token).to(tl.int64)
            angle = position[:, None] * half + pair[None, :]
            a = _rounded(x, KIND) * _wide(tl.load(cos + angle, mask=both, other=0), PRODUCT)
            b = other * _wide(tl.load(sin + angle, mask=both, other=0), PRODUCT)
            a, b = _rounded(a, PRODUCT), _rounded(b, PRODUCT)
            y = _rounded(tl.where(first[None, :], a - b, a + b), PRODUCT)
            tl.store(out, _bits(tl.where(turned[None, :], y, x), KIND), mask=within)
