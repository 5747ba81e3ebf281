"""The codec `transform`: the contract, and what only it promises: exact nesting, token sets, a free ladder."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import encode as encoder
from kvstore.calibration import registry
from kvstore.calibration.record import Calibration, CalibrationRecord
from kvstore.codecs import codec_of, get_codec, tables, transform_decode, transform_kernels, transform_sets
from kvstore.codecs.base import Codec, Reader, words_of
from kvstore.codecs.table_data import THIRDS
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.transform_ladder import Ladder
from kvstore.codecs.transform_sets import RAW, STEP_CLASSES
from kvstore.codecs.transform_units import HEAD
from kvstore.errors import FormatError, InputError, IntegrityError
from kvstore.manifest import FORMAT
from kvstore.transforms.klt import Basis
from tests import plain_transform
from tests.contracts.codec import CodecContract, relaxed, to_bits, to_values
from tests.synthetic import LAYOUT
from tests.synthetic_calibration import make_calibration, make_values

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
NAMES = ("draft", "standard", "fine")


@lru_cache(512)
def any_calibration(layers: int, channels: int, tiers: int = 3) -> Calibration:
    """For one group of any shape, quickly: a random rotation, a metric without correlations, classes that fall to nothing."""
    random, dim, blocks = np.random.default_rng((layers, channels)), 2 * layers * channels, 2 * layers
    weights = random.uniform(0.5, 2, dim).astype(np.float16)
    metric = np.zeros((blocks, channels, channels), np.float16)
    metric[:, range(channels), range(channels)] = weights.reshape(blocks, channels)
    rank = max(1, 3 * dim // 4)
    rows = np.linalg.qr(random.standard_normal((dim, rank)))[0].T / np.sqrt(weights.astype(np.float64))
    scale = np.abs(rows).max(axis=1)
    basis = Basis(random.standard_normal(dim).astype(np.float32), (rows / scale[:, None]).astype(np.float16), scale.astype(np.float32), metric,
                  np.ones(blocks, np.float32))  # fmt: skip
    record = CalibrationRecord(
        format=FORMAT, kind="calibration", model="0" * 64, layers=layers, kv_heads=1, head_dim=channels, metric="fisher", group_layers=layers,
        tiers=tiers, step=0.25, least=12, shrink=(0.1,) * (tiers - 1) + (0.04,), exempt=4.0, energy=(float(dim),), ranks=(rank,), tokens=1000, seed=0,
        kl=(), texts=(), provenance={}, files={},
    )  # fmt: skip
    built_in = make_calibration()
    return Calibration("0" * 64, record, (basis,), (np.linspace(44, 9, rank).astype(np.uint8),), built_in.weights, np.array(THIRDS, np.uint16))


def make(calibration: Calibration) -> TransformCodec:
    codec = get_codec("transform", 1, {}, calibration)
    assert isinstance(codec, TransformCodec)
    return codec


def rows_of(values: Array) -> Array:
    """[layers, 2, tokens, channels] -> [tokens, D]."""
    return values.transpose(2, 0, 1, 3).reshape(values.shape[2], -1)


class TestTransform(CodecContract):
    def codec(self) -> Codec:
        return self.codec_for((2, 2, 1, 70))

    def codec_for(self, shape: tuple[int, ...]) -> Codec:
        return make(any_calibration(shape[0], shape[3]))

    def check(self, bits: Array, dtype: str, out: Array, tiers: int) -> None:
        """A token is exact (raw), or every coefficient that ordinary tokens have at this tier is half a step off at most."""
        codec = make(any_calibration(bits.shape[0], bits.shape[3]))
        ladder, basis = codec.ladders[0], codec.calibration.bases[0]
        x, y = rows_of(to_values(bits, dtype)).astype(np.float64), rows_of(out).astype(np.float64)
        count, step = ladder.count(tiers - 1, 0), float(ladder.step_of(tiers - 1, 0))
        wanted, found = ((v - basis.mean) @ basis.analysis()[:, :count].astype(np.float64) for v in (x, y))
        # 16-bit rows are not quite orthogonal: each coefficient takes a little of the others
        allowed = step * (0.5 + codec.calibration.record.shrink[tiers - 1]) + 2e-3 * np.abs(wanted).max(axis=1, keepdims=True) + 1e-4
        assert ((np.abs(found - wanted) <= allowed).all(axis=1) | (x == y).all(axis=1)).all()


# against the plain reader of the format page


@lru_cache(1)
def ours() -> Calibration:
    return make_calibration()


def plain(calibration: Calibration) -> list[plain_transform.Calibrated]:
    r = calibration.record
    return [
        plain_transform.Calibrated(
            classes.tolist(),
            calibration.weights.tolist(),
            calibration.thirds.tolist(),
            r.tiers,
            r.least,
            r.step,
            list(r.shrink),
            basis.mean.tolist(),
            (basis.rows.astype(np.float64) * basis.scale[:, None]).tolist(),
        )
        for basis, classes in zip(calibration.bases, calibration.classes, strict=True)
    ]


def block(group: int, tokens: int, draw: int = 0, first: int = 0) -> Floats:
    """Values [layers of the group, 2, tokens, 16] that fit `ours`."""
    return np.ascontiguousarray(make_values(first + tokens, draw=draw)[list(ours().group_layers(group)), :, first:])


def encode(values: Floats, group: int = 0, steps: Array | None = None, calibration: Calibration | None = None) -> list[bytes]:
    return make(calibration or ours()).encode(to_bits(values, "float32"), "float32", group, steps)


def decoded(records: list[bytes], like: Floats, calibration: Calibration | None = None) -> Floats:
    out = np.full(like.shape, np.nan, np.float32)
    make(calibration or ours()).decode(records, out)
    return out


def coarser(levels: Array) -> Array:
    return np.sign(levels) * ((np.abs(levels) + 1) // 3)


def strange(values: Floats, seed: int) -> tuple[Floats, Array]:
    """Some tokens out of scale, some far out, and step classes for all."""
    random = np.random.default_rng(seed)
    scales = random.choice([1.0, 1.0, 1.0, 3.0, 30.0, 1e4, 1e20], values.shape[2]).astype(np.float32)
    return values * scales[:, None], random.choice(STEP_CLASSES, values.shape[2]).astype(np.int8)


@relaxed
@given(tokens=st.integers(1, 40), group=st.integers(0, 1), seed=st.integers(0, 1000), plain_steps=st.booleans())
def test_tiers_nest_exactly_and_are_what_the_page_says(tokens: int, group: int, seed: int, plain_steps: bool) -> None:
    """Levels of fewer tiers are the cells of the finest; values are mean + levels times rows; all as a second reader sees it."""
    values, steps = strange(block(group, tokens, seed), seed)
    records = encode(values, group, None if plain_steps else steps)
    cal, units = plain(ours()), [plain_transform.read(records[:n], plain(ours())) for n in (1, 2, 3)]
    assert units[0].group == group and units[0].classes == units[2].classes
    for t, name in enumerate(units[2].classes):
        if name == plain_transform.RAW:
            assert units[0].levels[t] == rows_of(to_bits(values, "float32"))[t].tolist()
            continue
        levels = np.array(units[2].levels[t])
        for level in (2, 1, 0):
            count = len(cal[group].at(level, name))
            assert units[level].levels[t] == levels[:count].tolist()
            levels = coarser(levels)
    for n in (1, 2, 3):
        wanted = np.array(plain_transform.values(records[:n], cal, "float32"))
        allowed = 1e-4 + 1e-5 * np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(rows_of(decoded(records[:n], values)) - wanted) <= allowed).all()


def test_levels_are_the_rounded_coefficients() -> None:
    values = block(0, 200)
    basis, step = ours().bases[0], ours().record.step
    exact = (rows_of(values) - basis.mean).astype(np.float64) @ basis.analysis().astype(np.float64) / step
    found = np.array(plain_transform.read(encode(values), plain(ours())).levels)
    near_a_tie = np.abs(np.abs(exact - np.floor(exact)) - 0.5) < 1e-3
    assert ((found == np.rint(exact[:, : found.shape[1]])) | near_a_tie[:, : found.shape[1]]).all()
    assert found.shape[1] == make(ours()).ladders[0].count(2, 0)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 512])
def test_error_falls_tier_by_tier(group: int, tokens: int) -> None:
    values = block(group, tokens)
    records = encode(values, group)
    errors = [float(np.square(decoded(records[:n], values) - values).mean()) for n in (1, 2, 3)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


# token sets


def test_ordinary_tokens_cost_no_list_of_sets() -> None:
    record = encode(block(0, 100))[0]
    assert np.frombuffer(record, HEAD, 1, 12)[0].tolist()[:3] == (0, 1, 0)


def test_step_classes_buy_quality_and_bytes() -> None:
    values = block(0, 128)
    sizes, errors = [], []
    for step_class in range(-3, 4):
        records = encode(values, 0, np.full(128, step_class, np.int8))
        sizes.append(sum(map(len, records)))
        errors.append(float(np.square(decoded(records, values) - values).mean()))
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert sizes[0] > 3 * sizes[-1]


def test_a_token_is_coded_the_same_in_any_company() -> None:
    values, steps = block(0, 60), np.zeros(60, np.int8)
    alone = decoded(encode(values), values)
    steps[::3], steps[1::3] = -1, 2
    mixed = decoded(encode(values, 0, steps), values)
    np.testing.assert_array_equal(alone[:, :, 2::3], mixed[:, :, 2::3])
    assert np.square(mixed - values)[:, :, ::3].mean() < np.square(alone - values)[:, :, ::3].mean()


def test_an_outlier_gets_fine_steps_and_one_that_the_transform_cannot_hold_stays_raw() -> None:
    values, basis = block(0, 50), ours().bases[0]
    inside = np.zeros(basis.dim, np.float32)
    inside += 60 * basis.synthesis(1)[0] / ours().record.step
    values[:, :, 7] += inside.reshape(2, 2, 16)  # far out, but in the direction that the transform knows best
    values[:, :, 9] *= 1000
    records = encode(values)
    found = plain_transform.read(records, plain(ours())).classes
    assert found == [-2 if t == 7 else plain_transform.RAW if t == 9 else 0 for t in range(50)]
    for n in (1, 2, 3):
        out = decoded(records[:n], values)
        np.testing.assert_array_equal(out[:, :, 9], values[:, :, 9])
    assert np.square(out - values)[:, :, 7].mean() < np.square(out - values)[:, :, :7].mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_raw_tokens_keep_every_bit(dtype: str) -> None:
    values = block(1, 9) * np.float32(300)
    bits = to_bits(values, dtype)
    records = make(ours()).encode(bits, dtype, 1)
    assert plain_transform.read(records, plain(ours())).classes == [plain_transform.RAW] * 9
    for n in (1, 2, 3):
        np.testing.assert_array_equal(decoded(records[:n], values), to_values(bits, dtype))


@relaxed
@given(codes=st.lists(st.sampled_from([*STEP_CLASSES, RAW]), min_size=1, max_size=600), repeat=st.sampled_from([1, 1, 5]))
def test_token_sets_survive_and_take_a_few_bits_a_token(codes: list[int], repeat: int) -> None:
    row = np.repeat(np.array(codes, np.int8), repeat)
    mask = transform_sets.mask_of(row)
    packed, data = transform_sets.pack(row)
    reader = Reader(words_of(data + bytes(16)) if data else words_of(bytes(12)))
    found = transform_sets.unpack(reader, mask, packed, len(row))
    assert 4 * reader.at == len(data) <= len(row) / 2 + 4
    again = np.full(len(row), 99, np.int8)
    for code, tokens in found:
        again[tokens] = code
    np.testing.assert_array_equal(again, row)


# escapes


def test_levels_beyond_their_alphabet_survive() -> None:
    """Tokens that the test of energies lets pass, with one coefficient far out of its class."""
    loose = dataclasses.replace(ours(), record=replaced(ours().record, exempt=1e9))
    values, rows = block(0, 40), ours().bases[0].synthesis(50)
    for t, k in ((3, 0), (3, 49), (5, 20), (17, 30), (18, 44), (39, 1)):
        values[:, :, t] += (200 * rows[k] * (-1) ** t).reshape(2, 2, 16)
    records = encode(values, calibration=loose)
    assert all(np.frombuffer(record, HEAD, 1, 12)[0]["escapes"] for record in records)
    units = [plain_transform.read(records[:n], plain(loose)) for n in (1, 2, 3)]
    assert np.abs(np.array(units[2].levels)).max() > 500
    for n, unit in enumerate(units, 1):
        wanted = np.array(plain_transform.values(records[:n], plain(loose), "float32"))
        np.testing.assert_allclose(rows_of(decoded(records[:n], values, loose)), wanted, rtol=1e-4, atol=1e-3)
        assert unit.classes == [0] * 40


def replaced(record: CalibrationRecord, **fields: Any) -> CalibrationRecord:
    return CalibrationRecord(**{name: fields.get(name, getattr(record, name)) for name in record.__struct_fields__})


# the price of the ladder


@pytest.mark.parametrize("shape", ["gaussian", "laplace"])
def test_three_tiers_cost_what_one_costs(shape: str) -> None:
    """Coefficients drawn to fit the classes; streams' lengths, headers and escapes included."""
    tokens, cal = 512, any_calibration(2, 64)
    basis, random = cal.bases[0], np.random.default_rng(1)
    fitted = dataclasses.replace(cal, weights=weights_for(shape), thirds=thirds_for(shape), record=replaced(cal.record, exempt=1e9))
    single = dataclasses.replace(fitted, record=replaced(fitted.record, tiers=1, shrink=(0.04,)))
    sigma = cal.record.step * 3.0 ** ((cal.classes[0].astype(np.float64) - 24) / 8)
    drawn = random.standard_normal((tokens, basis.rank)) if shape == "gaussian" else random.laplace(0, 0.5**0.5, (tokens, basis.rank))
    x = basis.mean + (drawn * sigma).astype(np.float32) @ basis.synthesis(basis.rank)
    values = np.ascontiguousarray(x.reshape(tokens, 2, 2, 64).transpose(1, 2, 0, 3), np.float32)
    three, one = encode(values, calibration=fitted), encode(values, calibration=single)
    np.testing.assert_array_equal(decoded(three, values, fitted), decoded(one, values, single))
    assert sum(map(len, three)) < 1.02 * len(one[0])
    assert 8 * len(one[0]) / values.size < 1.02 * entropy(drawn * sigma, cal.record.step) * basis.rank / basis.dim + 0.02


