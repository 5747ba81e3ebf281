"""The calibrations of a store: immutable folders by digest, and per model the links that say which one new builds use."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from kvstore.calibration.files import read_record, write
from kvstore.calibration.record import Calibration, CalibrationRecord
from kvstore.errors import FormatError, IntegrityError, StorageError
from kvstore.manifest import FORMAT, Digest, Positive, Strict, parse
from kvstore.storage.local import LocalStorage

CALIBRATIONS = "calibrations"
CURRENT = ".kvstore/current"
_KEY = re.compile("[0-9a-f]{64}")
_LINK = re.compile(r"\d{6}\.json", re.ASCII)


class Current(Strict, frozen=True):
    """.kvstore/current/<model key>/<number>.json: from this number on, new builds of the model use `calibration`; before, `previous`."""

    format: int
    kind: Literal["current"]
    number: Positive
    model: Digest
    calibration: Digest
    previous: Digest | None = None


def list_calibrations(storage: LocalStorage) -> list[str]:
    """Digests, sorted. Their content is not looked at."""
    return [name for name in storage.names(CALIBRATIONS) if _KEY.fullmatch(name) and has(storage, name)]


def has(storage: LocalStorage, digest: str) -> bool:
    return storage.exists(f"{CALIBRATIONS}/{digest}/zarr.json")


def record_of(storage: LocalStorage, digest: str) -> CalibrationRecord:
    """The record alone, compared with its digest. Raises NotFoundError, IntegrityError, FormatError."""
    return read_record(storage.path(f"{CALIBRATIONS}/{digest}"), digest)


def publish(storage: LocalStorage, calibration: Calibration) -> str:
    """Store a calibration durably; its digest. One that is there already is compared byte for byte, and replaced where it is damaged.

    Raises StorageError; FormatError, IntegrityError for what no reader would take.
    """
    staged = storage.stage()
    try:
        digest = write(staged, calibration)
    except BaseException:
        storage.sweep(staged)
        raise
    storage.publish(staged, f"{CALIBRATIONS}/{digest}", mend=True)
    return digest


def models(storage: LocalStorage) -> list[str]:
    """Keys of the models that have links; other names do not count."""
    return [name for name in storage.names(CURRENT) if _KEY.fullmatch(name)]


def link_name(model: str, number: int) -> str:
    return f"{CURRENT}/{model}/{number:06}.json"


def numbers(storage: LocalStorage, model: str) -> list[int]:
    """Ascending numbers of a model's links; other names in their folder do not count."""
    return [int(name[:6]) for name in storage.names(f"{CURRENT}/{model}") if _LINK.fullmatch(name)]


def read_link(storage: LocalStorage, model: str, number: int) -> Current:
    """One link. Raises NotFoundError, IntegrityError, FormatError."""
    name = link_name(model, number)
    link = parse(storage.read(name), Current, name)
    if (link.model, link.number) != (model, number):
        raise IntegrityError(f"{name} says model {link.model[:12]}, number {link.number}", remedy="remove it: the one before then counts")
    return link


def current(storage: LocalStorage, model: str) -> str | None:
    """The calibration that new builds of a model use, as its newest link says; it may be gone or damaged. Raises IntegrityError, FormatError."""
    return _newest(storage, model)[1]


def _newest(storage: LocalStorage, model: str) -> tuple[int, str | None]:
    """Number and calibration of the newest link; 0 and None before the first."""
    known = numbers(storage, model)
    return (known[-1], read_link(storage, model, known[-1]).calibration) if known else (0, None)


def set_current(storage: LocalStorage, model: str, digest: str, *, replacing: str | None = None) -> str:
    """Make `digest` current, and say what is current afterwards: another one where somebody was faster.

    It takes the place of `replacing` (None: of none), and of one that is no longer stored. Raises StorageError where `digest` itself is not
    stored, FormatError where it was made for another model.
    """
    with storage.lock(exclusive=False):  # so that gc cannot remove it meanwhile
        _require_for(storage, model, digest)
        while True:
            number, now = _newest(storage, model)
            if now is not None and (now == digest or (now != replacing and has(storage, now))):
                return now
            link = Current(FORMAT, "current", number + 1, model, digest, now)
            if storage.create(link_name(model, link.number), msgspec.json.encode(link, order="deterministic")):
                return digest


def _require_for(storage: LocalStorage, model: str, digest: str) -> None:
    if not has(storage, digest):
        raise StorageError(f"calibration {digest} is not stored, or no longer", remedy="run the same command again", code="collected")
    if (theirs := record_of(storage, digest).model) != model:
        raise FormatError(f"calibration {digest[:12]} is for model {theirs[:12]}, not for {model[:12]}", remedy="calibrate this model")
