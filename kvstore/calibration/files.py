"""A calibration as a Zarr group: one uncompressed chunk an array, so that it is mapped, not read. The sha256 of its zarr.json is its name."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.calibration.checks import REMEDY, VALUES, group_count, group_dims, require_arrays, require_record
from kvstore.calibration.record import CLASSES, Calibration, CalibrationRecord
from kvstore.digest import sha256
from kvstore.errors import FormatError, IntegrityError, KvstoreError, NotFoundError
from kvstore.manifest import FileDigest, parse_group, zarr_group
from kvstore.storage.files import sync_folder, translated, write_synced
from kvstore.transforms.klt import Basis
from kvstore.zarr_json import LITTLE, array_metadata

Array = npt.NDArray[Any]
_TYPES = {"<f4": "float32", "<f2": "float16", "<u2": "uint16", "|u1": "uint8"}


class ArrayPlan(NamedTuple):
    """What one array of a calibration is; `names` are those of its dimensions."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        size = np.dtype(self.dtype).itemsize
        for length in self.shape:  # Python's integers: a record may claim any size
            size *= length
        return size

    @property
    def chunk(self) -> str:
        """The file name of the only chunk."""
        return ".".join(["c", *"0" * len(self.shape)])

    def metadata(self) -> bytes:
        shape, kind = list(self.shape), np.dtype(self.dtype).kind
        codec = LITTLE if np.dtype(self.dtype).itemsize > 1 else {"name": "bytes"}
        return array_metadata(_TYPES[self.dtype], shape, shape, "NaN" if kind == "f" else 0, list(self.names), [codec])


def plan(record: CalibrationRecord) -> dict[str, ArrayPlan]:
    """Every array of a calibration, by path."""
    layers, channels = record.layers, record.kv_heads * record.head_dim
    arrays = {
        "mean": ArrayPlan("<f4", (layers, 2, channels), ("layer", "kv", "channel")),
        "metric": ArrayPlan("<f2", (layers, 2, channels, channels), ("layer", "kv", "row", "channel")),
        "metric_scale": ArrayPlan("<f4", (layers, 2), ("layer", "kv")),
        "weights": ArrayPlan("<u2", (CLASSES, VALUES), ("class", "magnitude")),
        "thirds": ArrayPlan("<u2", (CLASSES, 3), ("class", "third")),
    }
    for g, (rank, dim) in enumerate(zip(record.ranks, group_dims(record), strict=True)):
        arrays[f"g{g}/rows"] = ArrayPlan("<f2", (rank, dim), ("coefficient", "value"))
        arrays[f"g{g}/scale"] = ArrayPlan("<f4", (rank,), ("coefficient",))
        arrays[f"g{g}/classes"] = ArrayPlan("|u1", (rank,), ("coefficient",))
    return arrays


def metadata_files(record: CalibrationRecord) -> dict[str, bytes]:
    """Every zarr.json below a calibration's own, by path."""
    arrays = {f"{path}/zarr.json": array.metadata() for path, array in plan(record).items()}
    return {f"g{g}/zarr.json": zarr_group() for g in range(group_count(record))} | arrays


def chunk_files(record: CalibrationRecord) -> dict[str, ArrayPlan]:
    """Every chunk, by path, and what it holds."""
    return {f"{path}/{array.chunk}": array for path, array in plan(record).items()}


def seal(calibration: Calibration) -> Calibration:
    """The same with `record.files` and `digest` filled in. Raises FormatError, IntegrityError for what no reader would take."""
    return _sealed(calibration)[0]


def write(folder: Path, calibration: Calibration) -> str:
    """The files of a calibration into an empty folder (LocalStorage.stage), on the disk when this returns. Its digest.

    Equal calibrations give equal bytes. Raises FormatError, IntegrityError for what no reader would take, StorageError.
    """
    sealed, contents = _sealed(calibration)
    with translated(str(folder)):
        for name, data in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_synced(folder / name, data)
        for child in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            sync_folder(child)
        write_synced(folder / "zarr.json", zarr_group(sealed.record))
        sync_folder(folder)
    return sealed.digest


def _sealed(calibration: Calibration) -> tuple[Calibration, dict[str, bytes | memoryview]]:
    require_record(calibration.record, "calibration")
    contents = _contents(calibration)
    require_arrays(calibration, "calibration")
    files = {name: FileDigest(len(data), sha256(data)) for name, data in sorted(contents.items())}
    record = msgspec.structs.replace(calibration.record, files=files)
    name = sha256(zarr_group(record))
    return Calibration(name, record, calibration.bases, calibration.classes, calibration.weights, calibration.thirds), contents


def _contents(calibration: Calibration) -> dict[str, bytes | memoryview]:
    """Every file but the group's own zarr.json."""
    bases = calibration.bases
    arrays: dict[str, Array] = {
        "mean": np.concatenate([b.mean for b in bases]),
        "metric": np.concatenate([b.metric for b in bases]),
        "metric_scale": np.concatenate([b.metric_scale for b in bases]),
        "weights": calibration.weights,
        "thirds": calibration.thirds,
    }
    for g, (basis, classes) in enumerate(zip(bases, calibration.classes, strict=True)):
        arrays |= {f"g{g}/rows": basis.rows, f"g{g}/scale": basis.scale, f"g{g}/classes": classes}
    expected = plan(calibration.record)
    if arrays.keys() != expected.keys():
        raise FormatError(f"calibration: arrays of other groups than its record says ({min(arrays.keys() ^ expected.keys())})")
    chunks = {f"{path}/{array.chunk}": _bytes_of(path, arrays[path], array) for path, array in expected.items()}
    return {**metadata_files(calibration.record), **chunks}


