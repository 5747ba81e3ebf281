"""Plain zarr reads a hand-made sharded array through the codec `kvstore.unit`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import zarr

from kvstore.codecs import default_params, get_codec
from kvstore.codecs.zarr_adapter import NAME, PADDING, UnitCodec
from kvstore.errors import FormatError, InputError, IntegrityError
from tests.contracts.codec import UNSIGNED, sample

Array = npt.NDArray[Any]
LAYERS, GROUP, BLOCK, CHANNELS = 3, 2, 16, 48
TOKENS = [16, 5]  # of the blocks; the slots are whole blocks
EMPTY = 2**64 - 1


def crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def records_of(codec_name: str, dtype: str, level: int) -> dict[tuple[int, int], tuple[bytes, Array]]:
    """(layer group, block) -> record and bits; the last group has one layer only."""
    codec = get_codec(codec_name, *default_params(codec_name, head_dim=16))
    made = {}
    for group in range(2):
        for block, tokens in enumerate(TOKENS):
            bits = sample((min(GROUP, LAYERS - GROUP * group), 2, tokens, CHANNELS), dtype, 10 * group + block)
            made[group, block] = (codec.encode(bits, dtype)[level], bits)
    return made


def shard_of(records: dict[tuple[int, int], tuple[bytes, Array]], blocks: int) -> bytes:
    """Units with their crc32c, then the index [group, 1, block, 1] with its own; blocks beyond the records are empty."""
    body, index = b"", []
    for group in range(2):
        for block in range(blocks):
            if (group, block) not in records:
                index += [EMPTY, EMPTY]
                continue
            unit = records[group, block][0] + crc(records[group, block][0])
            index += [len(body), len(unit)]
            body += unit
    packed = np.array(index, "<u8").tobytes()
    return body + packed + crc(packed)


def write(
    folder: Path, codec_name: str, dtype: str, level: int = 0, changes: dict[str, Any] | None = None
) -> dict[tuple[int, int], tuple[bytes, Array]]:
    """An array of two groups and three blocks, the last of them empty, in one shard."""
    records = records_of(codec_name, dtype, level)
    version, params = default_params(codec_name, head_dim=16)
    exact = codec_name != "scalar"
    unit = {"codec": codec_name, "version": version, "params": params, "level": level, "dtype": dtype} | (changes or {})
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"chunk_shape": [GROUP, 2, BLOCK, CHANNELS], "codecs": [{"name": NAME, "configuration": unit}, {"name": "crc32c"}],
                "index_codecs": [endian, {"name": "crc32c"}], "index_location": "end"}  # fmt: skip
    document = {"zarr_format": 3, "node_type": "array", "shape": [LAYERS, 2, 3 * BLOCK, CHANNELS],
                "data_type": np.dtype(UNSIGNED[dtype]).name if exact else "float32", "fill_value": PADDING[dtype] if exact else "NaN",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 2, 3 * BLOCK, CHANNELS]}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}], "attributes": {}}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "zarr.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "c.0.0.0.0").write_bytes(shard_of(records, 3))
    return records


def expected(codec_name: str, dtype: str, records: dict[tuple[int, int], tuple[bytes, Array]]) -> Array:
    codec = get_codec(codec_name, *default_params(codec_name, head_dim=16))
    kind, padding = (UNSIGNED[dtype], PADDING[dtype]) if codec.exact else (np.float32, np.nan)
    whole = np.full((4, 2, 3 * BLOCK, CHANNELS), padding, kind)
    for (group, block), (record, bits) in records.items():
        layers, _, tokens, _ = bits.shape
        codec.decode([record], whole[GROUP * group : GROUP * group + layers, :, BLOCK * block : BLOCK * block + tokens])
    return whole[:LAYERS]


def test_the_entry_point_names_the_codec() -> None:
    (found,) = entry_points(group="zarr.codecs", name=NAME)
    assert found.load() is UnitCodec


@pytest.mark.parametrize("dtype", sorted(UNSIGNED))
@pytest.mark.parametrize("codec_name", ["raw", "lossless", "scalar"])
def test_zarr_decodes_chunks_and_pads_with_nan(tmp_path: Path, codec_name: str, dtype: str) -> None:
    records = write(tmp_path / "t0", codec_name, dtype)
    array = zarr.open_array(str(tmp_path / "t0"), mode="r")
    want = expected(codec_name, dtype, records)
    np.testing.assert_array_equal(array[...], want)
    np.testing.assert_array_equal(array[2, 1, 14:20, 7:9], want[2, 1, 14:20, 7:9])


@pytest.mark.parametrize(("dtype", "kind"), [("float16", np.float16), ("float32", np.float32)])
def test_padding_patterns_are_nan(dtype: str, kind: type) -> None:
    assert np.isnan(np.array([PADDING[dtype]], UNSIGNED[dtype]).view(kind)).all()
    assert np.isnan(np.array([PADDING["bfloat16"] << 16], np.uint32).view(np.float32)).all()


def test_a_refinement_points_to_as_zarr(tmp_path: Path) -> None:
    write(tmp_path / "t1", "scalar", "bfloat16", level=1)
    with pytest.raises(FormatError, match="as_zarr"):
        zarr.open_array(str(tmp_path / "t1"), mode="r")[...]


@pytest.mark.parametrize(
    "changes", [{"codec": "zfp"}, {"version": 7}, {"params": {"x": 1}}, {"dtype": "float64"}, {"extra": 1}, {"calibration": "ab"}]
)
def test_configurations_of_other_versions_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path / "t0", "lossless", "bfloat16", changes=changes)
    with pytest.raises(FormatError):
        zarr.open_array(str(tmp_path / "t0"), mode="r")[...]


def test_a_dtype_that_the_codec_does_not_give_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t0", "lossless", "bfloat16")
    path = tmp_path / "t0" / "zarr.json"
    document = json.loads(path.read_text(encoding="utf-8")) | {"data_type": "float32", "fill_value": "NaN"}
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(FormatError, match="uint16"):
        zarr.open_array(str(tmp_path / "t0"), mode="r")[...]


def test_records_larger_than_their_chunk_are_damage() -> None:
    params = tuple(default_params("raw", head_dim=16)[1].items())
    codec, (record,) = UnitCodec("raw", 1, params, 0, "bfloat16"), get_codec("raw", 1, {}).encode(sample((1, 2, 9, 4), "bfloat16"), "bfloat16")
    for shape in [(1, 2, 8, 4), (1, 2, 9, 5), (1, 2, 9, 3), (9, 4)]:
        with pytest.raises(IntegrityError):
            codec.decode_record(memoryview(record), shape, np.dtype(np.uint16))


def test_configuration_round_trips_and_writing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "t0", "scalar", "float16")
    configuration = json.loads((tmp_path / "t0" / "zarr.json").read_text(encoding="utf-8"))["codecs"][0]["configuration"]["codecs"][0]
    codec = UnitCodec.from_dict(configuration)
    assert UnitCodec.from_dict(codec.to_dict()) == codec and hash(codec) == hash(UnitCodec.from_dict(codec.to_dict()))
    with pytest.raises(InputError):
        zarr.open_array(str(tmp_path / "t0"), mode="r+")[...] = 0


def test_the_event_loop_is_not_what_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loop's own thread chunks would decode one after another."""
    write(tmp_path / "t0", "raw", "bfloat16")
    plain = UnitCodec.decode_record
    seen: set[str] = set()

    def watched(self: UnitCodec, *args: Any) -> Array:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            seen.add(threading.current_thread().name)
        return plain(self, *args)

    monkeypatch.setattr(UnitCodec, "decode_record", watched)
    zarr.open_array(str(tmp_path / "t0"), mode="r")[...]
    assert not seen
