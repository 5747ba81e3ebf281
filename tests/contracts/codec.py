"""What every codec must do. A codec's test subclasses `CodecContract` and says how to make one and what it may change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.codecs import get_codec
from kvstore.codecs.base import Codec
from kvstore.errors import FormatError, InputError, IntegrityError

Array = npt.NDArray[Any]
UNSIGNED = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
DTYPES = sorted(UNSIGNED)
relaxed = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow])


def to_bits(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Bit patterns of `values`, rounded to `dtype` (bfloat16 by truncation)."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype).view(UNSIGNED[dtype])


def to_values(bits: Array, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(dtype).astype(np.float32)


def sample(shape: tuple[int, int, int, int], dtype: str, seed: int = 0, spread: float = 1.0) -> Array:
    """Values with channel means and token scales, as K and V have."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:3], 1)) * 0.3) + rng.normal(size=(*shape[:2], 1, shape[3]))
    return to_bits((spread * noise).astype(np.float32), dtype)


shapes = st.tuples(st.integers(1, 2), st.just(2), st.integers(1, 40), st.integers(1, 70))


class CodecContract:
    """`codec` makes the codec under test; `check` compares what `tiers` tiers gave with what went in."""

    dtypes: ClassVar[list[str]] = DTYPES

    def codec(self) -> Codec:
        raise NotImplementedError

    def codec_for(self, shape: tuple[int, ...]) -> Codec:
        """The codec under test for units of this shape, where not every one takes all."""
        return self.codec()

    def check(self, bits: Array, dtype: str, out: Array, tiers: int) -> None:
        """Raises AssertionError where `out` is further from `bits` than the codec promises. For exact codecs: at all."""
        np.testing.assert_array_equal(out, bits)

    def out_like(self, bits: Array) -> Array:
        return np.zeros(bits.shape, bits.dtype if self.codec().exact else np.float32)

    def decoded(self, records: list[bytes], bits: Array) -> Array:
        out = self.out_like(bits)
        self.codec_for(bits.shape).decode(records, out)
        return out

    @relaxed
    @given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9), spread=st.sampled_from([1e-3, 1.0, 50.0]))
    def test_round_trip(self, shape: tuple[int, int, int, int], dtype: str, seed: int, spread: float) -> None:
        codec, bits = self.codec_for(shape), sample(shape, dtype, seed, spread)
        records = codec.encode(bits, dtype)
        assert len(records) == codec.n_tiers
        for tiers in range(1, codec.n_tiers + 1):
            assert len(records[tiers - 1]) % 4 == 0
            assert codec.peek_tokens(records[tiers - 1]) == shape[2]
            self.check(bits, dtype, self.decoded(records[:tiers], bits), tiers)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 2, 128, 128), (3, 2, 7, 33), (1, 2, 130, 257), (1, 2, 128, 640)])
    def test_usual_and_odd_shapes(self, shape: tuple[int, int, int, int], dtype: str) -> None:
        bits = sample(shape, dtype)
        records = self.codec_for(shape).encode(bits, dtype)
        for tiers in range(1, len(records) + 1):
            self.check(bits, dtype, self.decoded(records[:tiers], bits), tiers)

    def test_encoding_is_repeatable_and_params_restore_the_codec(self) -> None:
        codec, bits = self.codec_for((1, 2, 50, 64)), sample((1, 2, 50, 64), "bfloat16")
        assert all(isinstance(value, (int, str)) for value in codec.params.values())
        again = get_codec(codec.name, codec.version, dict(codec.params), getattr(codec, "calibration", None))
        assert again.encode(bits, "bfloat16") == codec.encode(bits, "bfloat16")

    def test_decodes_into_a_slice_and_leaves_its_neighbours_alone(self) -> None:
        bits = sample((2, 2, 30, 65), "bfloat16")
        codec = self.codec_for(bits.shape)
        records = codec.encode(bits, "bfloat16")
        whole = np.full((2, 2, 50, 65), 7, self.out_like(bits).dtype)
        codec.decode(records, whole[:, :, 11:41])
        np.testing.assert_array_equal(whole[:, :, 11:41], self.decoded(records, bits))
        assert (whole[:, :, :11] == 7).all() and (whole[:, :, 41:] == 7).all()

    def test_takes_views_of_any_alignment(self) -> None:
        bits = sample((1, 2, 20, 64), "bfloat16")
        codec = self.codec_for(bits.shape)
        records = codec.encode(bits, "bfloat16")
        views = [memoryview(bytearray(b"x" + record))[1:] for record in records]
        out = self.out_like(bits)
        codec.decode(views, out)
        np.testing.assert_array_equal(out, self.decoded(records, bits))

    def test_threads_may_share_a_codec(self) -> None:
        codec, bits = self.codec_for((1, 2, 64, 64)), [sample((1, 2, 64, 64), "bfloat16", seed) for seed in range(8)]
        records = [codec.encode(b, "bfloat16") for b in bits]
        alone = [self.decoded(r, b) for r, b in zip(records, bits, strict=True)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda rb: self.decoded(*rb), zip(records, bits, strict=True)))
            assert list(pool.map(lambda b: codec.encode(b, "bfloat16"), bits)) == records
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("shape", [(2, 10, 64), (1, 1, 10, 64), (1, 2, 0, 64), (1, 2, 10, 0), (0, 2, 10, 64)])
    def test_refuses_what_is_no_unit(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError):
            self.codec().encode(np.zeros(shape, np.uint16), "bfloat16")

    def test_refuses_a_wrong_dtype(self) -> None:
        codec = self.codec_for((1, 2, 4, 4))
        with pytest.raises(InputError):
            codec.encode(np.zeros((1, 2, 4, 4), np.uint32), "bfloat16")
        with pytest.raises(InputError):
            codec.encode(np.zeros((1, 2, 4, 4), np.uint16), "float64")
        records = codec.encode(np.zeros((1, 2, 4, 4), np.uint16), "bfloat16")
        with pytest.raises(InputError):
            codec.decode(records, np.zeros((1, 2, 4, 4), np.float64))

    def test_refuses_foreign_params_and_versions(self) -> None:
        codec = self.codec()
        with pytest.raises(FormatError):
            get_codec(codec.name, codec.version, {**codec.params, "surprise": 1}, getattr(codec, "calibration", None))
        with pytest.raises(FormatError):
            get_codec(codec.name, codec.version + 1, codec.params, getattr(codec, "calibration", None))

    @pytest.mark.parametrize("other", [(1, 2, 19, 64), (1, 2, 20, 63), (2, 2, 20, 64)])
    def test_a_record_of_another_shape_is_damage(self, other: tuple[int, int, int, int]) -> None:
        records = self.codec_for((1, 2, 20, 64)).encode(sample((1, 2, 20, 64), "bfloat16"), "bfloat16")
        with pytest.raises(IntegrityError):
            self.decoded(records, np.zeros(other, np.uint16))

    def test_refuses_too_many_and_too_few_records(self) -> None:
        bits = sample((1, 2, 20, 64), "bfloat16")
        records = self.codec_for(bits.shape).encode(bits, "bfloat16")
        for wrong in ([], [*records, records[-1]]):
            with pytest.raises(InputError):
                self.decoded(wrong, bits)

    @relaxed
    @given(data=st.data(), tier=st.integers(0, 2), dtype=st.sampled_from(DTYPES))
    def test_damage_is_an_error_or_wrong_values_never_a_crash(self, data: st.DataObject, tier: int, dtype: str) -> None:
        bits = sample((1, 2, 24, 70), dtype)
        records = self.codec_for(bits.shape).encode(bits, dtype)
        tier %= len(records)
        records[tier] = damage(data, records[tier])
        with suppress(IntegrityError):
            assert self.decoded(records, bits).shape == bits.shape

    @pytest.mark.parametrize("keep", [0, 4, 8, 12, 16, 20, 64, -4, -8])
    def test_truncation_is_damage(self, keep: int) -> None:
        bits = sample((1, 2, 24, 70), "bfloat16")
        records = self.codec_for(bits.shape).encode(bits, "bfloat16")
        for tier in range(len(records)):
            short = [*records[:tier], records[tier][:keep]]
            with pytest.raises(IntegrityError):
                self.decoded(short, bits)
        with pytest.raises(IntegrityError, match="rebuild"):
            self.decoded([*records[:-1], records[-1] + bytes(4)], bits)


def damage(data: st.DataObject, record: bytes) -> bytes:
    """The record with some bytes changed, cut off, or all but its header made up."""
    kind = data.draw(st.sampled_from(["flip", "words", "cut", "random"]))
    broken = bytearray(record)
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, len(record) - 1), min_size=1, max_size=5)):
            broken[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "words":
        for at in data.draw(st.lists(st.integers(0, min(40, len(record) // 4 - 1)), min_size=1, max_size=3)):
            broken[4 * at : 4 * at + 4] = data.draw(st.sampled_from([bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x01\0\0\0"]))
    elif kind == "cut":
        del broken[data.draw(st.integers(0, len(record))) :]
    else:
        broken[12:] = data.draw(st.binary(min_size=0, max_size=2 * len(record)))
    return bytes(broken)
