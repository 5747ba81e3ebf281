"""The codec `cachegen`: its contract, and the published arithmetic worked out again without compiled code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

import kvstore
from kvstore.codecs import cachegen_record, default_params, get_codec
from kvstore.codecs.base import Codec
from kvstore.codecs.cachegen import Sizes, bins_for, shipped_nbytes, simulate, sizes
from kvstore.encode import make_encoding
from kvstore.errors import FormatError, InputError, IntegrityError
from tests import plain_codecs
from tests.contracts.codec import DTYPES, CodecContract, sample, to_bits, to_values
from tests.synthetic import LAYOUT

Array = npt.NDArray[Any]
F32 = np.float32


def make(**changes: int | str) -> Codec:
    version, params = default_params("cachegen", head_dim=64)
    return get_codec("cachegen", version, {**params, **changes})


class TestShipped(CodecContract):
    deltas: ClassVar[int] = 0

    def codec(self) -> Codec:
        return make(deltas=self.deltas)

    def check(self, bits: Array, dtype: str, out: Array, tiers: int) -> None:
        """Half a step off at most: of the token's largest magnitude, or of its largest difference to the anchor; and what the dtype rounds."""
        values = to_values(bits, dtype)
        top = np.abs(values).max(axis=-1, keepdims=True)
        anchor = top[:, :, np.arange(values.shape[2]) % 256 // 10 * 10 + np.arange(values.shape[2]) // 256 * 256]
        reach = top + self.deltas * 1.01 * anchor
        levels = np.array(bins_for(32, "lmcache")).T[: len(bits), :, None, None] // 2 - 1
        rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-20}[dtype] * (1 + 2 * self.deltas)
        tiny = 2.0**-24 if dtype == "float16" else 0
        assert (np.abs(out.astype(np.float64) - values) <= reach * (0.5 / levels + rounding) + tiny).all()
        assert (to_values(to_bits(out, dtype), dtype) == out).all()  # values of the dtype


class TestDeltas(TestShipped):
    deltas: ClassVar[int] = 1


# the arithmetic, from the description of the published code


def plain_stream(symbols: list[int], table: list[int]) -> bytes:
    """One stream, by bits in a list."""
    low, high, pending, out, bounds = 0, 2**32 - 1, 0, list[int](), [*table[:-1], 65536]
    for s in symbols:
        span = high - low + 1
        low, high = low + (span * bounds[s] >> 16), low + (span * bounds[s + 1] >> 16) - 1
        while True:
            if high >> 31 == low >> 31:
                out += [high >> 31, *[1 - (high >> 31)] * pending]
                low, high, pending = low << 1 & 0xFFFFFFFF, (high << 1 | 1) & 0xFFFFFFFF, 0
            elif low >> 30 == 1 and high >> 30 == 2:
                low, high, pending = low << 1 & 0x7FFFFFFF, (high << 1 | 0x80000001) & 0xFFFFFFFF, pending + 1
            else:
                break
    bit = 0 if low < 2**30 else 1
    out += [bit, *[1 - bit] * (pending + 1)]
    return np.packbits(out).tobytes()


