"""Draw the store: measured KL against size, bytes by layer, kind and tier. One HTML page, and PNG where matplotlib is installed."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, safe, table

if TYPE_CHECKING:
    from kvstore.plotting.data import EncodingPlot, PlotData

USAGE = "[options]"
FOLDER = "kvstore-plot"


def configure(parser: argparse.ArgumentParser) -> None:
    out = f"a folder for index.html, curve.png and layers.png, or one file: FILE.html (the page), FILE.png (the curve) (default: {FOLDER})"
    parser.add_argument("--out", metavar="DIR|FILE", default=FOLDER, help=out)
    parser.add_argument("--model", metavar="KEY", help="draw this model alone: its key, its beginning, or its name")
    parser.add_argument("--encoding", metavar="KEY", help="draw this encoding alone: its key or its beginning")
    options.add_store(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.plotting.data import collect
    from kvstore.plotting.files import write

    store = options.open_store(args)
    data = collect(store, model=options.model_key(store, args.model), encoding=args.encoding)
    files = write(data, args.out)
    out.result(to_json(data, files), text(data, files))
    return 0


def text(data: PlotData, files: list[Path]) -> str:
    return "\n".join([*map(_encoding, data.encodings), "".join(f"wrote {safe(str(path))}\n" for path in files)])


def _encoding(plot: EncodingPlot) -> str:
    from kvstore.plotting.page import kl_text

    rows = [(t.name, f"{t.bytes_per_token:,.0f}", f"{t.bits:.2f}", f"{t.raw_ratio:.2f}x", kl_text(t)) for t in plot.tiers]
    about = f"encoding {plot.id[:12]} ({', '.join(map(safe, plot.codecs))}) of {safe(plot.model_name)}"
    return f"{about}\n" + table(("a load at", "bytes/token", "bits/value", "smaller", "KL"), rows)


def to_json(data: PlotData, files: list[Path]) -> dict[str, Any]:
    """The --json object."""
    s = data.stats
    about = {"store": s.store, "id": s.id, "snapshot": s.snapshot, "documents": s.documents, "artifacts": s.artifacts, "tokens": s.tokens}
    encodings = [_without_lists(asdict(e)) for e in data.encodings]
    return {**about, "nbytes": s.nbytes, "encodings": encodings, "files": [str(path) for path in files]}


def _without_lists(encoding: dict[str, Any]) -> dict[str, Any]:
    """The largest documents by what tells them apart."""
    largest = [{k: d[k] for k in ("source", "template", "passages", "tokens", "nbytes")} for d in encoding["largest"]]
    return {**encoding, "largest": largest}
