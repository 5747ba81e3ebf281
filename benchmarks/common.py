"""What the benchmarks share: the texts, the model, paired timing, and tables.

Every figure is a ratio between two things measured alternately in one run, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from kvstore import Document, bundled
from kvstore.models import ModelSource

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """The options of all benchmarks."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--corpus", type=Path, help="folder of text or Markdown files (default: Python's own help topics)")
    p.add_argument("--model", help="path of a model (default: the bundled one)")
    p.add_argument(
        "--dtype", help="run the model in this dtype (default: its own); where bfloat16 is not in the processor, float32 is the harder test"
    )
    p.add_argument("--runs", type=int, default=9, help="timed repetitions of each side (default: 9)")
    return p


def model_of(args: argparse.Namespace) -> ModelSource:
    transformers.utils.logging.disable_progress_bar()
    return ModelSource(args.model, dtype=args.dtype)


def result_name(name: str, args: argparse.Namespace) -> str:
    """Results of another dtype are kept beside those of the model's own."""
    return name if args.dtype is None else f"{name}_{args.dtype}"


def text_of(corpus: Path | None) -> str:
    """One long text: every file of the corpus, or the help topics that all Pythons carry."""
    if corpus is None:
        return "\n\n".join(text for _, text in bundled.english_topics())
    return "\n\n".join(p.read_text(encoding="utf-8") for p in sorted(corpus.rglob("*")) if p.suffix in (".txt", ".md"))


def documents(corpus: Path | None, tokenizer: Any, tokens: int, count: int) -> list[Document]:
    """`count` documents of about `tokens` tokens each, cut one after another from the corpus."""
    text = text_of(corpus)
    ids = tokenizer(text[: tokens * count * 8], add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[i * tokens : (i + 1) * tokens]).strip() for i in range(count)]
    return [Document(piece, f"{tokens}/{i:03d}.txt") for i, piece in enumerate(pieces) if piece]


def paired(sides: dict[str, Callable[[], object]], runs: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each side over `runs` alternating repetitions."""
    for _ in range(warmup):
        for call in sides.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, call in sides.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(seconds: dict[str, list[float]], top: str, bottom: str) -> float:
    """Median over the paired repetitions of top / bottom."""
    return statistics.median(a / b for a, b in zip(seconds[top], seconds[bottom], strict=True))


def kl(live: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL divergence per position, nats, of next-token distributions given as logits [..., vocabulary]."""
    a, b = live.float().log_softmax(-1), other.float().log_softmax(-1)
    return (a.exp() * (a - b)).sum(-1)


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], name: str, setting: dict[str, Any], folder: Path = RESULTS) -> None:
    """Print a table as Markdown and keep it, with its setting, under results/ or another folder."""
    cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [" | ".join(header), " | ".join("---" for _ in header), *(" | ".join(row) for row in cells)]
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    text = f"## {title}\n\n" + "\n".join(f"| {line} |" for line in lines) + f"\n\n{json.dumps(setting | machine)}\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
