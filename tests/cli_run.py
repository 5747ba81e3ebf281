"""Running the command line in this process, and holding its JSON against the schemas."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from kvstore.cli.main import main
from referencing import Registry, Resource


@dataclass(frozen=True)
class Ran:
    """What one command line left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as the one object that it must be."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Run = Callable[..., Ran]


def run_main(*words: str | Path) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(w) for w in words])
    return Ran(status, out.getvalue(), err.getvalue())


def run_json(*words: str | Path, status: int = 0) -> dict[str, Any]:
    """The --json object of a command that ends with `status`, checked against the command's schema (or that of errors)."""
    ran = run_main(*words, "--json")
    assert ran.status == status, ran.err
    found = ran.json
    validate("error" if "error" in found else str(words[0]), found)
    return found


def validate(name: str, value: Any) -> None:
    """Raises jsonschema's error where `value` is not as schemas/cli/<name>.json says."""
    Draft202012Validator(schemas()[name], registry=_registry()).validate(value)


@cache
def schemas() -> dict[str, Any]:
    """Name -> schema, of every file in schemas/cli."""
    folder = Path(str(resources.files("kvstore.schemas"))) / "cli"
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}


@cache
def _registry() -> Any:
    return Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in schemas().values())