def entropy(values: Array, step: float) -> float:
    """Mean bits a value: of each coefficient's own counts, so the tables must fit well to come near."""
    bits = 0.0
    for column in np.rint(values / step).astype(int).T:
        share = np.unique(column, return_counts=True)[1] / len(column)
        bits -= float((share * np.log2(share)).sum())
    return bits / values.shape[1]


def masses(shape: str, scale_class: int) -> Array:
    """Chances of thirds of cells: entry i is |x| between (i - 1/2) / 3 and (i + 1/2) / 3 steps; entry 0 from 0."""
    from math import erf, exp

    sigma = 3.0 ** ((scale_class - 24) / 8)
    edges = (np.arange(3 * 200) + 0.5) / 3 / sigma
    within = np.array([erf(e / 2**0.5) if shape == "gaussian" else 1 - exp(-(2**0.5) * e) for e in edges])
    return np.diff(within, prepend=0.0)


def weights_for(shape: str) -> npt.NDArray[np.uint16]:
    from kvstore.calibration.fit_tables import fit_weights

    counts = np.zeros((49, 129), np.int64)
    for c in range(49):
        fine = masses(shape, c)
        cells = np.concatenate(([fine[:2].sum()], fine[2:].reshape(-1)[: 3 * 198].reshape(-1, 3).sum(axis=1)))
        counts[c, :128], counts[c, 128] = 1e7 * cells[:128], 1e7 * cells[128:].sum()
    return fit_weights(counts)


