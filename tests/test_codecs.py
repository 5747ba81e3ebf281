"""The codecs: the contract of each, and what only one of them promises."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codecs import NAMES, default_params, get_codec
from kvstore.codecs.base import Codec
from kvstore.codecs.scalar import FEW_TOKENS, KEY, VALUE, ScalarCodec
from kvstore.errors import FormatError, InputError, IntegrityError
from tests.contracts.codec import CodecContract, relaxed, sample, to_bits, to_values

Array = npt.NDArray[Any]


def make(name: str, head_dim: int = 64) -> Codec:
    return get_codec(name, *default_params(name, head_dim=head_dim))


class TestRaw(CodecContract):
    def codec(self) -> Codec:
        return make("raw")


class TestLossless(CodecContract):
    def codec(self) -> Codec:
        return make("lossless")


class TestScalar(CodecContract):
    def codec(self) -> Codec:
        return make("scalar")

    def check(self, bits: Array, dtype: str, out: Array, tiers: int) -> None:
        """Both tiers are half a fine step off at most, the base alone one and a half."""
        values, steps = to_values(bits, dtype), steps_of(self.codec().encode(bits, dtype)[0], bits.shape)
        most = {1: 1.5, 2: 0.5}[tiers] * steps[:, :, None, None]
        rounding = np.abs(values) * 2.0**-23  # of the result to float32
        assert (np.abs(out.astype(np.float64) - values) <= most * (1 + 1e-6) + rounding).all()


def steps_of(record: bytes, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """[layers, 2]: the fine steps, the first word of each plane's head."""
    heads = np.frombuffer(record, "<u4", 8 * shape[0], 12).reshape(shape[0], 2, 4)
    return np.ascontiguousarray(heads[:, :, 0]).view("<f4").astype(np.float64)


def test_unknown_codecs_and_versions_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match="zfp"):
        get_codec("zfp", 1, {})
    with pytest.raises(FormatError, match="version 9"):
        get_codec("raw", 9, {})
    assert set(NAMES) == {"raw", "lossless", "scalar", "cachegen", "transform"}


def test_looking_up_and_peeking_import_no_compiler() -> None:
    """numba costs a third of a second: listing a store must not pay it, and `raw` never does."""
    code = """
import sys, numpy as np
from kvstore.codecs import NAMES, default_params, get_codec
sys.path.append(sys.argv[1])
from tests.synthetic_calibration import make_calibration
calibrations = {"transform": make_calibration()}
codecs = {name: get_codec(name, *default_params(name, head_dim=64), calibrations.get(name)) for name in NAMES}
bits = np.zeros((1, 2, 3, 4), np.uint16)
records = codecs["raw"].encode(bits, "bfloat16")
codecs["raw"].decode(records, bits)
assert all(codec.peek_tokens(records[0]) == 3 for codec in codecs.values())
assert not {"numba", "zarr", "torch"} & set(sys.modules), "too much"
"""
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent.parent)], check=True)


# lossless


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", np.uint16), ("float16", np.uint16)])
def test_lossless_keeps_every_pattern_of_sixteen_bits(dtype: str, kind: type) -> None:
    bits: Array = np.arange(1 << 16, dtype=kind).reshape(1, 2, 128, 256)
    out = np.zeros_like(bits)
    make("lossless").decode(make("lossless").encode(bits, dtype), out)
    np.testing.assert_array_equal(out, bits)


