"""All that the command line prints: tables, JSON, numbers for people, progress and errors. Control characters never reach a terminal."""

from __future__ import annotations

import os
import sys
import time
import unicodedata

from kvstore.wording import count, human, safe, safe_lines

__all__ = ["Output", "count", "human", "safe", "safe_lines", "table", "width"]

TYPE_CHECKING = False  # importing typing, json or logging costs milliseconds of every command, help included
if TYPE_CHECKING:
    from collections.abc import Sequence
    from logging import Handler
    from typing import Any

    from kvstore.errors import KvstoreError


def width(text: str) -> int:
    """Columns that a terminal needs."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns with two spaces between them; columns whose cells are all numbers stand right."""
    cells = [[safe(_cell(c)) for c in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float)) or _counts(c[i]) for row, c in zip(rows, cells, strict=True)) for i in range(len(header))
    ]
    widths = [max(map(width, column)) for column in zip(header, *cells, strict=True)]
    lines = [_line(line, widths, right) for line in [list(header), *cells]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _counts(cell: str) -> bool:
    """`1.4 KiB`, `3.2x`, `-`: what people compare by its digits."""
    return cell == "-" or (cell[:1].isdigit() and all(c.isdigit() or c in ".,x%" for c in cell.split(" ")[0]) and len(cell.split(" ")) <= 2)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = [" " * (w - width(c)) + c if r else c + " " * (w - width(c)) for c, w, r in zip(cells, widths, right, strict=True)]
    return "  ".join(padded).rstrip()


class Output:
    """Where one command writes: its result to stdout, everything else to stderr."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self._live = False  # a progress line is on the screen
        self._last = 0.0

    def write(self, text: str) -> None:
        """To stdout, as it is; what its encoding lacks is escaped."""
        self.clear()
        sys.stdout.write(_encodable(text, sys.stdout.encoding))

    def json(self, value: dict[str, Any]) -> None:
        """One object, in ASCII."""
        import json

        self.write(json.dumps(value, indent=2) + "\n")

    def result(self, value: dict[str, Any], text: str) -> None:
        """The object with --json, else the text."""
        self.json(value) if self.as_json else self.write(text)

    def say(self, text: str) -> None:
        """A remark on stderr."""
        self.clear()
        sys.stderr.write(_encodable(f"kvstore: {safe(text)}\n", sys.stderr.encoding))

    def error(self, error: KvstoreError) -> None:
        """The message on stderr; with --json its parts on stdout as well."""
        self.say(f"error: {error}")
        if self.as_json:
            self.json({"error": {"code": error.code, "message": error.message, "remedy": error.remedy}})

    def progress(self, text: str) -> None:
        """Replace the progress line, ten times a second at most, on a terminal only."""
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._last < 0.1:
            return
        self._last, self._live = now, True
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        sys.stderr.write(_encodable(f"\r\x1b[K{safe(text)[: columns - 1]}", sys.stderr.encoding))
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the progress line away."""
        if self._live:
            sys.stderr.write("\r\x1b[K")
            self._live = False

    def flush(self) -> None:
        self.clear()
        sys.stdout.flush()

    def abandon(self) -> None:
        """Nobody reads stdout any more: keep Python from trying again at exit."""
        self._live = False
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):  # not a real file
            return

    def log_handler(self) -> Handler:
        """For the library's log: what it warns of is said on stderr."""
        import logging

        say = self.say

        class Said(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                say(f"{record.levelname.lower()}: {record.getMessage()}")

        return Said(logging.WARNING)


def _encodable(text: str, encoding: str | None) -> str:
    return text if text.isascii() else text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
