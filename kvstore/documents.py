"""Reading a corpus: folders, files and Python objects become documents, in the same order on every machine."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kvstore.errors import InputError, StorageError
from kvstore.objects import from_objects
from kvstore.sources import Document, Found, Skipped, checked, decoded, document_or_skipped, is_unicode, text_digest
from kvstore.tables import is_table, read_table

__all__ = ["INCLUDE", "Document", "Skipped", "from_objects", "read", "read_paths", "text_digest"]

INCLUDE = ("*.txt", "*.md", "*.markdown", "*.rst", "*.jsonl", "*.ndjson", "*.parquet")


def read(documents: Any, *, include: Sequence[str] | None = None, strict: bool = False) -> Found:
    """What `kvstore.build` accepts: one or several paths, or an iterable of documents, dicts, strings, retrieved nodes.

    Strings of a list are paths where one of them exists or looks like a path, else texts. Raises InputError as
    `read_paths` and `from_objects` do.
    """
    if isinstance(documents, (str, Path)):
        return read_paths([documents], include=include, strict=strict)
    if isinstance(documents, (Document, Mapping)) or hasattr(documents, "page_content"):
        return from_objects([documents], strict=strict)
    if not isinstance(documents, Iterable) or isinstance(documents, (bytes, bytearray)):
        raise InputError(
            f"{type(documents).__name__} holds no documents",
            remedy="pass a path, or an iterable of documents, dicts or strings",
        )
    if hasattr(documents, "columns"):  # iterating a data frame gives its column names
        raise InputError(f"{type(documents).__name__} is a table", remedy="pass its rows as dicts, such as frame.to_dict('records')")
    if isinstance(documents, (list, tuple)) and _are_paths(documents):
        return read_paths(documents, include=include, strict=strict)
    return from_objects(documents, strict=strict)


def roots_of(documents: Any) -> set[str]:
    """Absolute paths of the folders and files that `documents` names; none for objects. What left them leaves the snapshot."""
    given = [documents] if isinstance(documents, (str, Path)) else documents
    if not isinstance(given, (list, tuple)) or not (given is not documents or _are_paths(given)):
        return set()
    return {os.path.realpath(p) for p in given}


def read_paths(paths: Iterable[str | Path], *, include: Sequence[str] | None = None, strict: bool = False) -> Found:
    """Documents of folders (deep, sorted, hidden entries left out), text files, JSONL and Parquet files.

    `include` are shell patterns, matched without regard to case against file names, or against paths under the folder
    where they hold a slash; None means text, Markdown, reStructuredText, JSONL and Parquet. A file named directly is
    read whatever it is called. Undecodable, unreadable and empty documents come as Skipped. Raises InputError for an
    unknown path, for two documents with one source, for Parquet without pyarrow, and with `strict` for whatever is
    skipped; StorageError where the disk fails.
    """
    given = [str(p) for p in paths]
    for path in given:
        if not (os.path.isdir(path) or os.path.isfile(path)):
            raise InputError(
                f"no file or folder at {path}",
                remedy="check the path; to pass texts, use dicts with 'text'",
                code="no-path",
            )
    roots = dict.fromkeys(os.path.realpath(p) for p in given)  # the same argument twice is read once
    return checked(_read_roots(list(roots), tuple(INCLUDE if include is None else include)), strict)


def _are_paths(values: Sequence[Any]) -> bool:
    if any(isinstance(v, Path) for v in values):
        return all(isinstance(v, (str, Path)) for v in values)
    return bool(values) and all(isinstance(v, str) for v in values) and any(map(_is_path, values))


def _is_path(value: str) -> bool:
    """`corpus/` with a typo must not become a document that says so."""
    if len(value) > 1024 or "\n" in value or "\0" in value:
        return False
    named = not any(c.isspace() for c in value) and ("/" in value or os.sep in value or _matches(value, value, INCLUDE))
    return named or os.path.exists(value)


def _read_roots(roots: Sequence[str], include: Sequence[str]) -> Found:
    for root in roots:
        path = Path(root)
        if path.is_dir():
            yield from _read_tree(path, include)
        else:
            yield from _read_file(path, path.name, _printable(root))


def _read_tree(root: Path, include: Sequence[str]) -> Found:
    for path in _walk(root, ()):
        if isinstance(path, Skipped):
            yield path
            continue
        relative = path.relative_to(root).as_posix()
        if _matches(path.name, relative, include):
            yield from _read_file(path, relative, _printable(str(root)))


def _matches(name: str, relative: str, include: Sequence[str]) -> bool:
    return any(fnmatchcase((relative if "/" in p else name).lower(), p.lower()) for p in include)


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path | Skipped]:
    """Regular files under `folder`, sorted by name; a folder that contains itself through a link is entered once."""
    try:
        here = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda e: (unicodedata.normalize("NFC", e.name), e.name))
    except PermissionError:
        yield Skipped(_printable(folder.as_posix()), "may not be read", str(folder))
        return
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if path.is_dir():  # unlike the entry's own methods, False for a link to itself
            yield from _walk(path, (*above, identity))
        elif path.is_file():
            yield path


def _read_file(path: Path, source: str, root: str) -> Found:
    if not is_unicode(source):
        yield Skipped(_printable(source), "its file name is not UTF-8", root)
        return
    source = unicodedata.normalize("NFC", source)
    try:
        if is_table(path):
            yield from read_table(path, source, root)
        else:
            yield document_or_skipped(decoded(path.read_bytes()), source, {}, root)
    except (PermissionError, FileNotFoundError) as error:  # gone between listing and reading counts as unreadable
        yield Skipped(source, f"cannot be read ({error.strerror})", root)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}", remedy="check the disk and the network") from error


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
