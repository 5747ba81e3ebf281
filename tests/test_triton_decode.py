"""Decoding on the device against the CPU's decoder: the same symbols, the same verdict on damage, the same bits in a cache.

Where there is no GPU, Triton's interpreter runs the kernels (see conftest): some milliseconds a symbol and program, so streams here are short.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="no triton: units are decoded on the CPU only")

from kvstore.calibration.record import Calibration
from kvstore.codecs import runs, tables, transform_decode, transform_units
from kvstore.codecs.base import Header, words_of
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.transform_ladder import rows_of
from kvstore.codecs.transform_sets import RAW, STEP_CLASSES
from kvstore.device import placement
from kvstore.device import units as parsing
from kvstore.device.codec import Levels, Target, TransformOnDevice, decode_group, unusable
from kvstore.device.plan import EXACT_HALF
from kvstore.errors import InputError, IntegrityError, ResourceError
from kvstore.families.rope import Angles, cos_sin, rotate
from kvstore.manifest import RopeRecord
from tests.contracts.codec import to_bits
from tests.synthetic_calibration import make_calibration, make_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Array = npt.NDArray[Any]
Units = list[list[bytes]]
NO_RAW = np.empty((2, 2, 0, 16), np.uint16)


@pytest.fixture(autouse=True, scope="module")
def short_streams() -> Iterator[None]:
    """Streams of 16 symbols, for the encoder and both decoders: many lanes, few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "STREAM", 16)
        runs.cut.cache_clear()
        yield
    runs.cut.cache_clear()


class Staged(NamedTuple):
    """Records laid end to end as a loader does, each with a word of something behind it."""

    words: npt.NDArray[np.uint32]
    spans: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


def stage(units: Sequence[Sequence[bytes]], tokens: Sequence[int]) -> Staged:
    parts = [np.append(words_of(record), np.uint32(0xFFFFFFFF)) for records in units for record in records]
    sizes = np.array([len(part) for part in parts])
    spans = np.stack([np.cumsum(sizes) - sizes, sizes - 1], axis=1)
    return Staged(np.concatenate(parts), spans.reshape(len(units), -1, 2), np.array(tokens))


def launch(on: TransformOnDevice, staged: Staged, group: int = 0) -> Levels:
    plan = on.plan(staged.words, staged.spans, staged.tokens, group)
    return on.decode(plan, *(torch.from_numpy(a.view(np.int32).copy()).to(DEVICE) for a in (staged.words, plan.table)))


# symbols: units of levels that no quantizer made, random tables


def random_tables(rng: np.random.Generator, calibration: Calibration) -> Calibration:
    """The same with models of any alphabets and weights."""
    weights, thirds = np.zeros((49, 128), np.uint16), np.empty((49, 3), np.uint16)
    for c in range(49):
        largest = int(rng.choice([1, 2, 5, 30, 127]))
        half = 1 + np.sort(rng.dirichlet(np.full(largest, 0.5)) * (1500 - largest)).astype(int)[::-1]
        weights[c, : largest + 1] = [4096 - 2 * half.sum(), *half]
        thirds[c] = [rng.integers(1, 2048), *(rng.integers(1, 2000, 2))]
    return dataclasses.replace(calibration, weights=weights, thirds=thirds)


def random_unit(rng: np.random.Generator, codes: Array, on: TransformOnDevice, spread: float) -> transform_units.Unit:
    """Levels with heavy tails, so that some are escaped and a few are beyond what float16 holds exactly."""
    ladder, sets = on.ladders[0], []
    for code in STEP_CLASSES:
        which = np.flatnonzero(codes == code)
        if len(which):
            drawn = rng.standard_t(1, (ladder.count(ladder.finest, code), len(which))) * spread
            sets.append(transform_units.Set(code, which, np.rint(drawn).clip(-29524, 29524).astype(np.int16)))
    raw = rng.integers(0, 0x7F80, (2, 2, int((codes == RAW).sum()), 16)).astype(np.uint16)
    return transform_units.Unit(0, codes, sets, raw, "bfloat16")


def numba_levels(records: Sequence[bytes], on: TransformOnDevice, tokens: int) -> list[transform_units.Set]:
    calibration = on.calibration
    stored = transform_decode.read(records, calibration, on.ladders, (2, 2, tokens, 16))
    return transform_decode.levels(stored, on.ladders[0], tables.build(calibration.weights, calibration.thirds))


