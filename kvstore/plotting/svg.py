"""The two pictures of one encoding as SVG for an HTML page: colours come from the page's style, every text is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from kvstore.plotting.axes import Axis
from kvstore.plotting.data import EncodingPlot, GroupBytes, KindBytes, TierPoint
from kvstore.wording import human, safe

COLOURS = 6  # classes t0 to t5 in the page's style
WIDTH, LEFT, RIGHT, TOP, HEIGHT, LANE, BOTTOM = 760, 78, 24, 16, 230, 34, 46
ROW, BAR, LABEL, NUMBER = 22, 16, 96, 84
LONGEST = 28


class Frame(NamedTuple):
    """Axes of the curve; `kl` is None where no tier has a measured KL above 0."""

    bits: Axis
    kl: Axis | None

    def x(self, bits: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * self.bits.place(bits)

    def y(self, kl: float) -> float:
        """A KL of 0 lies in a lane of its own below the logarithmic part."""
        if self.kl is None or kl <= 0:
            return TOP + HEIGHT + LANE / 2
        return TOP + HEIGHT * (1 - self.kl.place(kl))


def colour(index: int) -> str:
    """The class of a tier's colour."""
    return f"t{index % COLOURS}"


def name_of(text: str) -> str:
    """A name of any length and content, escaped, short enough for a picture."""
    shown = safe(text)
    return escape(shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…")


def nats(kl: float) -> str:
    """`0.0028`, `8.1e-05`."""
    return f"{kl:.2g}"


def curve(plot: EncodingPlot) -> str:
    """Measured KL against bits a value, both logarithmic; tiers without a measured KL are dashed lines that say so."""
    frame = frame_of(plot)
    parts = [*_grid(frame, plot), *_line(frame, plot.tiers)]
    for i, tier in enumerate(plot.tiers):
        parts += _unmeasured(frame, tier, i) if tier.kl is None else _point(frame, tier, tier.kl, i)
    return _svg(TOP + HEIGHT + LANE + BOTTOM, "rate-quality curve", parts)


def frame_of(plot: EncodingPlot) -> Frame:
    ends = [kl for t in plot.tiers if t.measured for kl in (t.measured.kl, t.measured.upper) if kl]
    return Frame(Axis.around([plot.raw_bits, *(t.bits for t in plot.tiers)], 2), Axis.around(ends, 10) if ends else None)


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img" aria-label="{title}">\n{body}\n</svg>\n'


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start", turn: bool = False) -> str:
    """`content` is escaped already."""
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}"{turned}>{content}</text>'


def _segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _grid(frame: Frame, plot: EncodingPlot) -> Iterator[str]:
    floor, lane = TOP + HEIGHT, TOP + HEIGHT + LANE
    for bits in frame.bits.ticks:
        yield _segment(frame.x(bits), TOP, frame.x(bits), lane, "grid")
        yield _text(frame.x(bits), lane + 16, f"{bits:g}", "tick", "middle")
    for kl in frame.kl.ticks if frame.kl else ():
        yield _segment(LEFT, frame.y(kl), WIDTH - RIGHT, frame.y(kl), "grid")
        yield _text(LEFT - 8, frame.y(kl) + 4, f"{kl:.0e}", "tick", "end")
    yield _segment(LEFT, floor, WIDTH - RIGHT, floor, "axis")
    yield _segment(LEFT, lane, WIDTH - RIGHT, lane, "axis")
    yield _text(LEFT - 8, floor + LANE / 2 + 4, "0", "tick", "end")
    yield _text((LEFT + WIDTH - RIGHT) / 2, lane + 36, f"bits a value, read by a load (the model's own: {plot.raw_bits})", "", "middle")
    yield _text(16, TOP + HEIGHT / 2, "KL, nats a token", "", "middle", turn=True)
    if frame.kl is None:
        yield _text(WIDTH - RIGHT - 8, TOP + 16, "no measured KL above 0", "faint", "end")


def _line(frame: Frame, tiers: Sequence[TierPoint]) -> Iterator[str]:
    places = [f"{frame.x(t.bits):.1f},{frame.y(t.kl):.1f}" for t in tiers if t.measured and t.kl]
    if len(places) > 1:
        yield f'<polyline points="{" ".join(places)}" class="line"/>'


def _point(frame: Frame, tier: TierPoint, kl: float, index: int) -> Iterator[str]:
    x, y = frame.x(tier.bits), frame.y(kl)
    if tier.measured and tier.measured.upper and kl > 0:
        yield _segment(x, y, x, frame.y(tier.measured.upper), f"whisker s{index % COLOURS}")
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{colour(index)}"><title>{name_of(tier.name)}</title></circle>'
    right = x > WIDTH * 0.7
    says = f"{name_of(tier.name)}: {'0 (exact)' if tier.exact else nats(kl)}"
    yield _text(x - 9 if right else x + 9, y - 7 if kl > 0 else y + 4, says, "", "end" if right else "start")


def _unmeasured(frame: Frame, tier: TierPoint, index: int) -> Iterator[str]:
    x = frame.x(tier.bits)
    yield _segment(x, TOP, x, TOP + HEIGHT + LANE, f"dashed s{index % COLOURS}")
    yield _text(x - 5, TOP + HEIGHT - 8, f"{name_of(tier.name)}: not measured", "", "start", turn=True)


def bars(plot: EncodingPlot) -> str:
    """Bytes of each group of layers, by tier; where a codec keeps keys and values apart, keys are solid and values faded."""
    most = max(1, *(sum(g.nbytes.values()) for g in plot.layers))
    parts: list[str] = []
    for row, group in enumerate(plot.layers):
        parts += _bar(group, 4 + row * ROW, (WIDTH - LABEL - NUMBER) / most)
    return _svg(8 + len(plot.layers) * ROW, "bytes by layer and tier", parts)


def layers_of(group: GroupBytes) -> str:
    """`3`, `0-3`."""
    return str(group.first) if group.first == group.last else f"{group.first}-{group.last}"


def _bar(group: GroupBytes, y: float, scale: float) -> Iterator[str]:
    x: float = LABEL
    yield _text(LABEL - 8, y + 12, f"layer {layers_of(group)}", "tick", "end")
    for index, (tier, nbytes) in enumerate(group.nbytes.items()):
        for label, share, kind in _shares(group.kinds[tier]):
            title = f"layer {layers_of(group)}, {name_of(tier)}{label}: {human(nbytes * share)}"
            size = nbytes * share * scale
            yield f'<rect x="{x:.2f}" y="{y:g}" width="{size:.2f}" height="{BAR}" class="{colour(index)}{kind}"><title>{title}</title></rect>'
            x += size
    yield _text(x + 8, y + 12, human(sum(group.nbytes.values())), "tick")


def _shares(kinds: KindBytes | None) -> list[tuple[str, float, str]]:
    """(what it is, its share, its class) of one tier's part of a bar."""
    if kinds is None:
        return [("", 1.0, "")]
    total = kinds.keys + kinds.values + kinds.shared
    parts = ((" K", kinds.keys, ""), (" V", kinds.values, " light"), (" headers", kinds.shared, " rest"))
    return [(label, n / total, kind) for label, n, kind in parts]
