"""The entropy decoder in Triton: `codecs.ans_kernels` and `codecs.ternary_kernels` with one stream a lane, and what they write dequantized.

A program takes as many streams of one part (see `plan`): streams of equally many symbols, coefficient by coefficient, each coefficient with one
table. Nothing is read but the words of a lane's own stream, whatever they hold; a stream that does not end in state 0 with no word left sets the
flag of its unit. Nothing is specialised for the numbers passed: every load would compile anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

AHEAD: tl.constexpr = tl.constexpr(4)  # tokens by which the levels to refine are fetched ahead: a load from L2 takes as long as three or four symbols
SHORT: tl.constexpr = tl.constexpr(1 << 32)


@triton.jit
def _word(words, at, wanted, other):  # type: ignore[no-untyped-def]
    """uint64: the word at `at` where it is wanted, which is never outside the stream."""
    return tl.load(words + at, mask=wanted, other=other).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _start(words, begin, end):  # type: ignore[no-untyped-def]
    """State, place and next word of a stream that is read from its end: its first two words are the state."""
    at = end
    x = tl.zeros_like(at).to(tl.uint64)
    for _ in tl.static_range(2):
        some = at > begin
        x = tl.where(some, (x << 32) | _word(words, at, some, 0), x)
        at -= some.to(tl.int32)
    return x, at, tl.load(words + at, mask=at > begin, other=0)


@triton.jit
def _refill(words, x, y, at, begin, following, live):  # type: ignore[no-untyped-def]
    """After a symbol that takes state x to y: state, place and the word that comes next, fetched before it is needed."""
    wanted = live & (y < SHORT) & (at > begin)
    word = following.to(tl.uint32, bitcast=True).to(tl.uint64)
    x = tl.where(live, tl.where(wanted, (y << 32) | word, y), x)
    at -= wanted.to(tl.int32)
    following = tl.load(words + at, mask=wanted & (at > begin), other=following)
    return x, at, following


@triton.jit
def _put(levels, coefficients, at, level, one, live, LAST: tl.constexpr, KEEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Levels of a tier that is refined stay integers; those of the last one are dequantized, in steps, and stay as well where they are wanted."""
    if KEEP or not LAST:
        tl.store(levels + at, level.to(tl.int16), mask=live)
    if LAST:
        value = level.to(tl.float32)
        value = tl.where(level == 1, one, tl.where(level == -1, -one, value))
        tl.store(coefficients + at, value.to(coefficients.dtype.element_ty), mask=live)


@triton.jit
def _value(x, table):  # type: ignore[no-untyped-def]
    """Symbol and state after it: an entry is distance << 20 | weight << 8 | symbol."""
    quantile = ((x >> 12) & 0xFFF).to(tl.int32)
    entry = tl.load(table + quantile).to(tl.uint32, bitcast=True)
    high = (x >> 24) * ((entry >> 8) & 0xFFF).to(tl.uint64) + (entry >> 20).to(tl.uint64)
    return (entry & 0xFF).to(tl.int8).to(tl.int32), (high << 12) | (x & 0xFFF)


@triton.jit
def _third(x, base, zero, others):  # type: ignore[no-untyped-def]
    """Refinement of `base` and state after it: two limits, the first quantiles of symbols 1 and 2, for cell zero and for the others."""
    limits = tl.where(base == 0, zero, others)
    quantile = ((x >> 12) & 0xFFF).to(tl.int32)
    lower, upper = limits & 0xFFFF, limits >> 16
    first = tl.where(quantile >= upper, upper, tl.where(quantile >= lower, lower, 0))
    weight = tl.where(quantile >= upper, 4096 - upper, tl.where(quantile >= lower, upper - lower, lower))
    symbol = (quantile >= lower).to(tl.int32) + (quantile >= upper).to(tl.int32) - 1
    high = (x >> 24) * weight.to(tl.uint64) + (quantile - first).to(tl.uint64)
    return tl.where(base < 0, -symbol, symbol), (high << 12) | (x & 0xFFF)


