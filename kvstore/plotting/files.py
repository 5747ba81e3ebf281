"""The files of `kvstore plot`: which there are, and writing them whole without touching what somebody else made."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from kvstore.errors import InputError
from kvstore.plotting.data import PlotData
from kvstore.plotting.page import MARK, page
from kvstore.plotting.png import curve_png, layers_png
from kvstore.storage.files import translated

PAGE = "index.html"
MAKERS: dict[str, Callable[[PlotData], bytes]] = {
    PAGE: lambda data: page(data).encode(),
    "curve.png": lambda data: curve_png(data.encodings),
    "layers.png": lambda data: layers_png(data.encodings),
}


def write(data: PlotData, out: str | Path) -> list[Path]:
    """Write `out`: FILE.html is the page, FILE.png the curve; anything else is a folder that gets the page, curve.png and layers.png.

    The page comes first: it is there even where PNGs fail for want of matplotlib. Files of an earlier plot are replaced, others never.
    Raises InputError, StorageError.
    """
    wanted = _targets(Path(out), Path(data.stats.store))
    for path in wanted:
        _require_ours(path)
    for path, make in wanted.items():
        _replace(path, make(data))
    return list(wanted)


def _targets(out: Path, store: Path) -> dict[Path, Callable[[PlotData], bytes]]:
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(store)):
        raise InputError(f"{out} lies in the store", remedy="name another place with --out")
    kind = out.suffix.lower()
    if kind in (".html", ".htm", ".png") and not out.is_dir():
        return {out: MAKERS["curve.png" if kind == ".png" else PAGE]}
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", remedy="name a folder, or a file that ends in .html or .png")
    return {out / name: make for name, make in MAKERS.items()}


def _require_ours(path: Path) -> None:
    if not os.path.lexists(path):
        return
    with translated(str(path)):
        head = path.read_bytes()[:1024] if path.is_file() else b""
    if MARK.encode() not in head:
        raise InputError(f"{path} was not made by `{MARK}`", remedy="move it away, or name another place with --out")


def _replace(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with translated(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_bytes(data)
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)
