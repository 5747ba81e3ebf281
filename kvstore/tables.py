"""Corpora in one file, one document a row: JSON Lines and Parquet. Columns `id` and `text`; all others are metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kvstore.errors import InputError, StorageError
from kvstore.sources import Document, Found, Skipped, document_or_skipped, is_unicode, text_name

Numbered = Iterator[tuple[int, Any]]
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")


def is_table(path: Path) -> bool:
    return path.suffix.lower() in JSON_LINES + PARQUET


def read_table(path: Path, source: str, root: str) -> Found:
    """Rows of a table file as documents called `source/id`. Raises InputError where pyarrow is needed and missing."""
    rows = _json_lines(path) if path.suffix.lower() in JSON_LINES else _parquet(path)
    for number, row in rows:
        yield _document(row, number, source, root)


def _document(row: Any, number: int, source: str, root: str) -> Document | Skipped:
    """A row without an id is called after its text, so that its name survives rows added before it."""
    here = f"{source}:{number}"
    if not isinstance(row, Mapping):
        return Skipped(here, "not a JSON object", root)
    text, name = row.get("text"), row.get("id")
    if not isinstance(text, str):
        return Skipped(here, "no field 'text' with a string", root)
    if name is None and is_unicode(text):
        name = text_name(text)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        return Skipped(here, "the field 'id' is neither a string nor an integer", root)
    return document_or_skipped(text, f"{source}/{name}", {k: v for k, v in row.items() if k not in ("id", "text")}, root)


def _json_lines(path: Path) -> Numbered:
    """Split at `\\n` bytes only: str.splitlines would cut at U+2028 inside strings."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _parquet(path: Path) -> Numbered:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path}: reading Parquet needs pyarrow", remedy="pip install pyarrow, or convert it to JSONL") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})", remedy="write it again, or leave it out") from error
    except OSError as error:
        raise StorageError(f"{path}: {error}", remedy="check the disk and the permissions") from error