@relaxed
@given(patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60))
def test_lossless_keeps_every_pattern_of_thirty_two_bits(patterns: list[int]) -> None:
    special = [0x7FC00000, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x807FFFFF]
    row = np.array([*patterns, *special], np.uint32)
    bits = np.ascontiguousarray(np.broadcast_to(row, (1, 2, 3, len(row))))
    out = np.zeros_like(bits)
    make("lossless").decode(make("lossless").encode(bits, "float32"), out)
    np.testing.assert_array_equal(out, bits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lossless_never_blows_up(dtype: str) -> None:
    rng = np.random.default_rng(0)
    kind = np.uint32 if dtype == "float32" else np.uint16
    bits = rng.integers(0, np.iinfo(kind).max, (1, 2, 128, 128), dtype=kind, endpoint=True)
    assert len(make("lossless").encode(bits, dtype)[0]) <= bits.nbytes + 64


def test_lossless_compresses_and_uses_offsets_where_they_pay() -> None:
    bits = sample((1, 2, 128, 256), "bfloat16")
    assert len(make("lossless").encode(bits, "bfloat16")[0]) < 0.7 * bits.nbytes
    scales = np.exp(np.random.default_rng(0).normal(size=256) * 4).astype(np.float32)
    scaled = to_bits(to_values(bits, "bfloat16") * scales, "bfloat16")  # order-0 exponents spread, per channel they do not
    assert len(make("lossless").encode(scaled, "bfloat16")[0]) < 0.72 * bits.nbytes


def test_lossless_stores_constant_bytes_once() -> None:
    narrow = sample((1, 2, 128, 128), "bfloat16")
    wide = narrow.astype(np.uint32) << 16  # float32 that was bfloat16
    assert len(make("lossless").encode(wide, "float32")[0]) < len(make("lossless").encode(narrow, "bfloat16")[0]) + 64


def test_lossless_records_are_the_same_everywhere() -> None:
    """Nothing rounds; another digest is another format."""
    bits = (np.arange(2 * 40 * 48, dtype=np.uint32) ** 2 % 1009 + 0x3F00).astype(np.uint16).reshape(1, 2, 40, 48)
    record = make("lossless").encode(bits, "bfloat16")[0]
    assert hashlib.sha256(record).hexdigest() == "f0fe41409dbcf1fac7f09ff2d618bf849652278b7f0495d7736b8cb2ede45c04"


# scalar


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scalar_refuses_what_is_not_finite_and_says_where(value: float) -> None:
    values = np.zeros((2, 2, 10, 64), np.float32)
    values[1, VALUE, 3, 5] = value
    with pytest.raises(InputError, match="V of layer 1 in the unit, token 3, channel 5"):
        make("scalar").encode(to_bits(values, "float32"), "float32")


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3e-42, 65504.0, 9e37])
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS - 1, FEW_TOKENS, 128])
def test_scalar_keeps_constants(value: float, tokens: int) -> None:
    bits = to_bits(np.full((1, 2, tokens, 64), value, np.float32), "float32")
    contract = TestScalar()
    records = make("scalar").encode(bits, "float32")
    assert len(records[0]) + len(records[1]) < 0.4 * bits.nbytes + 256
    for tiers in (1, 2):
        contract.check(bits, "float32", contract.decoded(records[:tiers], bits), tiers)


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
@pytest.mark.parametrize("kind", [KEY, VALUE])
def test_scalar_survives_outliers_at_the_price_of_escapes(scale: float, kind: int) -> None:
    """One token out of scale (an attention sink) or single values: the others keep their step, unless 24 bits do not reach."""
    values = to_values(sample((1, 2, 128, 128), "float32"), "float32").copy()
    plain = make("scalar").encode(to_bits(values, "float32"), "float32")
    values[0, kind, 0, 3:20] *= scale
    values[0, kind, 77, 64] = -scale
    bits = to_bits(values, "float32")
    records, contract = make("scalar").encode(bits, "float32"), TestScalar()
    for tiers in (1, 2):
        contract.check(bits, "float32", contract.decoded(records[:tiers], bits), tiers)
    assert len(records[0]) < len(plain[0]) + 400
    if scale < 1e6:
        assert steps_of(records[0], bits.shape)[0, kind] <= 1.05 * steps_of(plain[0], bits.shape)[0, kind]


@pytest.mark.parametrize(("head_dim", "group"), [(16, 64), (64, 64), (80, 80), (96, 96), (128, 64), (256, 64), (576, 64), (1, 64)])
def test_scalar_groups_stay_within_a_head_where_that_is_possible(head_dim: int, group: int) -> None:
    assert default_params("scalar", head_dim=head_dim)[1]["value_group"] == group


@pytest.mark.parametrize("change", [{"key_step": 0}, {"value_group": 7}, {"value_step": "540"}, {"key_step": 1.5}])
def test_scalar_refuses_parameters_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=next(iter(change))):
        get_codec("scalar", 1, {**default_params("scalar", head_dim=64)[1], **change})


@relaxed
@given(key=st.integers(50, 3000), value=st.integers(50, 3000), group=st.integers(8, 200), seed=st.integers(0, 5))
def test_scalar_bounds_hold_for_all_parameters(key: int, value: int, group: int, seed: int) -> None:
    codec = get_codec("scalar", 1, {"key_step": key, "value_step": value, "value_group": group})
    bits = sample((1, 2, 33, 50), "float32", seed)
    records, contract = codec.encode(bits, "float32"), TestScalar()
    contract.codec = lambda: codec  # type: ignore[method-assign]
    for tiers in (1, 2):
        contract.check(bits, "float32", contract.decoded(records[:tiers], bits), tiers)


