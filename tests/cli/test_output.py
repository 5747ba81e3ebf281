"""The output module and shared options: nothing that is stored can drive a terminal, and numbers come out for people."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvstore.cli import options
from kvstore.cli.output import Output, human, safe, safe_lines, table, width

from kvstore.errors import InputError


@given(st.text())
def test_safe_text_has_no_control_characters(text: str) -> None:
    shown = safe(text)
    assert shown.isascii() or not any(c in shown for c in "\x1b\r\n\t\b\u202e\u2066\u2028\x85\x9b")
    assert all(c.isprintable() or c == " " or ord(c) >= 0xA0 for c in shown)
    assert "\n" not in shown and "\x1b" not in shown and "\r" not in shown


def test_safe_keeps_letters_and_shows_what_it_escapes() -> None:
    assert safe("Grüße 文書 é") == "Grüße 文書 é"
    assert safe("a\x1b[31mb\nc\u202ed\udc80") == r"a\x1b[31mb\nc\u202ed\udc80"
    assert safe_lines("a\tb\nc") == "a\\tb\nc"


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (7 << 40, "7.0 TiB"),
        (9000 << 40, "9000.0 TiB"),
    ],
)
def test_human_bytes(n: int, text: str) -> None:
    assert human(n) == text


def test_tables_align_numbers_right_and_wide_letters_by_their_width() -> None:
    text = table(("name", "tokens", "size"), [("文書", 12, "1.0 KiB"), ("a\x1b", 1234, "12 B"), ("b", None, None)])
    assert text.splitlines() == ["name   tokens     size", "文書       12  1.0 KiB", "a\\x1b   1,234     12 B", "b           -        -"]
    assert {width(line) for line in text.splitlines()} == {22}


def test_a_table_without_rows_has_its_header() -> None:
    assert table(("a", "b"), []) == "a  b\n"


def test_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    out = Output()
    out.write("né\n")
    out.flush()
    assert raw.getvalue() == b"n\\xe9\n"


def test_progress_shows_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 2

    for kind, shown in ((io.StringIO, False), (Terminal, True)):
        err = kind()
        monkeypatch.setattr(sys, "stderr", err)
        monkeypatch.setattr("os.get_terminal_size", lambda handle: argparse.Namespace(columns=10))
        out = Output()
        out.progress("a long line that does not fit\x1b")
        out.progress("too soon")
        out.say("done")
        assert err.getvalue() == ("\r\x1b[Ka long li\r\x1b[Kkvstore: done\n" if shown else "kvstore: done\n")


@pytest.mark.parametrize(("text", "n"), [("4096", 4096), ("300K", 300 << 10), ("4MiB", 4 << 20), ("1.5g", 3 << 29), ("12 kB", 12 << 10)])
def test_numbers_of_bytes(text: str, n: int) -> None:
    assert options.nbytes(text) == n


@pytest.mark.parametrize("text", ["", "x", "-5", "4 X", "1e3"])
def test_no_numbers_of_bytes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.nbytes(text)


def test_text_files(tmp_path: Any) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe")
    (tmp_path / "b").write_bytes(b"\xff")
    assert options.text_file(str(tmp_path / "a")) == "Grüße"
    for name in ("b", "missing", "."):
        with pytest.raises(InputError):
            options.text_file(str(tmp_path / name))
