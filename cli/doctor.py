"""Measure how a model caches and rotates its keys, say whether kvstore can store that, and try every use of it.

Nothing is known by the model's name: a probe is prefilled at several positions and fitted. Then a short text is stored, loaded and used in every
way, and the model's output is compared with that after a live prefix.
Exit status 4 where the model is refused, or where a use does not give what the live model gives.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, safe, table

if TYPE_CHECKING:
    from kvstore.checkup import Check
    from kvstore.families.measure import Inspection
    from kvstore.models import ModelSource

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

    source = ModelSource(args.model, dtype=args.dtype, device=args.device)
    found = inspect_model(source.model)
    checks = _checks(source, found)
    out.result(to_json(args.model, source.model, found, checks), text(args.model, source.model, found, checks))
    return 0 if all(c.outcome != "wrong" for c in checks) and found.layout is not None else IncompatibleError.exit_status


def _checks(source: ModelSource, found: Inspection) -> list[Check]:
    """Every use, tried; of a refused model none is."""
    from kvstore.checkup import CHECKS, Check, check_up, text_ids

    if found.layout is None:
        return [Check(name, "refused", "; ".join(found.problems)) for name in CHECKS]
    try:
        tokenizer = source.tokenizer
    except (OSError, ValueError):  # a checkpoint without one can be examined all the same
        tokenizer = None
    return check_up(source.model, found.layout, text_ids(source.model, tokenizer))


def text(name: str, model: Any, found: Inspection, checks: Sequence[Check]) -> str:
    """Measurements, then the verdict, then what was tried."""
    seen = found.measurements
    lines = [f"{safe(name)}: {type(model).__name__}", f"cache: {_counted(seen.get('cache_classes', []))}"]
    lines += [f"{label}: {_plain(seen[key])}" for key, label in _LABELS.items() if key in seen]
    body = "\n".join(lines) + "\n"
    if seen.get("layers"):
        body += "\n" + _layers(seen["layers"])
    if seen.get("ropes"):
        body += "\n" + _ropes(seen["ropes"])
    return f"{body}\n{_verdict(found)}\n" + ("" if found.layout is None else f"\n{_uses(model, checks)}")


_OUTCOMES = {"exact": "ok, bit for bit as live", "rounding": "ok, as live up to rounding"}


def _uses(model: Any, checks: Sequence[Check]) -> str:
    from kvstore.checkup import unfilled

    lines = table(("use", "tried on this model"), [(c.name, _OUTCOMES.get(c.outcome) or f"{c.outcome}: {safe(c.detail)}") for c in checks])
    wide = ", ".join(f"{w:,}" for w in unfilled(model))
    return lines + (f"not tried: what lies beyond a window of {wide} tokens, which the probe does not fill\n" if wide else "")


_LABELS = {
    "keys": "keys [heads, channels]",
    "values": "values [heads, channels]",
    "dtype": "dtype",
    "state_nbytes": "recurrent state, bytes a segment",
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
    turned, other = ("keys", "values") if found.layout.rotated == "keys" else ("values", "keys")
    verdict = f"supported: {turned} are stored before RoPE, {how}; {other} as they are"
    if found.layout.rope_limit is not None:
        verdict += f"\nonly for prompts of up to {found.layout.rope_limit:,} tokens: beyond them its RoPE has other frequencies"
    return verdict


def to_json(name: str, model: Any, found: Inspection, checks: Sequence[Check]) -> dict[str, Any]:
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
        "uses": [dataclasses.asdict(c) for c in checks],
    }
