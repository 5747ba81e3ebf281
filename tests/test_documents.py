"""Reading a corpus: what becomes a document, under which name, and what is left out by name."""

from __future__ import annotations

import builtins
import json
import os
import sys
import unicodedata
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.documents import Document, Skipped, from_objects, read, read_paths, text_digest
from kvstore.errors import InputError
from kvstore.sources import jsonable


def written(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def sources(found: Any) -> list[str]:
    return [d.source for d in found if isinstance(d, Document)]


def skipped(found: Any) -> dict[str, str]:
    return {s.source: s.reason for s in found if isinstance(s, Skipped)}


def test_a_tree_is_read_sorted_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "b.txt": "b",
            "a/z.md": "z",
            "a/Y.MD": "y",
            "c.py": "no",
            ".hidden.txt": "no",
            ".git/x.txt": "no",
            "d/e/f.rst": "f",
        },
    )
    assert sources(read_paths([root])) == ["a/Y.MD", "a/z.md", "b.txt", "d/e/f.rst"]
    assert sources(read_paths([root], include=["*.py", "a/*"])) == ["a/Y.MD", "a/z.md", "c.py"]


def test_root_is_the_real_path_of_the_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {"corpus/a.txt": "a"})
    monkeypatch.chdir(tmp_path)
    (found,) = read_paths(["corpus"])
    (single,) = read_paths(["corpus/a.txt"])
    assert (found.source, found.root) == ("a.txt", os.path.realpath("corpus"))
    assert (single.source, single.root) == ("a.txt", os.path.realpath("corpus/a.txt"))


def test_a_file_named_directly_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    assert sources(read_paths([written(tmp_path, {"notes.org": "text"}) / "notes.org"])) == ["notes.org"]


def test_links_that_lead_back_are_not_followed_for_ever(tmp_path: Path) -> None:
    root = written(tmp_path, {"a/x.txt": "x", "b/y.txt": "y"})
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "c").symlink_to(root / "b")
    assert sources(read_paths([root])) == ["a/x.txt", "b/y.txt", "c/y.txt"]


def test_undecodable_and_empty_files_are_skipped_by_name_or_refused(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        {
            "latin.txt": b"caf\xe9",
            "utf16.txt": "x".encode("utf-16"),
            "nul.txt": b"a\0b",
            "empty.txt": "",
            "blank.md": " \n\t\n",
            "ok.txt": "ok",
        },
    )
    found = list(read_paths([root]))
    assert skipped(found) == {
        "latin.txt": "not UTF-8 text",
        "utf16.txt": "not UTF-8 text",
        "nul.txt": "not UTF-8 text",
        "empty.txt": "empty",
        "blank.md": "empty",
    }
    assert sources(found) == ["ok.txt"]
    with pytest.raises(InputError, match="blank.md: empty"):
        list(read_paths([root], strict=True))


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode elsewhere")
def test_a_file_name_that_is_not_unicode_is_skipped(tmp_path: Path) -> None:
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))).write_text("x")
    except OSError:
        pytest.skip("the file system refuses such names")
    assert skipped(read_paths([tmp_path])) == {"caf\\udce9.txt": "its file name is not UTF-8"}


def test_line_ends_and_byte_order_marks_do_not_make_another_text(tmp_path: Path) -> None:
    root = written(tmp_path, {"dos.txt": b"\xef\xbb\xbfa\r\nb\rc", "unix.txt": b"a\nb\nc"})
    dos, unix = read_paths([root])
    assert dos.text == unix.text == "a\nb\nc"
    assert text_digest("a\r\nb\rc") == text_digest(unix.text) != text_digest("a\nb\nC")


def test_sources_are_nfc(tmp_path: Path) -> None:
    (found,) = read_paths([written(tmp_path, {unicodedata.normalize("NFD", "é.txt"): "x"})])
    assert found.source == unicodedata.normalize("NFC", "é.txt")


