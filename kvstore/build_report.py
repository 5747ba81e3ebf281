"""What a build says of itself, and when its packs close."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvstore.chain_plan import ChainReport
from kvstore.documents import Skipped


@dataclass(frozen=True)
class Limits:
    """When a pack closes: what a kill may cost is at most one open pack."""

    nbytes: int = 256 << 20
    segments: int = 4096
    seconds: float = 60.0


LIMITS = Limits()


@dataclass
class BuildReport:
    """What a build did. Seconds are wall clock; `nbytes` is what the new artifacts' units take, by tier, and `state` of models that have one.

    `calibration`: digest of the one used.

    `quality`: by lossy tier the figures of this build's quality report. `poor_fit`: sampled documents that lose far more than is usual.
    `chains`: what a query log asked for and what is stored for it, None without one.
    """

    store: str
    snapshot: int = 0
    documents: int = 0
    compiled: int = 0
    unchanged: int = 0
    removed: int = 0
    segments: int = 0
    tokens: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    packs: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("calibrate", "prefill", "policy", "encode", "write", "certify", "total"), 0.0)
    )
    calibration: str = ""
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    poor_fit: list[str] = field(default_factory=list)
    chains: ChainReport | None = None
    notes: list[str] = field(default_factory=list)
    serves: str = ""
    interrupted: bool = False


Progress = Callable[[BuildReport, str], None]


class Timer:
    """Adds the seconds spent in its block to a part of a report."""

    def __init__(self, into: dict[str, float], part: str):
        self.into, self.part = into, part

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.into[self.part] += time.perf_counter() - self.started
