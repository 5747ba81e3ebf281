"""Records of the codec `transform`, decoded as `schemas/README.md` (section 6.5) says and with nothing but the standard library."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from tests.plain_codecs import Model, Symbols, Words, ans_decode, cut, header, read_symbols, rounded

STEP_CLASSES = (0, -1, -2, -3, 1, 2, 3)
RAW = "raw"


@dataclass
class Calibrated:
    """What of a calibration section 6.5 needs, for one group. `rows` [rank, D] are the synthesis rows; only `values` wants them and the mean."""

    classes: list[int]
    weights: list[list[int]]
    thirds: list[list[int]]
    tiers: int
    least: int
    step: float
    shrink: list[float]
    mean: list[float]
    rows: list[list[float]]

    def at(self, level: int, step_class: int) -> list[int]:
        """Scale classes of the coefficients coded at a tier."""
        shifted = [c - 8 * (self.tiers - 1 - level) - 8 * step_class for c in self.classes]
        return [c for c in shifted if c >= self.least]


@dataclass
class Unit:
    """`levels[t]` of token t: one number a coefficient coded, of the finest tier read; or the raw patterns [layers, 2, channels]."""

    group: int
    classes: list[Any]
    levels: list[list[int]]


def value_model(c: Calibrated, scale_class: int) -> Model:
    half = [w for w in c.weights[min(scale_class, 48)] if w]
    return [(v, half[abs(v)]) for v in range(1 - len(half), len(half))]


def third_model(c: Calibrated, scale_class: int, base: int) -> Model:
    outer, inner, middle = c.thirds[min(scale_class, 48)]
    if base == 0:
        return [(-1, outer), (0, 4096 - 2 * outer), (1, outer)]
    away = 1 if base > 0 else -1
    return [(-away, inner), (0, middle), (away, 4096 - inner - middle)]


def token_sets(words: Words, mask: int, packed: bool, tokens: int) -> list[Any]:
    """The step class, or RAW, of each token."""
    names = [name for bit, name in enumerate((*STEP_CLASSES, RAW)) if mask >> bit & 1]
    if len(names) == 1:
        return names * tokens
    if not packed:
        (count,) = words.take("<I")
        return [names[run >> 12] for run in words.take(f"<{count}H") for _ in range((run & 4095) + 1)]
    width = {2: 1, 3: 2, 4: 2}.get(len(names), 4)
    number = int.from_bytes(bytes(words.take(f"<{-(-tokens * width // 8)}B")), "little")
    return [names[number >> width * t & (1 << width) - 1] for t in range(tokens)]


def read(unit: list[bytes], calibrations: list[Calibrated], dtypes: tuple[str, ...] = ("H", "H", "I")) -> Unit:
    """The levels of the finest of the tiers in `unit`."""
    h, patterns = header(unit[0]), tuple[int, ...]()
    for level, record in enumerate(unit):
        words = Words(record)
        group, mask, form, escapes = words.take("<HBBI")
        c = calibrations[group]
        if level == 0:
            classes = token_sets(words, mask, bool(form & 1), h.tokens)
            sets = [(name, [t for t in range(h.tokens) if classes[t] == name]) for name in STEP_CLASSES if name in classes]
            coded: dict[int, list[list[int]]] = {name: [] for name, _ in sets}
            raw = [t for t in range(h.tokens) if classes[t] == RAW]
        counts = [(len(c.at(level - 1, name)) if level else 0, len(c.at(level, name)), len(tokens)) for name, tokens in sets]
        rows = [(n * run, run) for refined, count, run in counts for n in (refined, count - refined) if n]
        streams = iter(read_symbols(words, rows))
        added: list[tuple[int, int, int]] = []
        for (name, _), (refined, count, run) in zip(sets, counts, strict=True):
            if refined:
                refine(coded[name], next(streams), c, c.at(level - 1, name))
            if count > refined:
                symbols = next(streams).decode([value_model(c, k) for k in c.at(level, name)[refined:]])
                coded[name] += [symbols[i * run : (i + 1) * run] for i in range(count - refined)]
                added += [(name, refined + i, t) for i in range(count - refined) for t in range(run)]
        if level == 0:
            patterns = words.take(f"<{h.layers * 2 * len(raw) * h.channels}{dtypes[form >> 1 & 3]}")
        gaps, excesses = "BHI"[form >> 4 & 3], "BHI"[form >> 6]
        numbers = words.take("<" + escapes * gaps + escapes * excesses)
        for at, excess in zip(list(accumulate(numbers[:escapes], lambda at, gap: at + gap + 1, initial=-1))[1:], numbers[escapes:], strict=True):
            name, k, t = added[at]
            coded[name][k][t] += (excess + 1) * (1 if coded[name][k][t] > 0 else -1)
        words.finish()
    levels: list[list[int]] = [[] for _ in range(h.tokens)]
    for name, tokens in sets:
        for i, t in enumerate(tokens):
            levels[t] = [row[i] for row in coded[name]]
    for i, t in enumerate(raw):
        levels[t] = [patterns[(plane * len(raw) + i) * h.channels + ch] for plane in range(2 * h.layers) for ch in range(h.channels)]
    return Unit(group, classes, levels)


def refine(rows: list[list[int]], symbols: Symbols, c: Calibrated, scale_classes: list[int]) -> None:
    """Levels of a tier, in place, to those of the next."""
    flat, per, out = [v for row in rows for v in row], cut(symbols.count, symbols.run)[0], []
    for s, words in enumerate(symbols.words):
        first, last = s * per * symbols.run, min((s + 1) * per * symbols.run, symbols.count)
        out += ans_decode(words, [third_model(c, scale_classes[i // symbols.run], flat[i]) for i in range(first, last)], 1, last - first)
    for k, row in enumerate(rows):
        row[:] = [3 * v + z for v, z in zip(row, out[k * symbols.run :], strict=False)]


def values(unit: list[bytes], calibrations: list[Calibrated], dtype: str) -> list[list[float]]:
    """[tokens, D], in double precision but for the steps."""
    found, last = read(unit, calibrations), len(unit) - 1
    c, out = calibrations[found.group], []
    for name, levels in zip(found.classes, found.levels, strict=True):
        if name == RAW:
            layout = {"bfloat16": ("<I", "<f"), "float16": ("<H", "<e"), "float32": ("<I", "<f")}[dtype]
            shift = 16 if dtype == "bfloat16" else 0
            out.append([float(struct.unpack(layout[1], struct.pack(layout[0], v << shift))[0]) for v in levels])
            continue
        step = rounded(c.step * 3.0 ** (c.tiers - 1 - last + name))
        sizes = [(v - c.shrink[last] * v * (abs(v) == 1)) * step for v in levels]
        out.append([m + sum(s * row[d] for s, row in zip(sizes, c.rows, strict=False) if s) for d, m in enumerate(c.mean)])
    return out
