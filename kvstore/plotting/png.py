"""The same pictures as PNG, by matplotlib (imported when one is drawn; no window, no global state)."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

from kvstore.errors import InputError
from kvstore.plotting.axes import Axis
from kvstore.plotting.data import EncodingPlot, GroupBytes, TierPoint
from kvstore.plotting.page import MARK, TOGETHER, kl_text
from kvstore.plotting.svg import COLOURS, LONGEST, layers_of
from kvstore.wording import human, safe

PALETTE = ("#2f6fbf", "#1f9d8a", "#d98a1f", "#8a63c9", "#c2557a", "#7a8a2f")
MOST = 12  # encodings in one picture: the largest ones
DPI = 120


def require() -> Any:
    """matplotlib's Figure. Raises InputError where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "PNG needs matplotlib, which is not installed",
            remedy="pip install 'kvstore-compiler[plot]', or make the page alone with --out FILE.html",
            code="matplotlib",
        ) from error

    def figure(width: float, height: float) -> Any:
        made = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(made)
        return made

    return figure


def curve_png(plots: Sequence[EncodingPlot]) -> bytes:
    """Measured KL against bits a value of every encoding; a tier without measured KL is a dashed line. Raises InputError without matplotlib."""
    shown = largest(plots)
    figure = require()(8, 5)
    above, zero = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [9, 1], "hspace": 0})
    _scale(above, zero, [t for p in shown for t in p.tiers], max(p.raw_bits for p in shown))
    for i, plot in enumerate(shown):
        _draw_encoding(above, zero, plot, PALETTE[i % COLOURS])
    above.legend(loc="upper right", fontsize=9)
    return _bytes(figure)


def _scale(above: Any, zero: Any, tiers: Sequence[TierPoint], raw_bits: int) -> None:
    """Both axes logarithmic; a KL of 0 has a strip of its own."""
    bits = Axis.around([raw_bits, *(t.bits for t in tiers)], 2)
    zero.set_xscale("log", base=2)
    zero.set_xlim(bits.base**bits.low, bits.base**bits.high)
    zero.set_xticks(bits.ticks, [f"{b:g}" for b in bits.ticks])
    zero.set_xlabel(f"bits a value, read by a load (the model's own: {raw_bits})")
    zero.set_ylim(-1, 1)
    zero.set_yticks([0], ["0"])
    above.set_ylabel("KL, nats a token")
    if measured := [t.kl for t in tiers if t.kl]:
        kl = Axis.around(measured, 10)
        above.set_yscale("log")
        above.set_ylim(float(kl.base) ** kl.low, float(kl.base) ** kl.high)
    else:
        above.set_yticks([])
    for axes in (above, zero):
        axes.grid(True, alpha=0.3)


def _draw_encoding(above: Any, zero: Any, plot: EncodingPlot, colour: str) -> None:
    points = [t for t in plot.tiers if t.kl]
    above.plot([t.bits for t in points], [t.kl for t in points], color=colour, marker="o", label=_name(plot))
    for tier in plot.tiers:
        if tier.kl is None:
            above.axvline(tier.bits, color=colour, linestyle="--", linewidth=1)
            _label(above, tier, colour, 0.03, rotation=90, xytext=(-12, 0), xycoords=above.get_xaxis_transform())
        elif tier.kl > 0:
            _label(above, tier, colour, tier.kl, xytext=(7, 5))
        else:
            zero.plot([tier.bits], [0], color=colour, marker="D", linestyle="none")
            _label(zero, tier, colour, 0, xytext=(-9, 0), ha="right", va="center")


def _label(axes: Any, tier: TierPoint, colour: str, y: float, **options: Any) -> None:
    says = f"{_short(tier.name)}: {kl_text(tier)}"
    axes.annotate(says, (tier.bits, y), textcoords="offset points", color=colour, fontsize=9, parse_math=False, **options)


def layers_png(plots: Sequence[EncodingPlot]) -> bytes:
    """Bytes by layers, kind and tier, one panel an encoding. Raises InputError without matplotlib."""
    shown = largest(plots)
    heights = [1.2 + 0.24 * len(p.layers) for p in shown]
    figure = require()(8, sum(heights))
    panels = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for plot, (axes,) in zip(shown, panels, strict=True):
        _draw_layers(axes, plot)
    return _bytes(figure)


def _draw_layers(axes: Any, plot: EncodingPlot) -> None:
    rows, left = range(len(plot.layers)), [0.0] * len(plot.layers)
    for i, tier in enumerate(plot.tiers):
        for label, alpha, share in (("K", 1.0, 0), ("V", 0.55, 1), ("headers", 0.25, 2), (TOGETHER, 1.0, None)):
            widths = [_part(group, tier.name, share) for group in plot.layers]
            if any(widths):
                axes.barh(rows, widths, left=left, color=PALETTE[i % COLOURS], alpha=alpha, height=0.75, label=_part_label(tier, label, share))
                left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(rows, [f"layer {layers_of(g)}" for g in plot.layers])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(_ticks(max(sum(g.nbytes.values()) for g in plot.layers)))
    axes.xaxis.set_major_formatter(lambda n, _: human(n))
    axes.set_title(_name(plot), fontsize=10, parse_math=False)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _ticks(most: int) -> Any:
    """At powers of two, eight at most."""
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(2 ** max(0, math.ceil(math.log2(most / 8))))


def _part_label(tier: TierPoint, label: str, share: int | None) -> str | None:
    return None if share == 2 else _plain(f"{_short(tier.name)}, {label}")


def _part(group: GroupBytes, tier: str, share: int | None) -> float:
    """Bytes of keys (0), values (1), headers (2), or (None) of all where the codec codes them together."""
    kinds, nbytes = group.kinds[tier], group.nbytes[tier]
    if kinds is None or share is None:
        return float(nbytes) if kinds is None and share is None else 0.0
    parts = (kinds.keys, kinds.values, kinds.shared)
    return nbytes * parts[share] / sum(parts)


def largest(plots: Sequence[EncodingPlot]) -> list[EncodingPlot]:
    """As many as a picture takes, in their order."""
    kept = sorted(plots, key=lambda p: -p.nbytes)[:MOST]
    return [p for p in plots if p in kept]


def _short(text: str) -> str:
    shown = safe(text)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def _plain(text: str) -> str:
    """A legend's text: `$` would begin a formula, an underscore in front hides it."""
    return text.replace("$", r"\$").replace("_", "\u2017", 1) if text.startswith("_") else text.replace("$", r"\$")


def _name(plot: EncodingPlot) -> str:
    return _plain(f"{plot.id[:8]} ({_short(', '.join(plot.codecs))}) of {_short(plot.model_name)}")


def _bytes(figure: Any) -> bytes:
    """PNG that says who made it; no dates, so equal stores give equal files."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks are drawn as boxes
        figure.savefig(out, format="png", metadata={"Software": MARK})
    return out.getvalue()
