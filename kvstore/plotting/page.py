"""One HTML page about a store: no scripts, no other files, light and dark; whatever the store names is escaped. Well-formed XML as well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from kvstore.plotting.data import EncodingPlot, GroupBytes, KindBytes, PlotData, TierPoint, kind_totals
from kvstore.plotting.svg import bars, colour, curve, layers_of, name_of, nats
from kvstore.wording import count, human, safe

MARK = "kvstore plot"  # in every file that is made here: what lacks it is not overwritten
TOGETHER = "K and V coded together"
NOT_MEASURED = "not measured"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #ffffff; --faint: #667085; --rule: #d5dae3;
  --t0: #2f6fbf; --t1: #1f9d8a; --t2: #d98a1f; --t3: #8a63c9; --t4: #c2557a; --t5: #7a8a2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ef; --paper: #14181f; --faint: #97a1b3; --rule: #343c4a;
  --t0: #6aa3e8; --t1: #4fc7b3; --t2: #eeb059; --t3: #b596ea; --t4: #e48aa9; --t5: #aebd62; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 64rem; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; } h2 { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1.5rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; } p, dl { margin: .4rem 0; } .faint, caption { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; margin: .6rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; } th { font-weight: 600; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { white-space: normal; overflow-wrap: anywhere; }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 13px; }
svg .tick { font-size: 12px; fill: var(--faint); }
svg .faint { fill: var(--faint); } .grid { stroke: var(--rule); } .axis { stroke: var(--faint); }
.line { fill: none; stroke: var(--faint); stroke-width: 1.5; }
.dashed { stroke-dasharray: 4 4; stroke-width: 1.5; } .whisker { stroke-width: 2; } svg .light { fill-opacity: .5; } svg .rest { fill-opacity: .2; }
.key span { display: inline-block; width: .8rem; height: .8rem; margin: 0 .35rem 0 .9rem; vertical-align: -.05rem; }
""" + "\n".join(f".t{i} {{ fill: var(--t{i}); background: var(--t{i}); }} .s{i} {{ stroke: var(--t{i}); }}" for i in range(6))


def page(data: PlotData) -> str:
    """The whole document."""
    title = f"kvstore: {escape(safe(data.stats.store))}"
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta name="generator" content="{MARK}"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{_head(data, title)}{"".join(map(_encoding, data.encodings))}</body>
</html>
"""


def _head(data: PlotData, title: str) -> str:
    s = data.stats
    overhead = ", ".join(f"{safe(kind)} {human(n)}" for kind, n in s.overhead.items() if n)
    facts = [
        ("store id", s.id),
        ("snapshot", f"{s.snapshot}, {count(s.snapshots, 'snapshot')} kept"),
        *(("model", f"{name} {key[:12]}") for key, name in s.models),
        ("holds", f"{count(s.documents, 'document')}, {count(s.artifacts, 'artifact')}, {count(s.tokens, 'token')} in {count(s.packs, 'pack')}"),
        ("whole store", f"{s.nbytes:,} bytes ({human(s.nbytes)}); the same values as the model computes them: {human(s.raw_nbytes)}"),
        ("beside the units", f"{human(sum(s.overhead.values()))} ({overhead})"),
    ]
    rows = "\n".join(f"<dt>{name}</dt><dd>{escape(safe(value))}</dd>" for name, value in facts)
    return f"<h1>{title}</h1>\n<dl>\n{rows}\n</dl>\n"


def _encoding(plot: EncodingPlot) -> str:
    """Curve, tiers, bars, layers, kinds, documents."""
    about = escape(safe(f"Encoding {plot.id[:12]} ({', '.join(plot.codecs)}) of {plot.model_name}"))
    holds = f"{count(plot.artifacts, 'artifact')}, {count(plot.tokens, 'token')}, {human(plot.nbytes)} in all tiers"
    return f"""<section>
<h2>{about}</h2>
<p class="faint">{holds}; encoding {plot.id}, model {plot.model}</p>
<h3>Quality against size</h3>
{curve(plot)}{_tiers(plot)}{_scores(plot)}
<h3>Bytes by layer{" and kind" if any(kind_totals(plot).values()) else ""}</h3>
{_key(plot)}{bars(plot)}{_layers(plot)}{_kinds(plot)}
<h3>Largest documents</h3>
{_documents(plot)}
</section>
"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", text: Sequence[int] = (0,)) -> str:
    """Cells are escaped here; columns in `text` wrap and stand left."""
    head = "".join(f"<th>{escape(safe(h))}</th>" for h in header)
    lines = [
        "".join(f'<td class="text">{escape(safe(c))}</td>' if i in text else f"<td>{escape(safe(c))}</td>" for i, c in enumerate(row)) for row in rows
    ]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{above}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'


