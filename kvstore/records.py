"""What a store holds beside packs: its own record, models with their probes, templates. Torch-free."""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.arrays import probe_metadata
from kvstore.calibration.shelf import CALIBRATIONS
from kvstore.digest import sha256
from kvstore.errors import InputError, IntegrityError
from kvstore.manifest import FORMAT, ModelRecord, StoreRecord, TemplateRecord, parse, parse_group, zarr_group
from kvstore.pack import PACKS
from kvstore.storage.files import make_folder, sync_folder, translated, write_synced
from kvstore.storage.local import LocalStorage

MODELS = "models"
TEMPLATES = ".kvstore/templates"


def create(path: str | Path) -> None:
    """Make an empty store, unless there is one. Of two makers at once, one wins and both succeed."""
    root = Path(path)
    storage = LocalStorage(root)
    if storage.exists("zarr.json"):
        return
    with translated(str(root)):
        make_folder(root)
        foreign = [p.name for p in root.iterdir() if p.name not in (PACKS, CALIBRATIONS, MODELS, ".kvstore", "zarr.json")]
        if foreign:
            raise InputError(f"{root} is not empty and not a store (found {foreign[0]})", remedy="name a new folder with --store")
    for folder in (PACKS, CALIBRATIONS, MODELS):
        storage.create(f"{folder}/zarr.json", zarr_group())
    storage.create("zarr.json", zarr_group(StoreRecord(FORMAT, "store", uuid.uuid4().hex)))


def add_model(storage: LocalStorage, record: ModelRecord, probe: npt.NDArray[np.float32]) -> None:
    """Keep what a model is and what its probe was; the first writer wins."""
    if storage.exists(f"{MODELS}/{record.model.key}/zarr.json"):
        return
    data = probe.astype("<f4").tobytes()
    record = msgspec.structs.replace(record, probe_sha256=sha256(data))
    record = msgspec.structs.replace(record, digest=record.own_digest())
    with translated(f"{MODELS}/{record.model.key}"):
        staged = storage.stage()
        (staged / "probe").mkdir()
        write_synced(staged / "probe" / "zarr.json", probe_metadata(list(probe.shape)))
        write_synced(staged / "probe" / "c.0.0.0.0", data)
        sync_folder(staged / "probe")
        write_synced(staged / "zarr.json", zarr_group(record))
        sync_folder(staged)
        storage.publish(staged, f"{MODELS}/{record.model.key}")


def read_model(storage: LocalStorage, key: str) -> ModelRecord:
    """One model record, compared with its digest and its name. Raises NotFoundError, IntegrityError."""
    name = f"{MODELS}/{key}/zarr.json"
    record = parse_group(storage.read(name), ModelRecord, name)
    if record.digest != record.own_digest() or record.model.key != key:
        raise IntegrityError(f"{name} does not match its digest", remedy=f"remove {MODELS}/{key}: the next build writes it again")
    return record


def read_probe(storage: LocalStorage, record: ModelRecord) -> bytes:
    """The probe's sketch, float32 little-endian, compared with its digest. Raises NotFoundError, IntegrityError."""
    folder = f"{MODELS}/{record.model.key}"
    data = storage.read(f"{folder}/probe/c.0.0.0.0")
    if sha256(data) != record.probe_sha256:
        raise IntegrityError(f"{folder}/probe does not match its digest", remedy=f"remove {folder}: the next build writes it again")
    return data


def read_template(storage: LocalStorage, id: str) -> TemplateRecord:
    """One template, compared with its name. Raises NotFoundError, IntegrityError."""
    name = f"{TEMPLATES}/{id}.json"
    record = parse(storage.read(name), TemplateRecord, name)
    if record.id != id:
        raise IntegrityError(f"{name} does not match its name", remedy="remove it: the next build writes it again")
    return record


def add_template(storage: LocalStorage, record: TemplateRecord) -> None:
    storage.create(f"{TEMPLATES}/{record.id}.json", msgspec.json.encode(record, order="deterministic"))
