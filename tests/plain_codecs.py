"""Records of the codecs, decoded as `schemas/README.md` (section 6) says and with nothing but the standard library. See `plain_reader`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

TABLES = json.loads((Path(__file__).parents[1] / "schemas" / "scalar-tables.json").read_text(encoding="utf-8"))


@dataclass
class Header:
    """Section 6."""

    tokens: int
    layers: int
    level: int
    channels: int


def header(record: bytes) -> Header:
    tokens, packed, channels = struct.unpack_from("<III", record)
    assert len(record) % 4 == 0
    return Header(tokens, packed & 0xFFFF, packed >> 16, channels)


def raw(unit: list[bytes], params: Any, dtype: str) -> list[int]:
    h, size = header(unit[0]), 4 if dtype == "float32" else 2
    count = h.layers * 2 * h.tokens * h.channels
    return list(struct.unpack_from(f"<{count}{'I' if size == 4 else 'H'}", unit[0], 12))


class Words:
    """Takes a record apart from front to back."""

    def __init__(self, record: bytes, at: int = 12):
        self.record, self.at = record, at

    def take(self, layout: str) -> tuple[Any, ...]:
        """Numbers, and the padding to whole words after them."""
        size = struct.calcsize(layout)
        found = struct.unpack_from(layout, self.record, self.at)
        self.at += size + -size % 4
        return found

    def finish(self) -> None:
        assert self.at == len(self.record)


Model = list[tuple[int, int]]  # (symbol, 12-bit weight) in the order of the model


def ans_decode(words: list[int], models: list[Model], run: int, count: int) -> list[int]:
    """Section 6.2: one stream of `count` symbols, `run` symbols a model."""
    x, left, out = 0, list(words), []
    while left and x < 1 << 32:
        x = x << 32 | left.pop()
    for i in range(count):
        quantile, first, model = x >> 12 & 0xFFF, 0, iter(models[i // run])
        symbol, weight = next(model)
        while quantile >= first + weight:
            first += weight
            symbol, weight = next(model)
        out.append(symbol)
        x = ((x >> 24) * weight + quantile - first) << 12 | x & 0xFFF
        if x < 1 << 32 and left:
            x = x << 32 | left.pop()
    assert x == 0
    assert not left
    return out


def cut(symbols: int, run: int) -> tuple[int, int]:
    """Runs a stream, and streams."""
    runs = -(-symbols // run)
    streams = -(-runs // max(1, 4096 // run))
    per = -(-runs // max(1, streams))
    return per, -(-symbols // (run * per))


@dataclass
class Symbols:
    """A row of coded symbols: its streams' words, and how it is cut."""

    count: int
    run: int
    words: list[list[int]]

    def decode(self, models: list[Model]) -> list[int]:
        """By one model a run."""
        per, size, out = cut(self.count, self.run)[0], self.run * cut(self.count, self.run)[0], []
        for s, words in enumerate(self.words):
            out += ans_decode(words, models[s * per :], self.run, min(size, self.count - s * size))
        return out


def read_symbols(words: Words, rows: list[tuple[int, int]]) -> list[Symbols]:
    """Rows of (count, run): the lengths of all streams, then their words."""
    counts = [cut(count, run)[1] for count, run in rows]
    lengths = iter(words.take(f"<{sum(counts)}H"))
    return [Symbols(count, run, [list(words.take(f"<{next(lengths)}I")) for _ in range(n)]) for (count, run), n in zip(rows, counts, strict=True)]


def base_model(scale_class: int) -> Model:
    half = TABLES["base"][scale_class]
    return [(v, half[abs(v)]) for v in range(1 - len(half), len(half))]


def third_model(scale_class: int, base: int) -> Model:
    outer, inner, middle = TABLES["thirds"][scale_class]
    if base == 0:
        return [(-1, outer), (0, 4096 - 2 * outer), (1, outer)]
    away = 1 if base > 0 else -1
    return [(-away, inner), (0, middle), (away, 4096 - inner - middle)]