def plain_rows(symbols: Array, width: int, longest: int) -> bytes:
    """Tables, lengths and streams of [rows, n]."""
    count = symbols.shape[1]
    tables = [[(65535 - width) * int((row < s).sum()) // count + s for s in range(width + 1)] for row in symbols]
    streams = [plain_stream(row[i : i + longest].tolist(), t) for i in range(0, count, longest) for row, t in zip(symbols, tables, strict=True)]
    return b"".join(map(padded, (np.array(tables, "<u2").tobytes(), np.array([len(s) for s in streams], "<u4").tobytes(), b"".join(streams))))


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def plain_quantise(x: torch.Tensor, levels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """As LMCache does it in torch: symbols [planes, tokens, channels] and scales in the dtype of `x`; zeros guarded."""
    top = torch.tensor(levels, dtype=torch.float32)[:, None, None]
    scales = x.abs().amax(-1, keepdim=True)
    symbols = torch.round(x * (top / scales) + top)
    return torch.where(symbols.isfinite(), symbols, top.expand_as(symbols)), scales


def plain_restore(symbols: torch.Tensor, levels: list[int], scales: torch.Tensor) -> torch.Tensor:
    top = torch.tensor(levels, dtype=torch.float32)[:, None, None]
    return (symbols - top) / top * scales


def plain_chunk(x: torch.Tensor, levels: list[int], width: int, deltas: int) -> tuple[bytes, torch.Tensor]:
    """The bytes and the values of planes [planes, tokens, channels] in the model's dtype."""
    others = [t for t in range(x.shape[1]) if not deltas or t % 10]
    scales, values, parts = torch.empty_like(x[..., :1]), torch.empty_like(x), []
    if deltas:
        symbols, scales[:, ::10] = plain_quantise(x[:, ::10], [127] * len(levels))
        values[:, ::10] = plain_restore(symbols, [127] * len(levels), scales[:, ::10]).to(x.dtype)
        parts.append(plain_rows(symbols.flatten(1).numpy().astype(int), 256, symbols[0].numel()))
    if others:
        near = values[:, [t // 10 * 10 for t in others]] if deltas else torch.zeros_like(x)
        symbols, scales[:, others] = plain_quantise(x[:, others] - near, levels)
        values[:, others] = (near.float() + plain_restore(symbols, levels, scales[:, others])).to(x.dtype)
        parts.append(plain_rows(symbols.transpose(1, 2).reshape(-1, len(others)).numpy().astype(int), width, 256))
    return b"".join([padded(scales.flatten().view(torch.uint8).numpy().tobytes()), *parts]), values


def plain_record(x: torch.Tensor, levels: list[int], width: int, first: int, chunk: int, deltas: int) -> tuple[bytes, Array]:
    """The record and the float32 values of [layers, 2, tokens, channels]."""
    kind = [torch.bfloat16, torch.float16, torch.float32].index(x.dtype)
    head = np.array([x.shape[2], x.shape[0], x.shape[3]], "<u4").tobytes() + np.array([first, width, chunk], "<u2").tobytes() + bytes([kind, deltas])
    done = [plain_chunk(part, levels, width, deltas) for part in x.flatten(0, 1).split(chunk, 1)]
    values = torch.cat([values for _, values in done], 1).view(x.shape)
    return b"".join([head, padded(bytes(levels)), *(data for data, _ in done)]), values.float().numpy()


CASES = [
    ("lmcache", 6, 1, 40, {}),
    ("lmcache", 12, 1, 300, {"chunk": 256}),
    ("lmcache", 12, 9, 21, {"chunk": 10}),
    ("sigcomm1", 12, 7, 523, {"chunk": 2048}),
    ("sigcomm2", 32, 1, 70, {"chunk": 64}),
    ("256:4", 3, 0, 33, {"chunk": 32}),
]


@pytest.mark.parametrize("deltas", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("table", "layers", "first", "tokens", "more"), CASES)
def test_records_and_values_are_those_of_the_published_arithmetic(
    table: str, layers: int, first: int, tokens: int, more: dict[str, int], dtype: str, deltas: int
) -> None:
    bits = sample((2, 2, tokens, 7), dtype, seed=tokens, spread=3.0)
    bits[0, 0, tokens // 2] = bits[1, 1, 0] = 0
    codec = make(table=table, layers=layers, deltas=deltas, **more)
    keys, values = bins_for(layers, table)
    levels = [bins[first + i] // 2 - 1 for i in range(2) for bins in (keys, values)]
    x = torch.from_numpy(to_values(bits, dtype)).to(getattr(torch, dtype))
    wanted, restored = plain_record(x, levels, max(keys + values), first, int(codec.params["chunk"]), deltas)
    (record,) = codec.encode(bits, dtype, first)
    assert record == wanted
    out = np.empty(bits.shape, F32)
    codec.decode([record], out)
    np.testing.assert_array_equal(out, restored)
    assert plain_codecs.cachegen([record], codec.params, dtype) == restored.flatten().tolist()


def test_bins_are_the_published_ones() -> None:
    assert bins_for(32, "lmcache") == ((32,) * 10 + (16,) * 22, (32,) * 2 + (16,) * 30)
    assert bins_for(9, "lmcache") == ((32,) * 9, (32,) * 9)
    assert bins_for(40, "lmcache")[0].count(32) == 10
    assert bins_for(32, "sigcomm1") == ((16,) * 20 + (12,) * 12, (16,) * 2 + (12,) * 30)
    assert bins_for(24, "sigcomm2") == ((32,) * 8 + (16,) * 16, (32,) * 2 + (16,) * 22)
    assert bins_for(6, "sigcomm3") == ((32,) * 6, (32,) * 6)
    assert bins_for(1, "sigcomm1") == ((16,), (16,))
    assert bins_for(2, "24:12") == ((24, 24), (12, 12))


@pytest.mark.parametrize(
    "change", [{"table": "level1"}, {"table": "3:8"}, {"table": "8:257"}, {"table": 32}, {"chunk": 0}, {"chunk": "256"}, {"deltas": 2}, {"layers": 0}]
)
def test_refuses_parameters_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="cachegen"):
        make(**change)


def test_a_group_starts_at_its_layer_and_stays_in_the_model() -> None:
    bits = sample((2, 2, 30, 16), "bfloat16")
    codec = make(layers=12, group_layers=2)
    levels = [cachegen_record.parse(codec.encode(bits, "bfloat16", group)[0]).levels.tolist() for group in (0, 1, 4, 5)]
    assert levels == [[15, 15, 15, 15], [15, 7, 15, 7], [15, 7, 15, 7], [7, 7, 7, 7]]
    with pytest.raises(InputError, match="layers 12 to 13"):
        codec.encode(bits, "bfloat16", 6)


# what it costs and what it keeps


def correlated(tokens: int, layers: int = 2, seed: int = 0) -> npt.NDArray[np.float32]:
    """float32 [2, layers, tokens, 32]: neighbours alike, channels of different means and scales."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, layers, tokens, 32))
    for t in range(1, tokens):
        noise[:, :, t] = 0.95 * noise[:, :, t - 1] + 0.31 * noise[:, :, t]
    return (np.exp(rng.normal(size=(2, layers, 1, 32)) * 0.5) * (noise + rng.normal(size=(2, layers, 1, 32)))).astype(F32)


def error(kv: Array, other: Array) -> float:
    return float(((kv - other) ** 2).mean() / (kv**2).mean())


def test_levels_are_in_order() -> None:
    kv = correlated(300, layers=12)
    found = [simulate(kv, f"sigcomm{level}", dtype="bfloat16") for level in (1, 2, 3)]
    errors, nbytes = [error(kv, f.values) for f in found], [f.sizes.tables_free for f in found]
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2] > 0
    assert nbytes[0] < 0.97 * nbytes[1] < 0.97 * 0.97 * nbytes[2]


def test_deltas_help_where_neighbours_are_alike() -> None:
    kv = correlated(2000)
    plain, same = (simulate(kv, "lmcache", 2048, deltas=deltas, dtype="bfloat16") for deltas in (False, True))
    assert error(kv, same.values) < 0.3 * error(kv, plain.values)
    rough = simulate(kv, "16:16", 2048, deltas=True, dtype="bfloat16")
    assert error(kv, rough.values) < error(kv, plain.values)
    assert rough.sizes.shipped < 0.98 * plain.sizes.shipped


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_chunks_save_tables_and_change_no_value(dtype: str) -> None:
    kv = correlated(2100)
    short, long = simulate(kv, "lmcache", 256, dtype=dtype), simulate(kv, "lmcache", 2048, dtype=dtype)
    np.testing.assert_array_equal(short.values, long.values)
    assert short.sizes.tables == 9 * long.sizes.tables // 2
    assert short.sizes.lengths == long.sizes.lengths == 2 * 2 * 32 * 9 * 4
    assert short.sizes.shipped > long.sizes.shipped > long.sizes.tables_free


def test_simulation_is_the_codec_and_goes_on_beyond_the_longest_unit() -> None:
    kv = correlated(4300, layers=1)
    whole, parts = simulate(kv, chunk=2048), [simulate(kv[:, :, t : t + 2048], chunk=2048) for t in (0, 2048, 4096)]
    np.testing.assert_array_equal(whole.values, np.concatenate([p.values for p in parts], axis=2))
    assert whole.sizes == Sizes(*(sum(column) for column in zip(*(p.sizes for p in parts), strict=True)))
    with pytest.raises(InputError):
        simulate(kv[0])
    with pytest.raises(InputError):
        simulate(kv, dtype="float64")


@pytest.mark.parametrize("deltas", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_as_shipped_are_all_of_the_record_and_the_container(dtype: str, deltas: int) -> None:
    """bfloat16: 33 u16 a table, u32 a length, a scale a token and plane; 1,708 bytes of pickle a chunk of one sub-chunk."""
    bits, size = sample((2, 2, 300, 24), dtype), 4 if dtype == "float32" else 2
    codec = make(layers=8, group_layers=2, deltas=deltas)
    for group in (0, 1):
        (record,) = codec.encode(bits, dtype, group)
        found = sizes(record)
        assert shipped_nbytes(record) == sum(found)
        assert found.scales == 4 * 300 * size
        assert found.tables == 2 * (4 * 24 * 33 * 2 + deltas * 4 * 257 * 2)
        assert found.lengths == 4 * (4 * 24 * 2 + deltas * 4 * 2)
        assert found.container == {"bfloat16": 2 * 1707, "float16": 2 * 1693, "float32": 2 * 1695}[dtype] * (group == 0)
        extra = len(record) - (found.shipped - found.container)
        assert 12 + 8 + 4 <= extra < 12 + 8 + 4 + 4 * 2 * 7  # header, head, levels, padding
        keys, values = type(codec).kind_nbytes(record, codec.params, dtype)
        assert keys + values == found.shipped - found.container
        assert 0.8 < keys / values < 1.25


def test_streams_are_near_the_entropy() -> None:
    """Uniform magnitudes in 31 levels take log2(31) bits; the range coder loses a byte or two a stream."""
    rng = np.random.default_rng(0)
    kv = (rng.integers(-15, 16, (2, 1, 2048, 64)) / 15).astype(F32)
    kv[:, :, :, 0] = 1
    found = simulate(kv, "lmcache", 2048)
    np.testing.assert_array_equal(found.values, kv)
    assert np.log2(31) * 0.985 < 8 * found.sizes.streams / kv.size < np.log2(31) * 1.03


# extremes and damage


@pytest.mark.parametrize("deltas", [0, 1])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3e-42, 1e-38, 9e37, -1e38])
def test_constants_come_back(value: float, deltas: int) -> None:
    bits = to_bits(np.full((1, 2, 25, 9), value, F32), "float32")
    out = np.empty(bits.shape, F32)
    make(deltas=deltas).decode(make(deltas=deltas).encode(bits, "float32"), out)
    np.testing.assert_allclose(out, value, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite_and_says_where(value: float) -> None:
    values = np.zeros((2, 2, 10, 64), F32)
    values[1, 1, 3, 5] = value
    with pytest.raises(InputError, match="V of layer 1 in the unit, token 3, channel 5"):
        make().encode(to_bits(values, "float32"), "float32")


def test_deltas_that_leave_float16_are_refused_and_values_never_do() -> None:
    values = np.full((1, 2, 10, 3), 60000, np.float16)
    values[:, :, 1:] = -60000
    with pytest.raises(InputError, match="too far apart for float16"):
        make(deltas=1).encode(values.view(np.uint16), "float16")
    values[:, :, 1:] = [65504, 61000, 0]
    out = np.empty(values.shape, F32)
    make(deltas=1, table="4:4").decode(make(deltas=1, table="4:4").encode(values.view(np.uint16), "float16"), out)
    assert np.abs(out).max() <= 65504


HOSTILE = {  # of bfloat16 [1, 2, 20, 4] in chunks of ten: scales from byte 24, tables from 64, lengths from 592
    "width above 256": (14, b"\x01\x01"),
    "width below the levels": (14, b"\x1f\x00"),
    "no chunk": (16, b"\0\0"),
    "dtype": (18, b"\x03"),
    "deltas": (19, b"\x02"),
    "level of zero": (20, b"\0"),
    "symbol above the level": (20, b"\x01\x01"),
    "negative scale": (24, b"\x80\xbf"),
    "scale that is no number": (24, b"\xc0\x7f"),
    "table that starts late": (64, b"\x01\0"),
    "table that falls": (128, b"\0\0"),
    "endless stream": (592, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_fields_are_damage(what: str) -> None:
    at, new = HOSTILE[what]
    (record,) = make(chunk=10).encode(sample((1, 2, 20, 4), "bfloat16"), "bfloat16")
    with pytest.raises(IntegrityError, match="damaged unit"):
        make().decode([record[:at] + new + record[at + len(new) :]], np.empty((1, 2, 20, 4), F32))


def test_a_stream_that_lends_a_byte_to_its_neighbour_is_damage() -> None:
    (record,) = make(chunk=10).encode(sample((1, 2, 20, 4), "bfloat16"), "bfloat16")
    lengths = np.frombuffer(record, "<u4", 2, 592) + np.array([1, -1])
    with pytest.raises(IntegrityError, match="a stream does not decode"):
        make().decode([record[:592] + lengths.astype("<u4").tobytes() + record[600:]], np.empty((1, 2, 20, 4), F32))


def test_sizes_need_no_compiler() -> None:
    (record,) = make(deltas=1).encode(sample((1, 2, 30, 8), "bfloat16"), "bfloat16")
    code = f"""
import sys
from kvstore.codecs.cachegen import CacheGenCodec, shipped_nbytes
record = bytes.fromhex("{record.hex()}")
assert shipped_nbytes(record) == {shipped_nbytes(record)} and sum(CacheGenCodec.kind_nbytes(record, {{}}, "bfloat16")) > 0
assert not {{"numba", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# in a store


def test_its_encoding_has_a_chunk_a_block_and_the_models_layers() -> None:
    encoding = make_encoding("cachegen", LAYOUT, lossless=True, params={"chunk": 2048, "table": "sigcomm2"})
    assert (encoding.block_tokens, encoding.group_layers) == (2048, 1)
    assert encoding.codecs[0].params == {"chunk": 2048, "deltas": 0, "group_layers": 1, "layers": LAYOUT.layers, "table": "sigcomm2"}
    assert [(t.name, t.exact) for t in encoding.tiers] == [("cachegen", False), ("lossless", True)]
    assert make_encoding("cachegen", LAYOUT).block_tokens == 256


def test_build_and_load(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> None:
    text = " ".join(f"The code of gate {n} is {n * 37 % 1000}." for n in range(60))
    kvstore.build([kvstore.Document(text, "a.md")], tmp_path / "s", bundled_model, bundled_tokenizer, codec="cachegen", lossless=True, certify="none")
    store = kvstore.open(tmp_path / "s", bundled_model, bundled_tokenizer)
    (artifact,) = store["a.md"].stored[-1:]
    tokens, layout, pack = artifact.segment.tokens, artifact.pack.layout, artifact.pack
    assert tokens > 300  # two blocks
    kv = np.empty((2, layout.layers, tokens, layout.channels), F32)
    codecs = [get_codec(c.name, c.version, c.params) for c in artifact.encoding.codecs]
    out, exact = np.empty_like(kv), np.empty(kv.shape, np.uint16)
    for codec, array, into in zip(codecs, ("t0", "lossless"), (out, exact), strict=True):
        for layer, blocks in enumerate(pack.units(artifact.segment, array)):
            for block, record in enumerate(blocks):
                codec.decode([record], into[:, layer : layer + 1, 256 * block : 256 * (block + 1)].swapaxes(0, 1))
    kv[:] = to_values(exact, "bfloat16")
    found = simulate(kv, dtype="bfloat16")
    np.testing.assert_array_equal(out, found.values)
    assert found.sizes.shipped == sum(shipped_nbytes(r) for blocks in pack.units(artifact.segment, "t0") for r in blocks)
    loaded = store.read("a.md", tier="cachegen")[1][2][1]
    assert torch.equal(loaded[0].transpose(0, 1).reshape(tokens, -1), torch.from_numpy(out[1, 2]).to(torch.bfloat16))