def device_levels(levels: Levels, unit: int) -> dict[int, Array]:
    """Levels [coded, tokens of the set] of a unit by step class, from the coefficients; where float16 is too short, from what is kept besides."""
    plan, found = levels.plan, {}
    for matrix in plan.matrices:
        names = plan.table[plan.rows_at + matrix.row :][: matrix.columns]
        mine = np.flatnonzero((names >= 0) & (names >> 12 == unit))
        mine = mine[np.argsort(names[mine])]
        part = slice(matrix.at, matrix.at + matrix.coefficients * matrix.columns)
        values, exact = (
            None if t is None else t[part].cpu().numpy().reshape(matrix.coefficients, -1)[:, mine] for t in (levels.coefficients, levels.exact)
        )
        integers = np.where(np.abs(values) < 1, np.sign(values), values)  # a single step is worth less than one
        if exact is not None:
            np.testing.assert_array_equal(integers, exact.astype(np.float16))
            assert set(np.nonzero(np.abs(exact) > EXACT_HALF)[0].tolist()) <= set(matrix.wide.tolist())
            integers = exact
        found[matrix.step_class] = integers
    return found


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example(seed=1, tiers=3, spread=40.0, mixed=True)
@given(seed=st.integers(0, 2**32), tiers=st.integers(1, 3), spread=st.sampled_from([0.5, 3.0, 40.0]), mixed=st.booleans())
def test_symbols_are_the_cpus(seed: int, tiers: int, spread: float, mixed: bool) -> None:
    rng = np.random.default_rng(seed)
    on = TransformOnDevice(random_tables(rng, make_calibration(rank=int(rng.integers(4, 14)), tiers=tiers)), DEVICE, "bfloat16")
    common = rng.choice([0, 0, -2, RAW] if mixed else [0], 6).astype(np.int8)
    codes = [common, rng.permutation(common), common, rng.choice([0, 3], 3).astype(np.int8)]
    units = [random_unit(rng, mine, on, spread) for mine in codes]
    built = tables.build(on.calibration.weights, on.calibration.thirds)
    records = [transform_units.encode(Header(len(unit.codes), 2, 0, 16), unit, on.ladders[0], built) for unit in units]
    read = int(rng.integers(1, tiers + 1))
    levels = launch(on, stage([mine[:read] for mine in records], [len(mine) for mine in codes]))
    assert not levels.flags.any()
    for number, unit in enumerate(units):
        found = device_levels(levels, number)
        for wanted in numba_levels(records[number][:read], on, len(unit.codes)):
            np.testing.assert_array_equal(found[wanted.step_class], wanted.levels)


def unit_of(levels: Array, on: TransformOnDevice) -> list[bytes]:
    """Records of ordinary tokens with these levels [coefficients, tokens]."""
    count, calibration = levels.shape[1], on.calibration
    unit = transform_units.Unit(0, np.zeros(count, np.int8), [transform_units.Set(0, np.arange(count), levels)], NO_RAW, "bfloat16")
    return transform_units.encode(Header(count, 2, 0, 16), unit, on.ladders[0], tables.build(calibration.weights, calibration.thirds))


# values


def ours() -> Calibration:
    return make_calibration(rank=14)


def strange_units(codec: TransformCodec) -> tuple[Units, list[int]]:
    """Blocks as an encoder makes them: ordinary tokens, step classes asked for, exempt and raw ones, escapes; alike, unlike, short."""
    units, counts = [], [8, 8, 8, 5]
    for block, tokens in enumerate(counts):
        values = np.ascontiguousarray(make_values(tokens, draw=block)[:2])
        steps = np.zeros(tokens, np.int8)
        if block == 1:
            steps[2], steps[5] = -1, 2
        if block == 2:
            values[:, :, 1] *= 1000
            values[0, :, 1, :2] = 0.0, -0.0
            values[:, :, 4] += (60 * codec.calibration.bases[0].synthesis(1)[0] / codec.calibration.record.step).reshape(2, 2, 16)
        units.append(codec.encode(to_bits(values, "bfloat16"), "bfloat16", 0, steps))
    return units, counts


def cpu_values(codec: TransformCodec, units: Sequence[Sequence[bytes]], counts: Sequence[int]) -> Array:
    out = [np.empty((2, 2, tokens, 16), np.float32) for tokens in counts]
    for records, values in zip(units, out, strict=True):
        codec.decode(records, values)
    return np.concatenate(out, axis=2)