def test_scalar_rate_is_near_the_entropy_of_gaussian_groups() -> None:
    """h(X) - log2(step / deviation) is 3.20 bits a key, 2.88 a value; the rest is side information and models that do not quite fit."""
    values = np.random.default_rng(0).normal(size=(1, 2, 128, 1024)).astype(np.float32)
    base, fine = make("scalar").encode(to_bits(values, "float32"), "float32")
    assert 8 * (len(base) + len(fine)) / values.size < 3.15
    assert 8 * len(base) / values.size < 1.62


def test_scalar_symbols_are_the_same_everywhere() -> None:
    """With the step given, all but one multiplication is in integers; another digest is another format."""
    from kvstore.codecs import scalar_planes
    from kvstore.codecs.base import Header

    codec, typical = ScalarCodec(default_params("scalar", head_dim=64)[1]), np.ones(40, np.bool_)
    numbers = (np.arange(40 * 96, dtype=np.uint32) * np.uint32(2654435761) >> 12).astype(np.float32) / 2**17 - 4
    values = (numbers**3).reshape(40, 96).astype(np.float32)
    planes = [scalar_planes.encode(values, codec.plane(kind, 40, 96), np.float32(0.75), typical) for kind in (KEY, VALUE)]
    records = scalar_planes.assemble(Header(40, 1, 0, 96), planes)
    assert [hashlib.sha256(record).hexdigest()[:16] for record in records] == ["70d551d4ab151572", "63352a7f81648202"]
    out = np.zeros((1, 2, 40, 96), np.float32)
    codec.decode(records, out)
    np.testing.assert_array_equal(out[0, VALUE], np.rint(values.astype(np.float64) / 0.75).astype(np.float32) * np.float32(0.75))


def test_scalar_refinement_needs_its_own_base() -> None:
    ours, theirs = (make("scalar").encode(sample((1, 2, 128, 64), "bfloat16", seed), "bfloat16") for seed in (0, 1))
    with pytest.raises(IntegrityError):
        make("scalar").decode([ours[0], theirs[1]], np.zeros((1, 2, 128, 64), np.float32))
    with pytest.raises(IntegrityError):
        make("scalar").decode([ours[1]], np.zeros((1, 2, 128, 64), np.float32))


# compiled code


ROUND_TRIP = """
import numpy as np
from kvstore.codecs import default_params, get_codec
codec = get_codec("lossless", *default_params("lossless", head_dim=64))
bits = (np.arange(2 * 64 * 64, dtype=np.uint32) % 977).astype(np.uint16).reshape(1, 2, 64, 64) + np.uint16(0x3F00)
out = np.zeros_like(bits)
codec.decode(codec.encode(bits, "bfloat16"), out)
assert (out == bits).all()
"""
DENY = """
import tempfile
from numba.core import caching
class Denied:
    def __getattr__(self, name):
        return getattr(tempfile, name)
    def TemporaryFile(self, *args, dir=None, **options):
        if {condition}:
            raise PermissionError("read-only")
        return tempfile.TemporaryFile(*args, dir=dir, **options)
caching.tempfile = Denied()
"""


def run(code: str, home: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"XDG_CACHE_HOME": str(home), "HOME": str(home)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_compiled_code_goes_to_the_user_where_the_package_is_read_only(tmp_path: Path) -> None:
    run(DENY.format(condition="'kvstore/codecs' in str(dir)") + ROUND_TRIP, tmp_path)
    assert list(tmp_path.rglob("*.nbi"))


def test_works_where_no_folder_is_writable(tmp_path: Path) -> None:
    run(DENY.format(condition="True") + ROUND_TRIP, tmp_path)
    assert not list(tmp_path.rglob("*.nbi"))


def test_without_numba_only_the_coded_codecs_fail_and_say_why() -> None:
    code = """
import sys
sys.modules["numba"] = None
import numpy as np, pytest
from kvstore.codecs import get_codec
from kvstore.errors import ResourceError
bits = np.zeros((1, 2, 9, 64), np.uint16)
get_codec("raw", 1, {}).encode(bits, "bfloat16")
with pytest.raises(ResourceError, match="pip install numba"):
    get_codec("lossless", 1, {}).encode(bits, "bfloat16")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Path) -> None:
    """The same tests, damaged records among them, with every index checked."""
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    here = Path(__file__).parent
    chosen = "damage or round_trip or shapes or decode or nest or sums_of_rows"
    files = [*(str(here / f"test_{name}.py") for name in ("ans", "cachegen", "transform_codec")), __file__]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "--deselect"]
    command += [f"{__file__}::test_no_kernel_reads_or_writes_out_of_bounds", *files]
    subprocess.run(command, check=True, env=environment, cwd=here.parent)
