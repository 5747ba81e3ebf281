"""Measure how a model caches and rotates its keys, and say whether kvstore can store that.

Nothing is known by the model's name: a probe is prefilled at several positions and fitted.
Exit status 4 where the model is refused.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, safe, table

if TYPE_CHECKING:
    from kvstore.families.measure import Inspection

USAGE = "MODEL [options]"
_SHOWN = ("rotated", "start", "dim", "layout", "table")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or id of a model, or `bundled`")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="load the model in this dtype (default: its own)")
    parser.add_argument("--device", metavar="NAME", help="where it runs, such as cpu or cuda:1 (default: cuda where there is one)")
    options.add_json(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.errors import IncompatibleError
    from kvstore.families.measure import inspect_model
    from kvstore.models import ModelSource

    model = ModelSource(args.model, dtype=args.dtype, device=args.device).model
    found = inspect_model(model)
    out.result(to_json(args.model, model, found), text(args.model, model, found))
    return 0 if found.layout is not None else IncompatibleError.exit_status


def text(name: str, model: Any, found: Inspection) -> str:
    """Measurements, then the verdict."""
    seen = found.measurements
    lines = [f"{safe(name)}: {type(model).__name__}", f"cache: {_counted(seen.get('cache_classes', []))}"]
    lines += [f"{label}: {_plain(seen[key])}" for key, label in _LABELS.items() if key in seen]
    body = "\n".join(lines) + "\n"
    if seen.get("layers"):
        body += "\n" + _layers(seen["layers"])
    if seen.get("ropes"):
        body += "\n" + _ropes(seen["ropes"])
    return f"{body}\n{_verdict(found)}\n"


_LABELS = {
    "keys": "keys [heads, channels]",
    "values": "values [heads, channels]",
    "dtype": "dtype",
    "offsets": "probed at positions",
    "values_move": "values move with position by",
    "tolerance": "residual accepted up to",
    "tables": "frequency tables found",
    "capture": "keys before RoPE",
}


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return ", ".join(map(_plain, value)) or "none" if isinstance(value, (list, tuple)) else safe(str(value))


def _counted(names: list[str]) -> str:
    return ", ".join(f"{len(list(group))} x {safe(name)}" for name, group in groupby(names)) or "none"


def _layers(layers: list[dict[str, Any]]) -> str:
    """A line for each run of layers that are rotated alike."""
    rows = []
    for _, run in groupby(layers, lambda row: tuple(row.get(k) for k in _SHOWN)):
        alike = list(run)
        first, last = alike[0]["layer"], alike[-1]["layer"]
        rows.append(
            (
                str(first) if first == last else f"{first}-{last}",
                alike[0].get("rotated") or "nothing",
                _channels(alike[0]),
                alike[0].get("layout"),
                alike[0].get("table"),
                f"{max(r.get('residual', 0.0) for r in alike):.2g}",
            )
        )
    return table(("layers", "rotated", "channels", "pairs", "frequencies", "residual"), rows)


def _channels(row: dict[str, Any]) -> str | None:
    return f"{row['start']}-{row['start'] + row['dim'] - 1}" if "dim" in row else None


def _ropes(ropes: list[dict[str, Any]]) -> str:
    rows = [
        (
            r.get("kind"),
            _channels(r),
            r.get("layout"),
            f"{r.get('scaling', 1.0):g}",
            r.get("arithmetic"),
            "bit for bit" if r.get("exact") else "within rounding" if r.get("residual") is not None else "not shown",
        )
        for r in ropes
    ]
    return table(("rope", "channels", "pairs", "scaling", "arithmetic", "rotation equals the model's"), rows)


def _verdict(found: Inspection) -> str:
    if found.layout is None:
        return "\n".join(["refused:", *(f"  {safe(p)}" for p in found.problems)])
    how = "as the model computes them" if found.layout.capture == "hooked" else "computed back from the cache, exact to rounding"
    return f"supported: keys are stored before RoPE, {how}; values as they are"


def to_json(name: str, model: Any, found: Inspection) -> dict[str, Any]:
    """The --json object."""
    import msgspec

    layout = None if found.layout is None else msgspec.to_builtins(found.layout)
    return {
        "model": name,
        "class": type(model).__name__,
        "supported": found.layout is not None,
        "problems": found.problems,
        "measurements": found.measurements,
        "layout": layout,
    }