@pytest.mark.parametrize(("tiers", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "float32")])
def test_values_are_the_cpus_but_for_rounding(tiers: int, dtype: str) -> None:
    """All kinds of tokens. Float32 matrices: the last bits; float16 ones: ten bits of the synthesis rows."""
    codec = TransformCodec({}, ours())
    units, counts = strange_units(codec)
    units = [records[:tiers] for records in units]
    wanted, on = cpu_values(codec, units, counts), TransformOnDevice(ours(), DEVICE, dtype)
    found = on.values(launch(on, stage(units, counts))).cpu().numpy()
    spread = np.abs(wanted - codec.calibration.bases[0].mean.reshape(2, 2, 1, 16)).max(axis=(0, 1, 3), keepdims=True)
    assert (np.abs(found - wanted) <= (1e-5 if dtype == "float32" else 1e-3) * spread).all()
    np.testing.assert_array_equal(found[:, :, 17].view(np.uint32), wanted[:, :, 17].view(np.uint32))  # raw: every bit


def test_a_group_in_one_call() -> None:
    codec = TransformCodec({}, ours())
    units = [codec.encode(to_bits(np.ascontiguousarray(make_values(3, draw=i)[:2]), "float32"), "float32") for i in range(2)]
    found = decode_group([records[:1] for records in units], ours(), 0, DEVICE, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 2, 6, 16)
    np.testing.assert_allclose(found.float().cpu().numpy(), cpu_values(codec, [records[:1] for records in units], [3, 3]), rtol=2**-7, atol=2e-2)
    with pytest.raises(InputError, match="numbers of tiers"):
        decode_group([units[0], units[1][:2]], ours(), 0, DEVICE)
    with pytest.raises(IntegrityError):
        decode_group([[units[0][0][:-4]]], ours(), 0, DEVICE)


def test_levels_beyond_float16_are_summed_exactly() -> None:
    """One coefficient of 20,001 steps: float16 alone would be off by one step, far more than the rounding of the rows allows the others."""
    on = TransformOnDevice(ours(), DEVICE, "bfloat16")
    ladder, basis = on.ladders[0], on.calibration.bases[0]
    levels = np.zeros((ladder.count(2, 0), 4), np.int16)
    levels[0] = [20001, -20007, 2049, 3]
    found = launch(on, stage([unit_of(levels, on)], [4]))
    assert found.plan.keeps_levels
    row = (on.load(0).rows[0].double() * on.load(0).unit * float(ladder.step)).cpu().numpy()
    out = on.values(found).cpu().numpy().transpose(2, 0, 1, 3).reshape(4, -1) - basis.mean
    np.testing.assert_allclose(out, levels[0][:, None] * row, rtol=3e-6, atol=1e-4 * np.abs(row).max())
    assert np.abs(2 * row).max() > 1e-2


def test_integers_up_to_2048_are_exact_in_the_matrices_type() -> None:
    numbers = torch.arange(-EXACT_HALF, EXACT_HALF + 1)
    assert torch.equal(numbers.half().long(), numbers)
    assert int(torch.tensor(EXACT_HALF + 1).half()) != EXACT_HALF + 1 and int(torch.tensor(257).bfloat16()) != 257


# damage


def damaged_copies(records: Sequence[bytes], rng: np.random.Generator, count: int) -> Iterator[list[bytes]]:
    """Flipped bits, words of ones or zeros, records cut short or grown, lengths of streams that lie."""
    for _ in range(count):
        tier = int(rng.integers(len(records)))
        words, kind = np.frombuffer(records[tier], np.uint32).copy(), int(rng.integers(6))
        at = int(rng.integers(3, len(words)))
        if kind < 2:
            words[at] ^= np.uint32(1 << int(rng.integers(32)))
        elif kind == 2:
            words[at] = rng.choice([0, 0xFFFFFFFF, int(rng.integers(2**32))])
        elif kind == 3:
            words = np.append(words, words[:1]) if rng.random() < 0.5 else words[:-1]
        elif kind == 4:
            lengths = words[5:].view(np.uint16)
            a, b = rng.integers(0, min(12, len(lengths)), 2)
            lengths[a], lengths[b] = lengths[b] ^ 1, lengths[a]
        else:
            words[5:].view(np.uint16)[int(rng.integers(8))] = 0xFFFF
        yield [words.tobytes() if number == tier else record for number, record in enumerate(records)]


