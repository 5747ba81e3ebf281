"""Quality reports as verify and gc see them. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from kvstore.certificates import FOLDER, read_report
from kvstore.errors import KvstoreError, NotFoundError
from kvstore.pack import PACKS, Pack
from kvstore.storage.local import LocalStorage
from kvstore.verify_calibrations import Finding

_ENCODING, _FILE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9]{6}\.json")


def report_findings(storage: LocalStorage) -> Iterator[Finding]:
    """(where, what, severity) of every file that is no intact report of the encoding that its folder names."""
    for encoding in storage.names(FOLDER):
        if not _ENCODING.fullmatch(encoding):
            yield f"{FOLDER}/{encoding}", "names no encoding", "notice"
            continue
        for name in storage.names(f"{FOLDER}/{encoding}"):
            where = f"{FOLDER}/{encoding}/{name}"
            if not _FILE.fullmatch(name):
                yield where, "is not a quality report", "notice"
                continue
            try:
                read_report(storage, where)
            except NotFoundError:  # collected meanwhile
                continue
            except KvstoreError as error:
                yield where, error.message, "error"


def unneeded_reports(storage: LocalStorage, gone: Collection[str]) -> list[str]:
    """Folders of reports whose encoding no pack has, those `gone` left out. Nothing where a pack cannot be read: it may have any encoding."""
    needed = set()
    for name in set(storage.names(PACKS)) - set(gone):
        try:
            needed.add(Pack(storage, name).manifest.encoding_id)
        except NotFoundError:
            continue
        except KvstoreError:
            return []
    return [f"{FOLDER}/{encoding}" for encoding in storage.names(FOLDER) if encoding not in needed]