def thirds_for(shape: str) -> npt.NDArray[np.uint16]:
    out = np.zeros((49, 3), np.uint16)
    for c in range(49):
        fine = masses(shape, c) + 1e-12
        cells = fine[2:][: 3 * 198].reshape(-1, 3).sum(axis=0)
        out[c] = 1 + np.array([4093 * fine[1] / 2 / fine[:2].sum(), *(4090 * cells[:2] / cells.sum())]).astype(int)
    return out


# in a store


@pytest.mark.parametrize("tiers", [1, 2, 3])
def test_encoder_and_registry_know_the_codec(tiers: int) -> None:
    """Groups of layers, the last one short; blocks, the last one short; tiers by name, the finest always `fine`."""
    calibration = make_calibration(tiers=tiers)
    registry.add(calibration)
    encoding = encoder.make_encoding("transform", LAYOUT, calibration=calibration, lossless=True)
    assert [(t.name, t.requires) for t in encoding.tiers][:tiers] == [(n, NAMES[3 - tiers :][:i]) for i, n in enumerate(NAMES[3 - tiers :])]
    assert encoding.group_layers == 2 and encoding.codecs[0].calibration == calibration.digest
    values = make_values(600)
    units = encoder.Encoder(encoding, LAYOUT).encode(to_bits(values, LAYOUT.dtype))
    codec, out = codec_of(encoding.codecs[0], encoding, LAYOUT), np.full(values.shape, np.nan, np.float32)
    for group, first in enumerate((0, 2)):
        for part, start in enumerate((0, 512)):
            codec.decode([units[f"t{level}"][group][part] for level in range(tiers)], out[first : first + 2, :, start : start + 512])
    assert np.square(out - values).mean() < 0.02 * np.square(values - values.mean(axis=2, keepdims=True)).mean()


