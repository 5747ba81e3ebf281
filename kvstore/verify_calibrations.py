"""Checks of a store's calibrations and of the links that say which is current. Each yields (where, what, severity) and never stops at the first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from kvstore.calibration import shelf
from kvstore.calibration.checks import fit_problem
from kvstore.calibration.files import problems
from kvstore.calibration.record import CalibrationRecord
from kvstore.errors import KvstoreError
from kvstore.pack import Pack
from kvstore.storage.local import LocalStorage

Severity = Literal["error", "notice"]
Finding = tuple[str, str, Severity]
Known = Mapping[str, CalibrationRecord]


def calibration_findings(storage: LocalStorage, digest: str) -> Iterator[Finding]:
    """Of one folder: names, digests, the record, the values of the arrays, foreign files."""
    where = f"{shelf.CALIBRATIONS}/{digest}"
    if not re.fullmatch("[0-9a-f]{64}", digest):
        yield where, "is not a calibration", "notice"
        return
    for problem in problems(storage.path(where), digest):
        yield where, problem, "error"


def link_findings(storage: LocalStorage, known: Known) -> Iterator[Finding]:
    """Of all models' links: the newest must name an intact calibration of its model; what earlier ones name may be collected."""
    models = shelf.models(storage)
    yield from ((f"{shelf.CURRENT}/{n}", "is not a model's folder of links", "notice") for n in storage.names(shelf.CURRENT) if n not in models)
    for model in models:
        names = [f"{n:06}.json" for n in shelf.numbers(storage, model)]
        foreign = sorted(set(storage.names(f"{shelf.CURRENT}/{model}")) - set(names))
        yield from ((f"{shelf.CURRENT}/{model}/{n}", "is not a link to a calibration", "notice") for n in foreign)
        yield from _chain(storage, model, known)


def _chain(storage: LocalStorage, model: str, known: Known) -> Iterator[Finding]:
    numbers, before = shelf.numbers(storage, model), None
    for number in numbers:
        where = shelf.link_name(model, number)
        try:
            link = shelf.read_link(storage, model, number)
        except KvstoreError as error:
            yield where, error.message, "error"
            before = None
            continue
        if before is not None and link.previous != before:
            yield where, "does not follow from the link before it", "error"
        before = link.calibration
        if link.calibration not in known:
            newest = number == numbers[-1]
            lacks = "is missing or damaged" if newest else "is no longer stored; a later one has taken its place"
            yield where, f"its calibration {link.calibration[:12]} {lacks}", "error" if newest else "notice"
        elif known[link.calibration].model != model:
            yield where, f"its calibration {link.calibration[:12]} is for another model", "error"


def pack_findings(pack: Pack, known: Known) -> Iterator[str]:
    """Whether the calibrations that a pack names are there, for its model, and fit."""
    for spec in pack.encoding.codecs:
        if spec.calibration is None:
            continue
        if (record := known.get(spec.calibration)) is None:
            yield f"its calibration {spec.calibration[:12]} is missing or damaged"
        elif record.model != pack.manifest.model:
            yield f"its calibration {spec.calibration[:12]} is for another model"
        elif (problem := fit_problem(record, spec, pack.encoding, pack.layout)) is not None:
            yield f"its calibration {spec.calibration[:12]} {problem}"
