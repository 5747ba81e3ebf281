"""Show one document as it is stored: bytes and bits a value by layer and tier, identity, provenance."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.ls import regime
from kvstore.cli.output import Output, count, human, safe, table
from kvstore.cli.stats import about_calibration

if TYPE_CHECKING:
    from kvstore.detail import Detail, LayerBytes, TierDetail

USAGE = "SOURCE[#N] [options]"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE[#N]", help="a document, or its passage N, counted from 0")
    options.add_store(parser)
    options.add_versions(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.detail import show

    store = options.open_store(args)
    found = show(store, args.source, **options.versions_of(args, store))
    out.result(to_json(found, store.number), text(found, store.number))
    return 0


def text(found: Detail, snapshot: int) -> str:
    """Four parts: the document, its tiers, its layers, its segments and origin."""
    return "\n".join([_document(found, snapshot), _tiers(found), _layers(found), _segments(found) + _origin(found)])


def _document(found: Detail, snapshot: int) -> str:
    row, model = found.row, found.model
    lines = [
        ("source", found.source),
        ("snapshot", str(snapshot)),
        ("tokens", f"{found.tokens:,} in {count(len({s.passage for s in found.segments}), 'passage')}"),
        ("regime", regime(found.regimes)),
        ("text", row.text),
        ("model", f"{model['name']} {model['dtype']}, {model['layers']} layers, {model['kv_heads']} KV heads of {model['head_dim']}; {model['key']}"),
        ("template", f"{found.template}; {row.template}"),
        ("encoding", row.encoding),
        *(("calibration", about_calibration(c)) for c in found.calibrations),
        ("recipe", row.recipe),
        ("root", row.root or "-"),
    ]
    lines += [(f"metadata {name}", str(value)) for name, value in row.metadata.items()]
    return "".join(f"{safe(name) + ':':<12} {safe(value)}\n" for name, value in lines)


def _tiers(found: Detail) -> str:
    rows = [
        (
            t.name,
            t.codec,
            human(t.load_nbytes),
            f"{t.load_nbytes / found.tokens:,.0f}",
            f"{t.bits:.2f}",
            f"{found.raw_nbytes / t.load_nbytes:.2f}x",
            _kl(t),
        )
        for t in found.tiers
    ]
    return table(("a load at", "codec", "reads", "bytes/token", "bits/value", "smaller", "KL"), rows)


def _kl(tier: TierDetail) -> str:
    if tier.exact:
        return "0 (exact)"
    if tier.kl is None:
        return "not measured"
    return f"{tier.kl:.2g}" if tier.kl_from == "artifact" else f"up to {tier.kl:.2g}"


def _layers(found: Detail) -> str:
    names = [t.name for t in found.tiers]
    header = ["layer", *(h for n in names for h in (f"{n} bytes", "bits/value"))]
    rows = [(_layer_name(g), *(x for n in names for x in (g.nbytes[n], f"{g.bits[n]:.2f}"))) for g in found.layers]
    return table(header, rows)


def _layer_name(group: LayerBytes) -> str:
    return str(group.first) if group.first == group.last else f"{group.first}-{group.last}"


def _segments(found: Detail) -> str:
    rows = [
        (str(s.passage), f"after {', '.join(s.after)}" if s.after else s.regime, s.tokens, s.position, s.key, s.pack[:12]) for s in found.segments
    ]
    return table(("passage", "regime", "tokens", "position", "segment", "pack"), rows)


def _origin(found: Detail) -> str:
    return "\nmade by: " + ", ".join(f"{safe(k)} {safe(v)}" for k, v in sorted(found.provenance.items())) + "\n"


def to_json(found: Detail, snapshot: int) -> dict[str, Any]:
    """The --json object."""
    row = found.row
    return {
        "source": found.source,
        "snapshot": snapshot,
        "tokens": found.tokens,
        "passages": len(row.passages),
        "regimes": list(found.regimes),
        "text": row.text,
        "recipe": row.recipe,
        "root": row.root,
        "metadata": row.metadata,
        "head": row.head,
        "model": found.model,
        "template": {"key": row.template, "kind": found.template},
        "encoding": row.encoding,
        "raw_nbytes": found.raw_nbytes,
        "tiers": [{**asdict(t), "requires": list(t.requires)} for t in found.tiers],
        "layers": [asdict(g) for g in found.layers],
        "segments": [{**asdict(s), "after": list(s.after)} for s in found.segments],
        "provenance": found.provenance,
        "calibrations": [asdict(c) for c in found.calibrations],
    }
