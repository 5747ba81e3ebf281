"""What a corpus is made of: documents, and what was left out of it and why."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstore.digest import digest
from kvstore.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text with a name.

    `source` is a path under the corpus root with POSIX separators, made NFC here. Newlines in `text` become `\\n` and a
    leading byte order mark goes, so that a text has one digest wherever it was written. `metadata` is made
    JSON-serialisable: other values become strings. `root` is the absolute path of the argument that led here, empty for
    objects; a build syncs by it. Raises InputError for an empty source, and for text that is not Unicode (lone
    surrogates).
    """

    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    root: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not isinstance(self.source, str):
            raise InputError(
                f"document {self.source!r}: text and source must be strings, got {type(self.text).__name__} and {type(self.source).__name__}",
                remedy="convert them",
            )
        if not self.source:
            raise InputError("a document has an empty source", remedy="name it")
        if not is_unicode(self.text) or not is_unicode(self.source):
            raise InputError(f"document {self.source!r}: lone surrogates are no text", remedy="decode it with the right encoding")
        object.__setattr__(self, "text", clean_newlines(self.text.removeprefix("\ufeff")))
        object.__setattr__(self, "source", unicodedata.normalize("NFC", self.source))
        object.__setattr__(self, "metadata", jsonable(dict(self.metadata or {})))


@dataclass(frozen=True)
class Skipped:
    """A document that cannot be compiled: its source, and why, in a few words."""

    source: str
    reason: str
    root: str = ""


Found = Iterator[Document | Skipped]


def text_digest(text: str) -> str:
    """Which text this is: 64 hexadecimal digits. Two texts that differ only in line ends are one."""
    return digest("kvstore/text/1", clean_newlines(text))


def text_name(text: str) -> str:
    """A source for a text that came without one."""
    return f"text-{text_digest(text)[:12]}"


def clean_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def decoded(data: bytes) -> str | None:
    """UTF-8 with or without a byte order mark; None for anything else, as for binary data that happens to be UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def document_or_skipped(text: str | None, source: str, metadata: Mapping[str, Any], root: str) -> Document | Skipped:
    """`text` None means undecodable."""
    if text is None:
        return Skipped(source, "not UTF-8 text", root)
    if not text.strip():
        return Skipped(source, "empty", root)
    if not is_unicode(text):
        return Skipped(source, "not Unicode text (lone surrogates)", root)
    return Document(text, source, metadata, root)


def jsonable(value: Any, depth: int = 0) -> Any:
    """`value` as JSON can hold it. What it cannot (dates, arrays, NaN, integers beyond 64 bits) becomes its string; sets are sorted.

    Raises InputError for what is nested more than 32 deep, or within itself.
    """
    if depth > 32:
        raise InputError("metadata is nested more than 32 deep", remedy="flatten it, or leave it out")
    if value is None or isinstance(value, (bool, str)):
        return value if not isinstance(value, str) or is_unicode(value) else ascii(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return {str(jsonable(str(k))): jsonable(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(v, depth + 1) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [jsonable(v, depth + 1) for v in value]
    if " at 0x" in (text := str(value)):
        return type(value).__qualname__  # an address differs in each process, and the row with it
    return text


def checked(found: Iterable[Document | Skipped], strict: bool) -> Found:
    """Pass on what was found. Raises InputError for a source that comes twice, with `strict` for what is skipped."""
    roots: dict[str, str] = {}
    for item in found:
        if isinstance(item, Skipped):
            if strict:
                raise InputError(f"{item.source}: {item.reason}", remedy="mend it, or build without --strict", code="skipped")
        elif item.source in roots:
            raise _twice(item, roots[item.source])
        else:
            roots[item.source] = item.root
        yield item


def _twice(item: Document, earlier: str) -> InputError:
    where = f" ({earlier} and {item.root})" if earlier != item.root else f" in {item.root}" if item.root else ""
    return InputError(
        f"two documents are called {item.source!r}{where}",
        remedy="rename one, or build from their common folder",
        code="duplicate",
    )
