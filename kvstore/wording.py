"""Names and numbers as people see them, on a terminal or in a page: nothing that is stored can move the cursor, reorder or break a line."""

from __future__ import annotations

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, bidi marks, lone surrogates, line separators: they could forge output


def safe(text: str) -> str:
    """`text` with everything escaped that could move the cursor, reorder or break a line."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def safe_lines(text: str) -> str:
    """The same, with its newlines."""
    return "\n".join(map(safe, text.split("\n")))


def _shown(char: str) -> str:
    return char.encode("unicode_escape").decode() if unicodedata.category(char) in _HIDDEN else char


def human(nbytes: float) -> str:
    """Bytes for people: `812 B`, `1.4 KiB`, `23.0 MiB`."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if nbytes < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


def count(number: int, noun: str) -> str:
    """`1 document`, `2,048 documents`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
