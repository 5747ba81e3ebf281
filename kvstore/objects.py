"""Documents from Python objects: our own, dicts, strings, and what retrievers return, known by its attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvstore.errors import InputError
from kvstore.sources import Document, Found, Skipped, checked, document_or_skipped, text_name

REMEDY = "pass kvstore.Document, dicts with 'text', strings, LangChain documents or LlamaIndex nodes"


def from_objects(objects: Iterable[Any], *, strict: bool = False) -> Found:
    """Documents of an iterable whose elements may be of different kinds.

    - Document: itself. str: called `text-<12 hex>` after its content.
    - dict: `text`, and `source` or `id`; the rest, and the dict under `metadata`, is metadata.
    - LangChain documents (`page_content`) and LlamaIndex nodes (`node`, or `text` with `id_`): called after the file
      they were cut from where their metadata tells, else after their id. A second text from the same file is called
      `file/text-<12 hex>`.

    A text that comes twice without a name is reported once as skipped. Raises InputError for any other type, for two
    documents with the same explicit name, and with `strict` for what is skipped.
    """
    return checked(_distinct(map(document_of, objects)), strict)


def _distinct(found: Iterable[tuple[Document | Skipped, bool]]) -> Iterator[Document | Skipped]:
    """Keep apart derived names (the bool), which may meet by nature; explicit ones are left to `checked`."""
    texts: dict[str, str] = {}
    for item, derived in found:
        if isinstance(item, Document) and derived and item.source in texts:
            item = _renamed(item, texts)
        if isinstance(item, Document):
            texts[item.source] = item.text
        yield item


def _renamed(item: Document, texts: dict[str, str]) -> Document | Skipped:
    name = f"{item.source}/{text_name(item.text)}"
    if texts[item.source] == item.text or name in texts:
        return Skipped(item.source, "the same text as an earlier one", item.root)
    return Document(item.text, name, item.metadata, item.root)


def document_of(value: Any) -> tuple[Document | Skipped, bool]:
    """One object as a document, and whether its name was derived. Raises InputError naming the type."""
    if isinstance(value, Document):
        return document_or_skipped(value.text, value.source, value.metadata, value.root), False
    if isinstance(value, Skipped):
        return value, False
    if isinstance(value, str):
        return _named(value, None, {})
    if isinstance(value, Mapping):
        return _of_mapping(value)
    return _of_retrieved(value)


def _of_mapping(value: Mapping[str, Any]) -> tuple[Document | Skipped, bool]:
    text, name, nested = value.get("text"), value.get("source") or value.get("id"), value.get("metadata")
    if not isinstance(text, str):
        raise InputError(f"a dict has no 'text' with a string (its keys: {', '.join(map(str, value))})", remedy=REMEDY)
    used = {"text", "source" if value.get("source") else "id"}
    metadata = {k: v for k, v in value.items() if k not in used}
    if isinstance(nested, Mapping):
        metadata = {**{k: v for k, v in metadata.items() if k != "metadata"}, **nested}
    item, _ = _named(text, name, metadata)
    return item, name is None


def _of_retrieved(value: Any) -> tuple[Document | Skipped, bool]:
    node = getattr(value, "node", value)
    name, metadata = getattr(node, "id_", None) or getattr(node, "node_id", None), getattr(node, "metadata", None)
    if isinstance(getattr(node, "page_content", None), str):
        text, name = node.page_content, getattr(node, "id", None)
    elif name is not None and (text := _node_text(node)) is not None:
        pass
    else:
        raise InputError(f"{type(value).__module__}.{type(value).__qualname__} is not a document", remedy=REMEDY)
    metadata = metadata if isinstance(metadata, Mapping) else {}
    return _named(text, _file_of(metadata) or name, metadata)


def _node_text(node: Any) -> str | None:
    text = getattr(node, "text", None)
    if not isinstance(text, str) and callable(getattr(node, "get_content", None)):
        text = node.get_content()
    return text if isinstance(text, str) else None


def _file_of(metadata: Mapping[str, Any]) -> str | None:
    found = (metadata.get(key) for key in ("source", "file_path", "file_name"))
    return next((str(f) for f in found if f), None)


def _named(text: str, name: Any, metadata: Mapping[str, Any]) -> tuple[Document | Skipped, bool]:
    if not text.strip():
        return Skipped(str(name) if name not in (None, "") else "(a text without a name)", "empty"), True
    return document_or_skipped(text, str(name) if name not in (None, "") else _content_name(text), metadata, ""), True


def _content_name(text: str) -> str:
    return text_name(text.encode("utf-8", "replace").decode())