def _tiers(plot: EncodingPlot) -> str:
    header = ("a load at", "codec", "own bytes", "reads", "bytes a token", "bits a value", "smaller", "KL")
    rows = [
        (
            t.name,
            t.codec,
            f"{t.nbytes:,}",
            f"{t.load_nbytes:,}",
            f"{t.bytes_per_token:,.1f}",
            f"{t.bits:.3f}",
            f"{t.raw_ratio:.2f}x",
            kl_text(t),
        )
        for t in plot.tiers
    ]
    return _table(header, rows)


def kl_text(tier: TierPoint) -> str:
    """`0 (exact)`, `0.0028`, `not measured`."""
    return "0 (exact)" if tier.exact else NOT_MEASURED if tier.kl is None else nats(tier.kl)


def _scores(plot: EncodingPlot) -> str:
    """What the quality reports say, where there are any."""
    header = ("measured", "documents", "tokens", "KL", "upper 95 %", "99th percentile", "noise", "agreement")
    found = [(t.name, t.measured) for t in plot.tiers if t.measured]
    rows = [
        (
            n,
            f"{m.documents:,}",
            f"{m.tokens:,}",
            nats(m.kl),
            "-" if m.upper is None else nats(m.upper),
            nats(m.p99),
            nats(m.noise),
            f"{m.agreement:.2%}",
        )
        for n, m in found
    ]
    return _table(header, rows) if rows else '<p class="faint">No tier of this encoding has a quality report.</p>\n'


def _key(plot: EncodingPlot) -> str:
    names = "".join(f'<span class="{colour(i)}"></span>{name_of(t.name)}' for i, t in enumerate(plot.tiers))
    apart = " Keys solid, values faded." if any(kind_totals(plot).values()) else ""
    return f'<p class="key">{names}<span></span>{apart}</p>\n'


def _layers(plot: EncodingPlot) -> str:
    names = [t.name for t in plot.tiers]
    header = ["layers", *(h for n in names for h in (f"{n} bytes", "bits a value", "K : V"))]
    rows = [[layers_of(g), *(cell for n in names for cell in _cells(g, n))] for g in plot.layers]
    totals = kind_totals(plot)
    rows.append(
        [
            "all",
            *(cell for t in plot.tiers for cell in (f"{t.nbytes:,}", f"{t.nbytes * plot.raw_bits / plot.raw_nbytes:.3f}", _split(totals[t.name]))),
        ]
    )
    return _table(header, rows, text=())


def _cells(group: GroupBytes, tier: str) -> tuple[str, str, str]:
    return f"{group.nbytes[tier]:,}", f"{group.bits[tier]:.3f}", _split(group.kinds[tier])


def _split(kinds: KindBytes | None) -> str:
    """The share of keys."""
    if kinds is None or not kinds.keys + kinds.values:
        return "-"
    return f"{kinds.keys / (kinds.keys + kinds.values):.1%}"


def _kinds(plot: EncodingPlot) -> str:
    """Bytes of keys and values by tier, or why they cannot be told apart."""
    rows = [(t.name, *_kind_cells(kinds)) for t, kinds in zip(plot.tiers, kind_totals(plot).values(), strict=True)]
    return _table(("tier", "K bytes", "V bytes", "headers", "counted in"), rows, text=(0, 4))


def _kind_cells(kinds: KindBytes | None) -> tuple[str, str, str, str]:
    if kinds is None:
        return "-", "-", "-", TOGETHER
    counted = "all units" if kinds.units == kinds.of else f"{kinds.units:,} of {kinds.of:,} units"
    return f"{kinds.keys:,}", f"{kinds.values:,}", f"{kinds.shared:,}", counted


def _documents(plot: EncodingPlot) -> str:
    if not plot.largest:
        return '<p class="faint">No document of the newest snapshot is stored in it.</p>\n'
    header = ("document", "passages", "tokens", "bytes in all tiers", "bytes a token", "regimes")
    rows = [
        (d.source, f"{d.passages:,}", f"{d.tokens:,}", f"{d.nbytes:,}", f"{d.nbytes / max(1, d.tokens):,.1f}", ", ".join(d.regimes))
        for d in plot.largest
    ]
    more = f'<p class="faint">{len(plot.largest)} of {count(plot.documents, "document")}.</p>\n' if plot.documents > len(plot.largest) else ""
    return _table(header, rows, text=(0, 5)) + more
