"""Lets plain zarr decode a pack's stand-alone tiers: the codec `kvstore.unit` of Zarr v3 (entry point group `zarr.codecs`)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayBytesCodec

from kvstore.calibration import registry
from kvstore.codecs import get_codec
from kvstore.codecs.base import BITS, Codec, damaged, read_header
from kvstore.errors import FormatError, InputError

if TYPE_CHECKING:
    from typing import Self

    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

    from kvstore.calibration.record import Calibration

NAME = "kvstore.unit"
PADDING = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}  # NaN, as bits
FIELDS = {"codec", "version", "params", "level", "dtype", "calibration"}


@dataclass(frozen=True)
class UnitCodec(ArrayBytesCodec):
    """One chunk [layers, 2, tokens, channels] from one record; what the record does not hold is NaN.

    Lossy codecs give float32; exact ones the bit patterns of `dtype` as uint16 or uint32. Reading only: packs are immutable.
    """

    codec: str
    version: int
    params: tuple[tuple[str, int | str], ...]
    level: int
    dtype: str
    calibration: str | None = None

    is_fixed_size = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Raises FormatError for a configuration of another version of kvstore."""
        configuration = dict(data.get("configuration") or {})
        missing = FIELDS - {"calibration"} - set(configuration)
        if data.get("name") != NAME or missing or set(configuration) - FIELDS:
            raise FormatError(
                f"codec {data.get('name')!r} with {sorted(configuration)}, expected {NAME} with {sorted(FIELDS)}", remedy="upgrade kvstore"
            )
        if configuration["dtype"] not in BITS:
            raise FormatError(f"unknown value dtype {configuration['dtype']!r}", remedy="upgrade kvstore")
        params = tuple(sorted(configuration.pop("params").items()))
        return cls(params=params, **configuration)

    def to_dict(self) -> dict[str, Any]:
        configuration = {"codec": self.codec, "version": self.version, "params": dict(self.params), "calibration": self.calibration,
                         "level": self.level, "dtype": self.dtype}  # fmt: skip
        return {"name": NAME, "configuration": configuration}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> Self:
        return self

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("records have no fixed size")

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        record = np.ascontiguousarray(chunk_bytes.as_numpy_array()).data
        chunk = self.decode_record(record, chunk_spec.shape, chunk_spec.dtype.to_native_dtype())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(chunk)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        raise InputError("packs are immutable", remedy="write them with kvstore.build")

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        return self._encode_sync(chunk_array, chunk_spec)

    def decode_record(self, record: memoryview, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A chunk of `shape`. Raises FormatError for a refinement or a foreign dtype, IntegrityError for damage."""
        codec = self._codec(shape, dtype)
        header = read_header(record)
        if len(shape) != 4 or any(have > room for have, room in zip(header.shape, shape, strict=True)):
            raise damaged(f"a record of shape {header.shape} in a chunk of shape {shape}")
        chunk = np.full(shape, PADDING[self.dtype] if codec.exact else np.nan, dtype.newbyteorder("="))
        codec.decode([record], chunk[: header.layers, :, : header.tokens])
        return chunk

    def _codec(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Codec:
        if self.level != 0:
            raise FormatError(f"tier {self.level} of codec {self.codec} refines the tiers below it, zarr sees one array at a time",
                              remedy="read it through kvstore: store.as_zarr(tier)")  # fmt: skip
        codec = get_codec(self.codec, self.version, dict(self.params), self._calibration(shape))
        expected = BITS[self.dtype] if codec.exact else np.dtype(np.float32)
        if dtype.newbyteorder("=") != expected:
            raise FormatError(f"codec {self.codec} of {self.dtype} decodes to {expected}, the array is {dtype}")
        return codec

    def _calibration(self, shape: tuple[int, ...]) -> Calibration | None:
        """Where kvstore has opened the store in this process, or KVSTORE_CALIBRATIONS says. Raises FormatError where it is not, or is for others."""
        if self.calibration is None:
            return None
        found = registry.find(self.calibration)
        expected = (found.record.group_layers, 2, found.record.kv_heads * found.record.head_dim)
        if len(shape) != 4 or (shape[0], shape[1], shape[3]) != expected:
            raise FormatError(f"calibration {found.digest[:12]} is for {expected} layers, kinds and channels, the chunks are {shape}")
        return found
