"""Records of the three codecs, decoded as `schemas/README.md` (section 6) says and with nothing but the standard library. See `plain_reader`."""

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


DECODERS: dict[str, Callable[[list[bytes], Any, str], list[Any]]] = {"raw": raw, "scalar": scalar, "lossless": lossless}