def with_zeros(record: bytes, on: TransformOnDevice, tokens: int, count: int) -> bytes:
    """The first stream replaced by so many words of zero: state 0 at every symbol, and a word read after each."""
    staged = stage([[record]], [tokens])
    heads = parsing.read_heads(*staged, 0, 2, 16)
    (these,) = parsing.alike(staged.words, heads, staged.tokens)
    rows = [rows_of(on.ladders[0], 0, code, tokens) for code, _ in these.sets]
    first, last = parsing.streams(staged.words, heads, these, 0, rows, 64).ends[0, :2] + 1
    words = np.frombuffer(record, np.uint32)
    words = np.concatenate([words[:first], np.zeros(count, np.uint32), words[last:]])
    words[parsing.FIRST :].view(np.uint16)[0] = count
    return words.tobytes()


def good(records: Sequence[bytes], on: TransformOnDevice, tokens: int) -> bool:
    try:
        numba_levels(records, on, tokens)
    except IntegrityError:
        return False
    return True


@pytest.mark.parametrize("block", [0, 2])
def test_the_verdict_on_damage_is_the_cpus(block: int) -> None:
    """What the plan lets pass is decoded in one launch; flags tell the units with streams that do not decode, and no others."""
    on = TransformOnDevice(ours(), DEVICE, "bfloat16", lanes=512)
    units, counts = strange_units(TransformCodec({}, ours()))
    passed, verdicts = [units[block]], [True]
    for copy in damaged_copies(units[block], np.random.default_rng(block), 150):
        verdict = good(copy, on, counts[block])
        if plans(on, copy, counts[block]):
            passed.append(copy)
            verdicts.append(verdict)
        else:
            assert not verdict
    levels = launch(on, stage(passed, [counts[block]] * len(passed)))
    assert (levels.flags.cpu().numpy() == 0).tolist() == verdicts
    assert 10 < sum(not verdict for verdict in verdicts) < len(verdicts) < 140
    with pytest.raises(IntegrityError, match="second"):
        on.check(torch.tensor([0, 1]), ["first", "second"])
    for number in np.flatnonzero(verdicts):  # a decoder may fall into step again: checksums find those
        found = device_levels(levels, number)
        for wanted in numba_levels(passed[number], on, counts[block]):
            np.testing.assert_array_equal(found[wanted.step_class], wanted.levels)


def test_a_stream_with_words_left_is_damage_though_its_state_is_zero() -> None:
    on = TransformOnDevice(ours(), DEVICE, "bfloat16", lanes=512)
    (record, *_), *_ = strange_units(TransformCodec({}, ours()))[0]
    copies = [with_zeros(record, on, 8, count) for count in (17, 18, 19, 40)]
    assert [good([copy], on, 8) for copy in copies] == [True, True, False, False]
    assert (launch(on, stage([[copy] for copy in copies], [8] * 4)).flags == 0).tolist() == [True, True, False, False]