def test_unknown_paths_and_equal_sources_are_refused(tmp_path: Path) -> None:
    written(tmp_path, {"one/x.txt": "1", "two/x.txt": "2"})
    with pytest.raises(InputError, match="no file or folder at .*three"):
        read_paths([tmp_path / "three"])
    with pytest.raises(InputError, match="'x.txt'.*one.*two"):
        list(read_paths([tmp_path / "one", tmp_path / "two"]))
    assert sources(read_paths([tmp_path / "one", tmp_path / "one"])) == ["x.txt"]


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "A", "year": 1999, "tags": ["x"]},
        {"id": 7, "text": "line\u2028separator"},
        {"text": "nameless"},
        {"id": "e", "text": " "},
        {"id": "n"},
        ["no"],
        {"id": {}, "text": "x"},
    ]
    lines = "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n{broken\n"
    found = list(read_paths([written(tmp_path, {"faq.jsonl": lines})]))
    name = f"faq.jsonl/text-{text_digest('nameless')[:12]}"
    assert sources(found) == ["faq.jsonl/a", "faq.jsonl/7", name]
    assert found[0].metadata == {"year": 1999, "tags": ["x"]} and found[1].text == "line\u2028separator"
    assert list(skipped(found)) == ["faq.jsonl/e", "faq.jsonl:9", "faq.jsonl:11", "faq.jsonl:13", "faq.jsonl:14"]


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    root = written(tmp_path, {"x.jsonl": '{"id":"a","text":"1"}\n{"id":"a","text":"2"}\n'})
    with pytest.raises(InputError, match="'x.jsonl/a'"):
        list(read_paths([root]))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"id": ["a", "b"], "text": ["A", None], "day": [date(2020, 1, 2), None], "score": [float("nan"), 1.5]})
    parquet.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "u.parquet").write_bytes(b"PAR1 not really")
    found = read_paths([tmp_path])
    first, second = next(found), next(found)
    assert (first.source, first.metadata) == ("t.parquet/a", {"day": "2020-01-02", "score": "nan"})
    assert isinstance(second, Skipped) and second.source == "t.parquet:2"
    with pytest.raises(InputError, match="u.parquet: not a Parquet file"):
        next(found)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [n for n in sys.modules if n.startswith("pyarrow")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match="pip install pyarrow"):
        list(read_paths([written(tmp_path, {"t.parquet": b"PAR1"})]))


@dataclass
class LangChainDocument:
    page_content: str
    metadata: dict[str, Any] = field(default_factory=dict)
    id: str | None = None


@dataclass
class TextNode:
    id_: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class NodeWithScore:
    node: TextNode
    score: float = 0.5


class OldNode:
    node_id, metadata = "n1", {"file_name": "old.txt"}

    def get_content(self) -> str:
        return "old"


def test_objects_of_all_kinds() -> None:
    found = list(
        from_objects(
            [
                Document("own", "own.md", {"k": date(2020, 1, 2)}),
                {"text": "t", "id": 5, "x": 1, "metadata": {"y": 2}},
                {"text": "u", "source": "u.txt", "id": 9},
                "a string",
                LangChainDocument("lc", {"source": "lc.pdf"}),
                LangChainDocument("lc2", id="uuid"),
                NodeWithScore(TextNode("n", "node", {"file_path": "n.md"})),
                TextNode("bare", "bare"),
                OldNode(),
            ]
        )
    )
    name = f"text-{text_digest('a string')[:12]}"
    assert sources(found) == ["own.md", "5", "u.txt", name, "lc.pdf", "uuid", "n.md", "bare", "old.txt"]
    assert found[0].metadata == {"k": "2020-01-02"} and found[1].metadata == {"x": 1, "y": 2} and found[2].metadata == {"id": 9}


def test_chunks_of_one_file_get_names_of_their_own() -> None:
    first, second, again = from_objects([LangChainDocument(t, {"source": "m.pdf"}) for t in ("one", "two", "one")])
    assert (first.source, second.source) == ("m.pdf", f"m.pdf/text-{text_digest('two')[:12]}")
    assert again == Skipped("m.pdf", "the same text as an earlier one")


@pytest.mark.parametrize("bad", [3, None, object(), {"id": "a"}, {"text": 3}, b"bytes"])
def test_foreign_objects_are_refused_by_type(bad: Any) -> None:
    with pytest.raises(InputError, match="kvstore.Document"):
        list(from_objects([bad]))


def test_objects_with_one_explicit_name_are_refused_and_empty_ones_skipped() -> None:
    with pytest.raises(InputError, match="two documents are called 'a'"):
        list(from_objects([Document("1", "a"), {"id": "a", "text": "2"}]))
    assert skipped(from_objects(["", {"id": "e", "text": "\n"}, Document(" ", "d")])) == {
        "(a text without a name)": "empty",
        "e": "empty",
        "d": "empty",
    }
    with pytest.raises(InputError):
        list(from_objects([" "], strict=True))
    with pytest.raises(InputError, match="surrogates"):
        Document("\ud800", "x")


def test_read_tells_paths_from_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, {"c/a.txt": "A"})
    monkeypatch.chdir(tmp_path)
    for given_as in ("c", Path("c"), ["c"], [Path("c")], ["c/a.txt"]):
        assert sources(read(given_as)) == ["a.txt"]
    for typo in ("d", ["d/"], ["c", "d"], ["notes.txt"], [Path("d")]):
        with pytest.raises(InputError, match="no file or folder"):
            read(typo)
    assert [d.text for d in read(["One text.", "another/way of saying"])] == ["One text.", "another/way of saying"]
    assert [d.text for d in read(t for t in ["c"])] == ["c"]
    assert [d.text for d in read({"text": "one dict"})] == ["one dict"]


def test_read_refuses_what_holds_no_documents() -> None:
    frame = type("Frame", (list,), {"columns": ("id", "text")})()
    for wrong, says in ((3, "int"), (b"x", "bytes"), (frame, "to_dict")):
        with pytest.raises(InputError, match=says):
            list(read(wrong))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(values)
def test_metadata_is_always_json(value: Any) -> None:
    plain = jsonable(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert jsonable(plain) == plain