def rounded(value: float) -> float:
    """To float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def scalar(unit: list[bytes], params: Any, dtype: str) -> list[float]:
    """Section 6.4."""
    h, first = header(unit[0]), Words(unit[0])
    by_channel = [kind == 0 and h.tokens >= 8 for _ in range(h.layers) for kind in (0, 1)]
    size = h.tokens * h.channels
    runs = [h.tokens if flag else params["value_group"] for flag in by_channel]
    heads = [first.take("<fBBBBiI") for _ in runs]
    rows = [[(-(-size // run), 4096), *([(h.channels, 4096)] if flag else []), (size, run)] for run, flag in zip(runs, by_channel, strict=True)]
    streams = iter(read_symbols(first, [row for plane in rows for row in plane]))
    planes = [[next(streams) for _ in plane] for plane in rows]
    escapes = first.record[first.at :]
    fine = read_symbols(second := Words(unit[1]), [plane[-1] for plane in rows]) if len(unit) > 1 else None
    out: list[float] = []
    for i, (head, plane) in enumerate(zip(heads, planes, strict=True)):
        kinds = ["BHI"[head[4] & 15], "BHI"[head[4] >> 4]]
        lists = [struct.unpack_from(f"<{head[6]}{k}", escapes, struct.calcsize(f"<{head[6]}{kinds[0]}") * n) for n, k in enumerate(kinds)]
        escapes = escapes[struct.calcsize(f"<{head[6]}{kinds[0]}") + struct.calcsize(f"<{head[6]}{kinds[1]}") :]
        out += scalar_plane(head, plane, by_channel[i], fine[i] if fine else None, lists, h)
    assert len(escapes) < 4
    assert fine is None or second.at == len(second.record)
    return out


def scalar_plane(head: Any, plane: list[Symbols], by_channel: bool, fine: Symbols | None, escapes: list[Any], h: Header) -> list[float]:
    """[tokens, channels]."""
    step, class_centre, class_table, offset_table, _, offset_centre, _ = head
    excess = dict(zip(accumulate(escapes[0], lambda at, gap: at + gap + 1, initial=-1), (0, *escapes[1]), strict=True))
    sizes = [row.count for row in plane]
    classes = [v + class_centre for v in corrected(plane[0].decode([base_model(class_table)]), 0, excess)]
    coded = plane[-1].decode([base_model(c) for c in classes])
    base = corrected(coded, sum(sizes[:-1]), excess)
    thirds = refined(fine, classes, coded) if fine else [0] * len(base)
    offsets = [0] * h.channels
    if by_channel:
        offsets = [v + offset_centre for v in corrected(plane[1].decode([base_model(offset_table)]), sizes[0], excess)]
    order = [c * h.tokens + t if by_channel else t * h.channels + c for t in range(h.tokens) for c in range(h.channels)]
    return [rounded(rounded(3 * (base[i] + offsets[n % h.channels]) + thirds[i]) * step) for n, i in enumerate(order)]


def corrected(row: list[int], first: int, excess: dict[int, int]) -> list[int]:
    """The symbols of a row whose first one is number `first` of its plane, after the escapes."""
    return [v + (excess[first + i] + 1) * (1 if v > 0 else -1) if first + i in excess else v for i, v in enumerate(row)]


def refined(fine: Symbols, classes: list[int], base: list[int]) -> list[int]:
    """Each third by the model of its class and its base value."""
    per, out = cut(fine.count, fine.run)[0], []
    for s, words in enumerate(fine.words):
        first, last = s * per * fine.run, min((s + 1) * per * fine.run, fine.count)
        models = [third_model(classes[i // fine.run], base[i]) for i in range(first, last)]
        out += ans_decode(words, models, 1, last - first)
    return out


def lossless(unit: list[bytes], params: Any, dtype: str) -> list[int]:
    """Section 6.3."""
    h, words, width = header(unit[0]), Words(unit[0]), 4 if dtype == "float32" else 2
    out = [v for _ in range(2 * h.layers) for v in lossless_plane(words, h, width)]
    words.finish()
    return out


def lossless_plane(words: Words, h: Header, width: int) -> list[int]:
    mode, last, lowest, mask = words.take("<4B")
    size, low = h.tokens * h.channels, 8 * width - 9
    offsets = [0] * h.channels
    if mode & 2:
        packed = words.take(f"<{h.channels if mode & 4 else -(-h.channels // 2)}B")
        offsets = [(packed[c] if mode & 4 else packed[c // 2] >> 4 * (c % 2) & 15) + lowest for c in range(h.channels)]
    if mode & 1:
        alphabet, weights = words.take(f"<{last + 1}B"), words.take(f"<{last + 1}H")
        model = list(zip(alphabet, weights, strict=True))
        (row,) = read_symbols(words, [(size, 4096)])
        symbols = row.decode([model] * -(-size // 4096))
    else:
        symbols = list(words.take(f"<{size}B"))
    rests = [words.take(f"<{1 if mask >> b & 1 else size}B") for b in range(width - 1)]
    out = []
    for i, symbol in enumerate(symbols):
        rest = sum((r[0] if len(r) == 1 else r[i]) << 8 * b for b, r in enumerate(rests))
        out.append(rest >> low << low + 8 | (symbol + offsets[i % h.channels]) % 256 << low | rest & (1 << low) - 1)
    return out


def arithmetic_decode(data: bytes, table: list[int], count: int) -> list[int]:
    """Section 6.6: one stream of `count` symbols."""
    bits = iter([b >> 7 - k & 1 for b in data for k in range(8)])
    low, high, value, used, out = 0, 2**32 - 1, 0, 0, []
    for _ in range(32):
        value = 2 * value + next(bits, 0)
    bounds = [*table[:-1], 65536]
    for _ in range(count):
        span = high - low + 1
        frequency = ((value - low + 1) * 65536 - 1) // span
        out.append(max(s for s, first in enumerate(bounds[:-1]) if first <= frequency))
        high, low = low - 1 + (span * bounds[out[-1] + 1] >> 16), low + (span * bounds[out[-1]] >> 16)
        while high < 2**31 or low >= 2**31 or (low >= 2**30 and high < 3 * 2**30):
            away = 0 if high < 2**31 else 2**31 if low >= 2**31 else 2**30
            low, high, value, used = 2 * (low - away), 2 * (high - away) + 1, 2 * (value - away) + next(bits, 0), used + 1
    assert len(data) == (used + 2 + 7) // 8
    return out


def arithmetic_rows(words: Words, rows: int, count: int, width: int, longest: int) -> list[list[int]]:
    """Rows of `count` symbols in streams of at most `longest`."""
    flat = words.take(f"<{rows * (width + 1)}H")
    tables = [list(flat[r * (width + 1) : (r + 1) * (width + 1)]) for r in range(rows)]
    assert all(table[0] == 0 and table == sorted(set(table)) for table in tables)
    parts = [min(longest, count - first) for first in range(0, count, longest)]
    lengths = words.take(f"<{len(parts) * rows}I")
    data, at, out = bytes(words.take(f"<{sum(lengths)}B")), 0, [list[int]() for _ in range(rows)]
    for i, length in enumerate(lengths):
        out[i % rows] += arithmetic_decode(data[at : at + length], tables[i % rows], parts[i // rows])
        at += length
    return out


def to_dtype(value: float, dtype: str) -> float:
    """A float32 rounded to bfloat16, float16 or itself."""
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    bits = bits if dtype == "float32" else bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def cachegen(unit: list[bytes], params: Any, dtype: str) -> list[float]:
    """Section 6.6."""
    h, words = header(unit[0]), Words(unit[0])
    _, width, chunk, kind, deltas = words.take("<HHHBB")
    assert dtype == ["bfloat16", "float16", "float32"][kind]
    levels = words.take(f"<{2 * h.layers}B")
    out: list[list[float]] = [[] for _ in levels]
    for start in range(0, h.tokens, chunk):
        values = cachegen_chunk(words, levels, width, min(chunk, h.tokens - start), h.channels, dtype, deltas)
        for plane, more in zip(out, values, strict=True):
            plane += more
    words.finish()
    return [v for plane in out for v in plane]


def cachegen_chunk(words: Words, levels: Any, width: int, tokens: int, channels: int, dtype: str, deltas: int) -> list[list[float]]:
    """Per plane [tokens, channels]."""
    raw = words.take(f"<{len(levels) * tokens}{'Hef'[['bfloat16', 'float16', 'float32'].index(dtype)]}")
    scales = [struct.unpack("<f", struct.pack("<I", m << 16))[0] if dtype == "bfloat16" else m for m in raw]
    other = [t for t in range(tokens) if not deltas or t % 10]
    heads = -(-tokens // 10)
    anchors = arithmetic_rows(words, len(levels), heads * channels, 256, heads * channels) if deltas else []
    rows = arithmetic_rows(words, len(levels) * channels, len(other), width, 256) if other else []
    out = []
    for p, top in enumerate(levels):
        value = [0.0] * (tokens * channels)
        for i in range(heads * channels if deltas else 0):
            at = i // channels * 10
            value[at * channels + i % channels] = to_dtype(scaled(anchors[p][i], 127, scales[p * tokens + at]), dtype)
        for n, t in enumerate(other):
            for c in range(channels):
                v = scaled(rows[p * channels + c][n], top, scales[p * tokens + t])
                if deltas:
                    v = rounded(value[t // 10 * 10 * channels + c] + v)
                    v = max(-65504.0, min(65504.0, v)) if dtype == "float16" else v
                value[t * channels + c] = to_dtype(v, dtype)
        out.append(value)
    return out


def scaled(symbol: int, level: int, scale: float) -> float:
    assert 0 <= symbol <= 2 * level
    return rounded(rounded((symbol - level) / level) * scale)


DECODERS: dict[str, Callable[[list[bytes], Any, str], list[Any]]] = {"raw": raw, "scalar": scalar, "lossless": lossless, "cachegen": cachegen}