class Watched:
    """Triton's interpreter, noting the first and last byte of every access."""

    def __init__(self, real: Any):
        self.real, self.loads, self.stores = real, list[Array](), list[Array]()

    def load(self, pointers: Array, mask: Array, other: Array, dtype: Any) -> Any:
        self.loads.append(pointers[mask] + np.array([[0], [np.dtype(dtype).itemsize - 1]], np.uint64))
        return self.real.load(pointers, mask, other, dtype)

    def store(self, pointers: Array, values: Array, mask: Array) -> Any:
        self.stores.append(pointers[mask] + np.array([[0], [values.dtype.itemsize - 1]], np.uint64))
        return self.real.store(pointers, values, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def inside(accesses: Sequence[Array], *tensors: torch.Tensor) -> Array:
    """Whether each access lies in one of the tensors."""
    first, last = np.concatenate(accesses, axis=1)
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    return np.any([(first >= start) & (last < end) for start, end in ranges], axis=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="watches the interpreter")
def test_damaged_streams_read_and_write_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the words, only those of streams are read, whatever the records say."""
    from triton.runtime import interpreter

    on = TransformOnDevice(ours(), DEVICE, "bfloat16", lanes=512)
    fine = np.full(8, -3, np.int8)  # long streams: more words than the two that are the state
    whole = TransformCodec({}, ours()).encode(to_bits(np.ascontiguousarray(make_values(8)[:2]), "bfloat16"), "bfloat16", 0, fine)
    passed = [copy for copy in damaged_copies(whole, np.random.default_rng(5), 60) if plans(on, copy, 8)]
    staged = stage(passed, [8] * len(passed))
    plan = on.plan(*staged, 0)
    words, table = (torch.from_numpy(a.view(np.int32).copy()) for a in (staged.words, plan.table))
    watched = Watched(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", watched)
    levels = on.decode(plan, words, table)
    assert levels.flags.any() and not levels.flags.all()
    heads = parsing.read_heads(*staged, 0, 2, 16)
    (these,) = parsing.alike(staged.words, heads, staged.tokens)
    rows = [[rows_of(on.ladders[0], tier, code, 8) for code, _ in these.sets] for tier in range(3)]
    ends = [parsing.streams(staged.words, heads, these, tier, rows[tier], 0).ends for tier in range(3)]
    streams = [words[1 + first : 1 + last] for mine in ends for first, last in mine[:, [0, -1]].tolist()]
    decoded = [levels.coefficients, *([] if levels.exact is None else [levels.exact])]
    assert inside(watched.loads, table, on.load(0).classes, on.symbols, on.thirds, *decoded, *streams).all()
    assert inside(watched.stores, levels.flags, *decoded).all()


def plans(on: TransformOnDevice, records: Sequence[bytes], tokens: int) -> bool:
    try:
        on.plan(*stage([records], [tokens]), 0)
    except IntegrityError:
        return False
    return True


def test_an_escape_out_of_range_is_damage() -> None:
    """The coded level is known only on the device."""
    on = TransformOnDevice(ours(), DEVICE, "bfloat16")
    ladder = on.ladders[0]
    levels = np.zeros((ladder.count(2, 0), 2), np.int16)
    levels[0] = [29524, -29524]
    records = unit_of(levels, on)
    worse = bytearray(records[0])
    excess = np.frombuffer(worse, np.uint16, 2, len(worse) - 4 - 2)  # two gaps of a byte, two excesses of two, then padding
    assert 3000 < int(excess.min()) <= int(excess.max()) < 3280
    excess[1] += 200
    found = launch(on, stage([records, [bytes(worse), *records[1:]]], [2, 2]))
    assert found.flags.tolist() == [0, 1]
    assert not good([bytes(worse), *records[1:]], on, 2)


def test_records_that_do_not_belong_together_are_refused() -> None:
    on = TransformOnDevice(make_calibration(layers=4, rank=6), DEVICE, "bfloat16")
    values = make_values(4, layers=4)
    first, second = (TransformCodec({}, on.calibration).encode(to_bits(values[i : i + 2], "float32"), "float32", i // 2) for i in (0, 2))
    for units, tokens, group in (
        ([second], [4], 0),
        ([[first[0], second[1]]], [4], 0),
        ([[first[1], first[0]]], [4], 0),
        ([first], [5], 0),
        ([first, second], [4, 4], 0),
    ):
        with pytest.raises(IntegrityError):
            on.plan(*stage(units, tokens), group)
    words, spans, tokens = stage([first], [4])
    for bad in (spans + len(words), -spans):
        with pytest.raises(InputError):
            on.plan(words, bad, tokens, 0)


# into caches


ROPES = [
    None,
    RopeRecord(0, 8, "half", "0000803f0000803e0000003e0000003d", 1.0, "model", "default"),
    RopeRecord(2, 4, "interleaved", "0000803f0000803e", 1.25, "float32", "default"),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cache_has_the_bits_that_the_cpus_placing_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two units at rows and positions of their own; three kinds of rope; what lies around is left alone."""
    monkeypatch.setattr(placement, "ROWS", 32)
    on = TransformOnDevice(make_calibration(layers=3, group_layers=3, rank=6), DEVICE, dtype)
    values = make_values(9, layers=3, group_layers=3)
    codec = TransformCodec({}, on.calibration)
    units = [codec.encode(to_bits(np.ascontiguousarray(part), dtype), dtype) for part in (values[:, :, :5], values[:, :, 5:])]
    levels = launch(on, stage(units, [5, 4]))
    kind = getattr(torch, dtype)
    slab = torch.full((3, 2, 1, 2, 20, 8), 7.0, dtype=kind, device=DEVICE)
    caches = [(layer[0], layer[1]) for layer in slab]
    angles = [None if rope is None else cos_sin(torch.arange(64), rope, kind, DEVICE) for rope in ROPES]
    target = Target(np.array([3, 9]), np.array([20, 41]), np.array([1, 0]), np.array([5, 3]))
    on.fill(levels, target, caches, ROPES, angles)
    decoded, wanted = on.values(levels).cpu(), torch.full((3, 2, 1, 2, 20, 8), 7.0, dtype=kind)
    for start, (row, position, first, end) in zip((0, 5), zip(*target, strict=True), strict=True):
        part = decoded[:, :, start + first : start + end].to(kind).view(3, 2, -1, 2, 8).transpose(2, 3)
        places = slice(position + first, position + end)
        for layer, (rope, made) in enumerate(zip(ROPES, angles, strict=True)):
            keys = part[layer, 0]
            if rope is not None and made is not None:
                keys = rotate(keys, torch.arange(places.start, places.stop), rope, angles=Angles(made.cos[places].cpu(), made.sin[places].cpu()))
            wanted[layer, 0, 0, :, row + first : row + end] = keys
            wanted[layer, 1, 0, :, row + first : row + end] = part[layer, 1]
    assert torch.equal(slab.cpu(), wanted)


def test_bfloat16_caches_are_those_of_the_compiled_placing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstore.placing import place

    monkeypatch.setattr(placement, "ROWS", 32)
    rope, rng = ROPES[1], np.random.default_rng(0)
    assert rope is not None
    sums = (3 * rng.standard_normal((12, 2 * 2 * 8))).astype(np.float32)
    cache = torch.zeros((2, 1, 2, 12, 8), dtype=torch.bfloat16, device=DEVICE)
    angles, names = cos_sin(torch.arange(12), rope, torch.bfloat16, DEVICE), torch.arange(12, dtype=torch.int32, device=DEVICE)
    whole = Target(*(np.array([n]) for n in (0, 0, 0, 12)))
    where = placement.Place(whole, np.array([12]), [(cache[0], cache[1])], [rope], [angles], torch.device(DEVICE))
    placement.place_rows(torch.from_numpy(sums).to(DEVICE), torch.zeros(32, device=DEVICE), 1.0, names, where)
    for kind, turned in ((0, True), (1, False)):
        out = np.empty((2, 12, 8), np.uint16)
        cos, sin = ((a.float().cpu().numpy() if turned else np.empty((12, 0), np.float32)) for a in (angles.cos, angles.sin))
        place(np.ascontiguousarray(sums[:, 16 * kind : 16 * kind + 16]), cos, sin, 0, False, False, out)
        np.testing.assert_array_equal(cache[kind, 0].cpu().view(torch.int16).numpy().view(np.uint16), out)


def test_one_launch_places_the_layers_of_a_slab_and_each_tensor_alone_has_its_own() -> None:
    slab = torch.zeros((4, 2, 1, 2, 6, 8))
    together, apart = [(layer[0], layer[1]) for layer in slab], [(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8)) for _ in range(4)]
    none: list[Any] = [None] * 4
    target, tokens = Target(*(np.array([n]) for n in (0, 0, 0, 6))), np.array([6])
    for caches, launches in ((together, [4]), (apart, [1, 1, 1, 1]), ([together[0], together[1], together[3], apart[0]], [2, 1, 1])):
        assert [run.layers for run in placement.Place(target, tokens, caches, none, none, torch.device("cpu")).runs] == launches


@pytest.mark.parametrize("change", [("row", 1), ("row", -1), ("end", 7), ("first", -1), ("position", 59), ("position", -1)])
def test_targets_outside_the_cache_are_refused(change: tuple[str, int]) -> None:
    rope = ROPES[1]
    assert rope is not None
    caches, angles = [(torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 8))], cos_sin(torch.arange(64), rope, torch.float32, "cpu")
    target = Target(*(np.array([n]) for n in (0, 0, 0, 6)))._replace(**{change[0]: np.array([change[1]])})
    with pytest.raises(InputError, match="do not fit"):
        placement.Place(target, np.array([6]), caches, [rope], [angles], torch.device("cpu"))


# where it runs


def test_says_why_a_device_is_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unusable(DEVICE) is None
    assert "meta" in str(unusable("meta"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET" in str(unusable("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="triton is not installed"):
        TransformOnDevice(ours(), "cpu", "bfloat16")


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_here() -> None:
    """To machine code of sm_90, by the assembler that comes with triton; without spilling, which local memory would show."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["decode_streams", "correct", "place"]
