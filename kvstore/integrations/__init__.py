"""Where other tools call kvstore: one file each, imported only when asked for; nothing else in kvstore needs any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from kvstore.errors import InputError
from kvstore.receipt import Receipt


def not_installed(extra: str, error: ImportError) -> InputError:
    """What to raise where the package of an integration cannot be imported."""
    return InputError(
        f"this needs a package that cannot be imported ({error})", remedy=f"pip install 'kvstore-compiler[{extra}]'", code="not-installed"
    )


def plain(receipt: Receipt) -> dict[str, Any]:
    """As answers carry it: what JSON gives back unchanged, whoever keeps or traces them."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(receipt))
    return found


def receipt_of(answer: Any) -> Receipt:
    """The receipt that came with an answer: a LangChain message, a LlamaIndex response, or the metadata of either.

    Raises InputError where there is none.
    """
    metadata = answer if isinstance(answer, Mapping) else getattr(answer, "response_metadata", None) or getattr(answer, "metadata", None) or {}
    if "receipt" not in metadata:
        raise InputError(f"{type(answer).__name__} carries no receipt", remedy="pass the whole answer, before anything takes its text out")
    return msgspec.convert(metadata["receipt"], Receipt)
