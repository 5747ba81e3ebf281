"""Add up the whole store: documents, artifacts, tokens, bytes by tier, overhead, and the ratio to the model's own dtype."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli import options
from kvstore.cli.output import Output, count, human, safe, table

if TYPE_CHECKING:
    from kvstore.inventory import CalibrationTotal, EncodingTotal, Stats, TierTotal

USAGE = "[options]"


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_store(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    from kvstore.inventory import stats

    found = stats(options.open_store(args))
    out.result(to_json(found), text(found))
    return 0


def text(found: Stats) -> str:
    sizes = f"{count(found.artifacts, 'artifact')}, {count(found.tokens, 'token')} in {count(found.packs, 'pack')}"
    lines = [
        f"{safe(found.store)}: snapshot {found.snapshot}, {count(found.snapshots, 'snapshot')} kept",
        f"{count(found.documents, 'document')}, {sizes}",
        *[f"{count(found.chains, 'passage')} of them stored after others (chains)"] * bool(found.chains),
        *(f"model {safe(name)} {key[:12]}" for key, name in found.models),
        *(f"template {safe(kind)} {key[:12]}" for key, kind in found.templates),
        *(f"calibration {about_calibration(c)}" for c in found.calibrations),
    ]
    names = dict(found.models)
    return "\n".join(["\n".join(lines) + "\n", *(_encoding(e, names.get(e.model, e.model[:12])) for e in found.encodings), _overhead(found)])


def about_calibration(total: CalibrationTotal) -> str:
    current = ", current" if total.current else ""
    return f"{total.digest[:12]} of model {total.model[:12]}: {total.metric}, {count(total.tokens, 'token')}, {human(total.nbytes)}{current}"


def _encoding(total: EncodingTotal, model: str) -> str:
    about = f"encoding {total.id[:12]} ({', '.join(total.codecs)}) of {safe(model)}"
    header = ("tier", "bytes", "a token", "a load reads", "a token", "smaller", "KL", "up to")
    states = f", recurrent states {human(total.state_nbytes)}" if total.state_nbytes else ""
    line = f"{about}: {count(total.artifacts, 'artifact')}, {count(total.tokens, 'token')}{states}"
    return f"{line}\n" + table(header, [_row(t, total) for t in total.tiers])


def _row(tier: TierTotal, total: EncodingTotal) -> tuple[str, ...]:
    own, read = tier.nbytes, tier.load_nbytes
    kl = ("0", "-") if tier.exact else tuple("-" if x is None else f"{x:.2g}" for x in (tier.kl, tier.upper))
    return (tier.name, human(own), f"{own / total.tokens:,.0f}", human(read), f"{read / total.tokens:,.0f}", f"{tier.raw_ratio:.2f}x", *kl)


def _overhead(found: Stats) -> str:
    rest = sum(found.overhead.values())
    kinds = ", ".join(f"{name} {human(n)}" for name, n in found.overhead.items() if n)
    lines = [f"overhead: {human(rest)} ({kinds})", f"whole store: {human(found.nbytes)}"]
    if found.tokens:
        lines[0] += f", {rest / found.tokens:,.0f} bytes a token"
        lines[1] += f", {found.nbytes / found.tokens:,.0f} bytes a token; the same values as the model computes them: {human(found.raw_nbytes)}"
    return "\n".join(lines) + "\n"


def to_json(found: Stats) -> dict[str, Any]:
    """The --json object."""
    totals = {"artifacts": found.artifacts, "tokens": found.tokens, "raw_nbytes": found.raw_nbytes}
    models = [{"key": key, "name": name} for key, name in found.models]
    templates = [{"key": key, "kind": kind} for key, kind in found.templates]
    per_token = {"bytes_per_token": found.nbytes / found.tokens if found.tokens else None}
    return {**asdict(found), **totals, **per_token, "models": models, "templates": templates}