# refusals and damage


def test_needs_a_calibration_that_fits() -> None:
    with pytest.raises(FormatError, match="calibration"):
        get_codec("transform", 1, {})
    with pytest.raises(FormatError, match="no calibration"):
        get_codec("raw", 1, {}, ours())
    for group, shape in ((0, (1, 2, 4, 16)), (1, (2, 2, 4, 16)), (2, (1, 2, 4, 16)), (-1, (1, 2, 4, 16)), (0, (2, 2, 4, 15))):
        with pytest.raises(InputError, match="group"):
            make(ours()).encode(np.zeros(shape, np.uint16), "bfloat16", group)
    for steps in (np.zeros(3, np.int8), np.full(4, 4, np.int8), np.full(4, 127, np.int8)):
        with pytest.raises(InputError, match="step class"):
            make(ours()).encode(np.zeros((2, 2, 4, 16), np.uint16), "bfloat16", 0, steps)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite_and_says_where(value: float) -> None:
    values = block(0, 10)
    values[1, 1, 3, 5] = value
    with pytest.raises(InputError, match="V of layer 1 in the unit, token 3, channel 5"):
        encode(values)


def test_a_record_of_another_group_is_damage() -> None:
    whole = make_calibration(layers=2, group_layers=1)
    values = make_values(20, layers=2, group_layers=1)
    codec, bits = make(whole), to_bits(values, "float32")
    first, second = codec.encode(bits[:1], "float32", 0), codec.encode(bits[1:], "float32", 1)
    out = np.empty((1, 2, 20, 16), np.float32)
    with pytest.raises(IntegrityError, match="groups"):
        codec.decode([first[0], second[1], first[2]], out)
    with pytest.raises(IntegrityError):
        codec.decode([changed(first[0], 12, 2)], out)


