"""The bars of `rate_quality.py`: asked, measured, met; and bytes at equal KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rate_rows import Row, bytes_at, curve

Stages = Mapping[str, Sequence[Row]]
OURS, ONE_LAYER = "ours", "ours, one layer a group"
CACHEGEN = (("chunk 256", 1 / 7), ("chunk 2048", 1 / 5), ("tables free", 1 / 4))


def find(rows: Sequence[Row], method: str, setting: str, way: str = "all") -> Row | None:
    return next((r for r in rows if (r["method"], r["setting"], r["way"]) == (method, setting, way)), None)


def share(rows: Sequence[Row], peer: Row | None, method: str = OURS) -> str | None:
    """Our bytes over the peer's at the peer's KL; ~ where our curve had to be continued beyond its ends."""
    found = None if peer is None else bytes_at(curve(rows, method, "all"), peer["kl"])
    return None if peer is None or found is None else f"{found[0] / peer['bytes']:.3f}{'' if found[1] else '~'}"


def least(rows: Sequence[Row], kinds: Sequence[str], ratio: int = 16) -> Row | None:
    """KVTC at a setting, with the exemptions that cost it least."""
    found = [r for k in kinds if (r := find(rows, "KVTC", f"{ratio}x, {k}")) is not None]
    return min(found, key=lambda r: r["bytes"], default=None)


def bars(stages: Stages) -> str:
    """Of every stage that has what a bar needs."""
    lines = [line for stage, rows in stages.items() for line in (*_ratios(stage, rows), *_tiers(stage, rows))]
    header = ["| stage | bar | asked | measured | met |", "| --- | --- | --- | --- | --- |"]
    return "## Bars\n\n" + "\n".join(header + lines) + "\n\n"


def _line(stage: str, bar: str, asked: float, measured: str | None) -> list[str]:
    if measured is None:
        return []
    return [f"| {stage} | {bar} | {asked:.3g} | {measured} | {'yes' if float(measured.rstrip('~')) <= asked else 'NO'} |"]


def _ratios(stage: str, rows: Sequence[Row]) -> list[str]:
    lines = []
    for way, asked in CACHEGEN:
        lines += _line(stage, f"bytes over CacheGen's as shipped, {way}", asked, share(rows, find(rows, "CacheGen", "bins x1", way)))
    before = find(rows, "CacheGen on keys before RoPE", "bins x1", "tables free")
    lines += _line(stage, "bytes over CacheGen's, keys before RoPE, tables free", 1 / 4, share(rows, before))
    bare, windowed = least(rows, ("sinks, no window", "no sinks, no window")), least(rows, ("sinks and window",))
    lines += _line(stage, "bytes over KVTC's at 16x, no window", 0.45, share(rows, bare))
    lines += _line(stage, "bytes over KVTC's at 16x, window of 128", 0.25, share(rows, windowed))
    return lines + _line(stage, "one layer a group: bytes over KVTC's at 16x, no window", 1.0, share(rows, bare, ONE_LAYER))


def _tiers(stage: str, rows: Sequence[Row]) -> list[str]:
    lines = []
    for tier, asked in (("fine", 8e-4), ("standard", 5e-3)):
        row, alone, ladder = find(rows, OURS, tier), find(rows, OURS, tier, "single tier"), find(rows, OURS, tier, "records")
        if row is not None:
            lines += _line(stage, f"KL of {tier}", asked, f"{row['kl']:.2e}")
        if row is not None and tier == "fine" and "recall" in row:
            lines += _line(stage, "recall of fine below live", 0.005, f"{-row['recall_change']:.4f}")
        if alone is not None and ladder is not None:
            lines += _line(stage, f"ladder over a single tier, {tier}", 0.02, f"{ladder['bytes'] / alone['bytes'] - 1:.4f}")
    return lines


def equal_kl(stages: Stages) -> str:
    """Everything with a curve at the KL of CacheGen as shipped and of KVTC at 16x."""
    header = ["| stage | at the KL of | KL | method | bytes a token | b/v |", "| --- | --- | --- | --- | --- | --- |"]
    lines = []
    for stage, rows in stages.items():
        anchors = {"CacheGen as shipped": find(rows, "CacheGen", "bins x1", "chunk 256"), "KVTC 16x": least(rows, ("no sinks, no window",))}
        for name, anchor in anchors.items():
            lines += [] if anchor is None else _at(f"{stage} | {name}", rows, anchor["kl"])
    return "## Bytes at equal KL\n\nBy interpolation in log-log.\n\n" + "\n".join(header + lines) + "\n\n"


def _at(where: str, rows: Sequence[Row], kl: float) -> list[str]:
    lines = []
    for method, way in dict.fromkeys((r["method"], r["way"]) for r in rows):
        points = curve(rows, method, way)
        found = bytes_at(points, kl)
        if method != "KVTC" and len(points) > 2 and found is not None and found[1]:
            lines.append(f"| {where} | {kl:.2e} | {method}, {way} | {found[0]:.1f} | {8 * found[0] / rows[0]['values']:.3f} |")
    return lines


def equal_recall(stages: Stages, within: float = 0.005) -> str:
    """The fewest bytes of each method among its settings whose recall is at most half a point below live."""
    header = ["| stage | method | setting | bytes a token | b/v | recall | KL |", "| --- | --- | --- | --- | --- | --- | --- |"]
    lines = []
    for stage, rows in stages.items():
        good = [r for r in rows if r["bytes"] and r.get("recall_change", -1.0) >= -within]
        for method, way in dict.fromkeys((r["method"], r["way"]) for r in good):
            r = min((r for r in good if (r["method"], r["way"]) == (method, way)), key=lambda r: r["bytes"])
            size = f"{r['bytes']:.1f} | {8 * r['bytes'] / r['values']:.3f}"
            lines.append(f"| {stage} | {method}, {way} | {r['setting']} | {size} | {r['recall']:.4f} | {r['kl']:.2e} |")
    if not lines:
        return ""
    return "## Fewest bytes with recall within half a point of live\n\n" + "\n".join(header + lines) + "\n\n"
