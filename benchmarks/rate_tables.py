"""Tables and plots from the rows of `rate_quality.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rate_bars import bars, equal_kl, equal_recall
from rate_rows import Curve, Row, curve, load


def write(results: Path, name: str) -> None:
    """`name`.md and the plots from `name`.jsonl."""
    rows = load(results / f"{name}.jsonl")
    stages = list(dict.fromkeys(r["stage"] for r in rows))
    by_stage = {s: [r for r in rows if r["stage"] == s] for s in stages}
    summary = bars(by_stage) + equal_kl(by_stage) + equal_recall(by_stage)
    text = "# Bytes at equal quality\n\n" + PREFACE + summary
    text += "\n".join(stage_table(s, found) for s, found in by_stage.items())
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    print(summary)
    for stage, found in by_stage.items():
        plot(found, stage, results / f"{name}-{stage.replace(' ', '-')}.png")


PREFACE = """KL: nats a token, live against reconstructed, mean over documents with half its 95 % interval by document; on facts over the tokens
of answers. b/v: bits a stored value. Ratio: against 16 bit. Ours counts as `all` what a store grows by (records, headers, checksums, index, rows,
token ids), as `records` without rows and ids; peers pay for no ids. Calibrations are left out on both sides. Everything runs in float32.

"""


def stage_table(stage: str, rows: Sequence[Row]) -> str:
    recall = any("recall" in r for r in rows)
    header = ["method", "setting", "counted", "bytes a token", "b/v", "ratio", "KL", "+-", "agree", *(["recall", "change +-"] if recall else [])]
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(cells(r, recall)) for r in rows)]
    first = rows[0]
    setting = {k: first[k] for k in ("model", "values", "text", "tokens", "documents")} | {"calibrated on": first["calibration"]}
    if recall:
        setting["live recall"] = round(first["live_recall"], 4)
    return f"## {stage}\n\n" + "\n".join(f"| {line} |" for line in lines) + f"\n\n{json.dumps(setting)}\n"


def cells(row: Row, recall: bool) -> list[str]:
    size = row["bytes"]
    ratio = f"{2 * row['values'] / size:.1f}" if size else ""
    found = [row["method"], row["setting"], row["way"], f"{size:.1f}", f"{8 * size / row['values']:.3f}", ratio]
    found += [f"{row['kl']:.2e}", f"{row['kl_half']:.0e}", f"{row['agree']:.4f}"]
    if recall:
        found += [f"{row['recall']:.4f}", f"{row['recall_change']:+.4f} {row['recall_change_half']:.4f}"]
    return found


def plot(rows: Sequence[Row], stage: str, path: Path) -> None:
    """KL over bytes a token, one line a method and way of counting that a reader would choose."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    shown = ("all", "chunk 256", "chunk 2048", "tables free")
    for method, way in dict.fromkeys((r["method"], r["way"]) for r in rows if r["way"] in shown and r["bytes"]):
        for part in parts(rows, method, way):
            ours = method.startswith("ours")
            axes.plot([b for _, b in part[1]], [k for k, _ in part[1]], marker="o" if ours else "s", ms=4, lw=2.2 if ours else 1.2, label=part[0])
    axes.set(xscale="log", yscale="log", xlabel="bytes a token", ylabel="KL, nats a token", ylim=(1e-5, None))
    axes.set_title(f"{stage}: {rows[0]['model']}, {rows[0]['documents']} documents of {rows[0]['tokens']} tokens", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parts(rows: Sequence[Row], method: str, way: str) -> list[tuple[str, Curve]]:
    """Labelled curves; KVTC's exemptions are curves of their own."""
    label = method if way == "all" else f"{method}, {way}"
    if method != "KVTC":
        return [(label, curve(rows, method, way))]
    kinds = dict.fromkeys(r["setting"].partition(", ")[2] for r in rows if r["method"] == method)
    return [(f"{label}, {kind}", curve([r for r in rows if r["setting"].endswith(f"x, {kind}")], method, way)) for kind in kinds]