def changed(record: bytes, at: int, byte: int) -> bytes:
    return record[:at] + bytes([byte]) + record[at + 1 :]


def test_impossible_heads_are_damage() -> None:
    values = block(0, 30)
    values[:, :, 3] *= 1000
    records = encode(values)
    out = np.empty(values.shape, np.float32)
    sets, forms = [(0, 14, 0), (0, 14, 255), (0, 14, 1), (1, 14, 1)], [(0, 15, 8), (0, 15, 6), (0, 15, 0x30), (0, 15, 0xC0), (1, 15, 2)]
    for tier, at, byte in (*sets, *forms, (0, 16, 200)):
        broken = list(records)
        broken[tier] = changed(records[tier], at, byte)
        with pytest.raises(IntegrityError):
            make(ours()).decode(broken, out)


def test_a_level_out_of_range_is_damage() -> None:
    from kvstore.codecs.escapes import Escapes

    level = np.array([1, -1, 0], np.int16)
    transform_decode._correct(level, Escapes(np.array([0, 1]), np.array([5, 7])), 8)
    assert level.tolist() == [6, -8, 0]
    with pytest.raises(IntegrityError):
        transform_decode._correct(level, Escapes(np.array([1]), np.array([2**32])), 29524)


def test_limits_nest() -> None:
    ladder = Ladder(np.array([20]), 3, 9, 0.25)
    assert [ladder.limit(level) for level in range(3)] == [3280, 9841, 29524]
    assert [coarser(np.array(ladder.limit(level + 1))) for level in range(2)] == [3280, 9841]