def _bytes_of(path: str, values: Array, array: ArrayPlan) -> memoryview:
    size = array.nbytes // np.dtype(array.dtype).itemsize
    if values.dtype != np.dtype(array.dtype).newbyteorder("=") or values.size != size:
        raise FormatError(f"calibration: {path} is {values.dtype} of {values.size} values, its record says {array.dtype} {array.shape}")
    return np.ascontiguousarray(values, array.dtype).reshape(-1).view(np.uint8).data


def read_record(folder: Path, digest: str) -> CalibrationRecord:
    """The record of `folder`, compared with its digest and checked. Raises NotFoundError, IntegrityError, FormatError."""
    where = folder / "zarr.json"
    data = bytes(_map(where))
    if sha256(data) != digest:
        raise IntegrityError(f"{where} does not match its name", remedy=REMEDY)
    record = parse_group(data, CalibrationRecord, str(where))
    require_record(record, str(where))
    _require_files(record, str(where))
    return record


def _require_files(record: CalibrationRecord, where: str) -> None:
    """The files listed are those that follow from the record, with the sizes that follow from it."""
    sizes = {name: len(data) for name, data in metadata_files(record).items()} | {n: a.nbytes for n, a in chunk_files(record).items()}
    if record.files.keys() != sizes.keys():
        raise FormatError(f"{where}: files are not those of a calibration: {min(record.files.keys() ^ sizes.keys())!r}", remedy=REMEDY)
    for name, size in sizes.items():
        if record.files[name].bytes != size or record.files[name].sha256 is None:
            raise FormatError(f"{where}: the entry of {name} in files is not valid", remedy=REMEDY)


def read(folder: Path, digest: str) -> Calibration:
    """The calibration in `folder`, every file compared with its sha256, its arrays memory-mapped.

    Raises NotFoundError, IntegrityError for damage, FormatError for what this version does not know.
    """
    record = read_record(folder, digest)
    files = {name: _checked(folder, name, entry) for name, entry in record.files.items()}
    return _load(folder, digest, record, files)


def _load(folder: Path, digest: str, record: CalibrationRecord, files: Mapping[str, memoryview]) -> Calibration:
    for name, data in metadata_files(record).items():
        if files[name] != data:
            raise FormatError(f"{folder / name} does not follow from the record", remedy=REMEDY)
    calibration = _assemble(digest, record, {path: _array(files[f"{path}/{a.chunk}"], a) for path, a in plan(record).items()})
    require_arrays(calibration, str(folder))
    return calibration


def problems(folder: Path, digest: str) -> list[str]:
    """Everything that is wrong with a calibration, in words, file by file; files that are not its own included."""
    try:
        record = read_record(folder, digest)
    except KvstoreError as error:
        return [error.message]
    found = [] if (folder / "zarr.json").read_bytes() == zarr_group(record) else ["zarr.json is not as kvstore writes it"]
    files: dict[str, memoryview] = {}
    for name, entry in record.files.items():
        try:
            files[name] = _checked(folder, name, entry)
        except KvstoreError as error:
            found.append(error.message)
    if len(files) == len(record.files):
        try:
            _load(folder, digest, record, files)
        except KvstoreError as error:
            found.append(error.message)
    there = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if not p.is_dir())
    return found + [f"{name} does not belong to the calibration" for name in there if name not in record.files and name != "zarr.json"]


def _map(path: Path) -> memoryview:
    with translated(str(path)):
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFoundError(f"{path} does not exist") from error


def _checked(folder: Path, name: str, entry: FileDigest) -> memoryview:
    try:
        data = _map(folder / name)
    except NotFoundError as error:
        raise IntegrityError(f"{folder / name} is missing", remedy=REMEDY) from error
    if len(data) != entry.bytes:
        raise IntegrityError(f"{folder / name} has {len(data)} bytes instead of {entry.bytes}", remedy=REMEDY)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise IntegrityError(f"{folder / name} does not match its sha256", remedy=REMEDY)
    return data


def _array(data: memoryview, array: ArrayPlan) -> Array:
    return np.frombuffer(data, array.dtype).reshape(array.shape)


def _assemble(digest: str, record: CalibrationRecord, arrays: Mapping[str, Array]) -> Calibration:
    groups, size, channels = group_count(record), record.group_layers, record.kv_heads * record.head_dim
    bases = []
    for g in range(groups):
        layers = slice(g * size, (g + 1) * size)
        metric = arrays["metric"][layers].reshape(-1, channels, channels)
        mean, metric_scale = arrays["mean"][layers].reshape(-1), arrays["metric_scale"][layers].reshape(-1)
        bases.append(Basis(mean, arrays[f"g{g}/rows"], arrays[f"g{g}/scale"], metric, metric_scale))
    classes = tuple(arrays[f"g{g}/classes"] for g in range(groups))
    return Calibration(digest, record, tuple(bases), classes, arrays["weights"], arrays["thirds"])
