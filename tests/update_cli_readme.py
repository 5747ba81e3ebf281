"""What cli/README.md shows, and making it true again: `python tests/update_cli_readme.py` rewrites its help texts and its examples' output.

A `text` block whose first line is `$ kvstore COMMAND --help` holds that help. A `console` block holds commands (`$ kvstore ...`) and
their standard output. Commands run in this process, one after another from the top of the page, in a folder with `corpus/` and
`questions.jsonl`, about its documents.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cli_run import Ran, run_main

from kvstore import bundled

PAGE = Path(__file__).resolve().parent.parent / "cli" / "README.md"
DOCUMENTS = ("hidden-garden.md", "old-library.md", "royal-orchard.md", "silver-tower.md", "stone-bridge.md")
_BLOCK = re.compile(r"^```(text|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Shown(NamedTuple):
    """One command on the page and the output printed under it."""

    command: str
    output: str


def shown(block: str) -> list[Shown]:
    """The commands of one block."""
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [Shown(*part.split("\n", 1)) for part in parts]


def blocks(text: str) -> Iterator[Shown]:
    """Every command on the page, in order."""
    for found in _BLOCK.finditer(text):
        yield from shown(found[2])


def prepare(folder: Path) -> None:
    """The folder that the examples run in."""
    (folder / "corpus").mkdir()
    for name in DOCUMENTS:
        shutil.copy(bundled.corpus_path() / "places" / name, folder / "corpus")
    asked = [q for q in bundled.questions() if q.source.removeprefix("places/") in DOCUMENTS]
    lines = [json.dumps({"query": q.question, "documents": [q.source.removeprefix("places/")], "answer": q.answer}) for q in asked]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_shown(command: str) -> Ran:
    """Run `kvstore ...` as the page writes it."""
    program, *words = shlex.split(command)
    if program != "kvstore":
        raise ValueError(f"the page runs {program}")
    return run_main(*words)


def output_now(command: str) -> str:
    """Raises RuntimeError where it fails: the page shows what works."""
    ran = run_shown(command)
    if ran.status:
        raise RuntimeError(f"{command}: {ran.err}")
    return ran.out


def rewritten(text: str) -> str:
    """The page with the output that its commands have now."""

    def block(found: re.Match[str]) -> str:
        again = "".join(f"$ {s.command}\n{output_now(s.command)}" for s in shown(found[2]))
        return f"```{found[1]}\n{again}```"

    return _BLOCK.sub(block, text)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"COLUMNS": "100", "KVSTORE_CACHE": str(Path(scratch, "cache"))}
        (work := Path(scratch, "work")).mkdir()
        prepare(work)
        os.chdir(work)
        PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")).replace(scratch, "/home/you"), encoding="utf-8")


if __name__ == "__main__":
    main()