def test_tables_of_a_calibration_are_checked_and_kept() -> None:
    cal = ours()
    assert tables.build(cal.weights, cal.thirds) is tables.build(cal.weights.copy(), cal.thirds.copy())
    bad = [("weights", 7, np.zeros(128)), ("weights", 0, np.eye(1, 128)[0] * 4096), ("thirds", 3, [2048, 1, 1]), ("thirds", 3, [1, 4095, 1])]
    for field, c, row in bad:
        arrays = {"weights": cal.weights.copy(), "thirds": cal.thirds.copy()}
        arrays[field][c] = row
        with pytest.raises(FormatError, match="model"):
            tables.build(arrays["weights"], arrays["thirds"])


# kernels


@relaxed
@given(tokens=st.integers(1, 130), rank=st.integers(1, 300), dim=st.sampled_from([2, 30, 64, 100, 192]), seed=st.integers(0, 99))
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_sums_of_rows_are_those_of_a_matrix_product(density: float, tokens: int, rank: int, dim: int, seed: int) -> None:
    from kvstore.codecs.sparse import CHUNK, TILE

    random = np.random.default_rng(seed)
    levels = (random.integers(-300, 300, (rank, tokens)) * (random.random((rank, tokens)) < density)).astype(np.int16)
    rows, mean = random.standard_normal((rank, dim)).astype(np.float32), random.standard_normal(dim).astype(np.float32)
    order, scale = random.permutation(tokens), np.full(rank, 2.0, np.float32)
    basis = Basis(mean, rows.astype(np.float16), scale, np.zeros((2, dim // 2, dim // 2), np.float16), np.ones(2, np.float32))
    starts = np.zeros((tokens, 1 - (-rank // CHUNK)), np.int32)
    index, values = np.empty((tokens, rank), np.uint16), np.empty((tokens, rank), np.float32)
    transform_kernels.gather(levels, order, np.float32(0.5), np.float32(0.25), starts, index, values)
    out = np.empty((1, 2, tokens, dim // 2), np.float32)
    transform_kernels.synthesise(starts, index, values, mean, basis.tiles(rank, TILE), out)
    sizes = levels.T.astype(np.float64) * np.where(np.abs(levels.T) == 1, 0.25, 0.5)
    wanted = np.empty((tokens, dim))
    wanted[order] = mean + sizes @ (rows.astype(np.float16).astype(np.float64) * 2)
    np.testing.assert_allclose(rows_of(out), wanted, rtol=1e-4, atol=1e-3 * rank**0.5)