@triton.jit(do_not_specialize=["programs_at", "parts_at", "classes_last", "one"], do_not_specialize_on_alignment=["words", "table"])
def decode_streams(  # type: ignore[no-untyped-def]
    words, table, classes, values, thirds, levels, coefficients, flags, programs_at, parts_at, classes_last, one,
    LAST: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One tier of a plan.

    `words`, `table` int32; `classes` int32 [rank]: scale classes at the finest tier; `values` int32 [classes, 4096] and `thirds` int32 [classes, 8]:
    `Tables.decode` and `Tables.thirds`; `levels` int16 and `coefficients` float16 or float32 [elements], which may be the same memory where
    levels are not kept; `flags` int32 [units]. `one`: what level 1 is worth, in steps. LAST: no tier follows. KEEP: levels are wanted in the end.
    """
    program = tl.program_id(0)
    part = table + parts_at + tl.load(table + programs_at + program) * PART
    jobs, lanes, per, count = tl.load(part + 1), tl.load(part + 2), tl.load(part + 3), tl.load(part + 4)
    run, coefficient, shift = tl.load(part + 5), tl.load(part + 6), tl.load(part + 7)
    lane = (program - tl.load(part)) * LANES + tl.arange(0, LANES)
    valid = lane < lanes
    stream, job = lane // jobs, lane % jobs
    ends = table + tl.load(part + 8) + lane
    begin, end = tl.load(ends, mask=valid, other=0), tl.load(ends + jobs, mask=valid, other=0)
    runs = tl.where(valid, tl.minimum(per, count - stream * per), 0)
    columns = tl.load(part + 11)
    out = tl.load(part + 10) + stream * per * columns + job  # below 2**31, as the plan checks
    x, at, following = _start(words, begin, end)
    refines = tl.load(part + 12)
    for r in range(tl.max(runs, axis=0)):
        live = r < runs
        scale = tl.load(classes + coefficient + stream * per + r, mask=live, other=0) - shift
        scale = tl.minimum(tl.maximum(scale, 0), classes_last)
        row = out + r * columns
        if refines == 0:
            model = values + scale * 4096
            for i in range(run):
                level, y = _value(x, model)
                x, at, following = _refill(words, x, y, at, begin, following, live)
                _put(levels, coefficients, row + i * jobs, level, one, live, LAST, KEEP)
        else:
            zero, others = tl.load(thirds + scale * 8), tl.load(thirds + scale * 8 + 4)
            b0 = tl.load(levels + row, mask=live, other=0)
            b1 = tl.load(levels + row + jobs, mask=live & (run > 1), other=0)
            b2 = tl.load(levels + row + 2 * jobs, mask=live & (run > 2), other=0)
            b3 = tl.load(levels + row + 3 * jobs, mask=live & (run > 3), other=0)
            for i in range(run):
                base = b0.to(tl.int32)
                b0, b1, b2 = b1, b2, b3
                b3 = tl.load(levels + row + (i + AHEAD) * jobs, mask=live & (i + AHEAD < run), other=0)
                third, y = _third(x, base, zero, others)
                x, at, following = _refill(words, x, y, at, begin, following, live)
                _put(levels, coefficients, row + i * jobs, 3 * base + third, one, live, LAST, KEEP)
    unit = tl.load(table + tl.load(part + 9) + job, mask=valid, other=0)
    tl.store(flags + unit, 1, mask=valid & ((x != 0) | (at != begin)))


@triton.jit(do_not_specialize=["escapes_at", "count", "limit"], do_not_specialize_on_alignment=["table"])
def correct(  # type: ignore[no-untyped-def]
    table, levels, coefficients, flags, escapes_at, count, limit, LAST: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Escaped levels of the tier just decoded: magnitudes grow, signs stay; one beyond `limit` sets the flag of its unit."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = lane < count
    escape = table + escapes_at + lane
    at, excess = tl.load(escape, mask=valid, other=0), tl.load(escape + count, mask=valid, other=0)
    if LAST:
        value = tl.load(coefficients + at, mask=valid, other=0).to(tl.float32)
        coded = tl.where(value < 0, -tl.ceil(-value), tl.ceil(value)).to(tl.int32)  # one step may be worth less than one
    else:
        coded = tl.load(levels + at, mask=valid, other=0).to(tl.int32)
    true = tl.where(coded > 0, coded + excess, tl.where(coded < 0, coded - excess, 0))
    fits = tl.abs(true) <= limit
    _put(levels, coefficients, at, true, 1.0, valid & fits & (coded != 0), LAST, KEEP)
    unit = tl.load(table + escapes_at + 2 * count + lane, mask=valid, other=0)
    tl.store(flags + unit, 1, mask=valid & ~fits)
