"""What a load or a prompt did, and why: kept apart are where tokens came from (context) and how exactly (fidelity)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class DocumentReceipt(msgspec.Struct, frozen=True):
    """One piece of a prompt.

    `action`: reused (stored after these very tokens), moved (stored alone, rotated to its place), prefilled (computed now or by the first forward
    pass). `context`: same prefix, or approximate where the piece did not see what stands before it. `fidelity`: lossless, a tier's name, or live.
    `kl` is nats a token where known, 0 for lossless; `kl_from` says from what: `exact`, measured on this `artifact`, or the upper bound of the
    encoding's `report`.
    """

    source: str
    tokens: int
    action: Literal["reused", "moved", "prefilled"]
    why: str
    context: Literal["same prefix", "approximate"]
    fidelity: str
    kl: float | None
    nbytes: int
    kl_from: Literal["exact", "artifact", "report"] | None = None

    @property
    def shown(self) -> str:
        """The fidelity for people: `lossless`, `fine (KL 0.00021)`, `fine (KL up to 0.00035)`, `fine (KL not measured)`."""
        if self.fidelity in ("lossless", "live"):
            return self.fidelity
        if self.kl is None:
            return f"{self.fidelity} (KL not measured)"
        return f"{self.fidelity} (KL {'' if self.kl_from == 'artifact' else 'up to '}{self.kl:.2g})"


class Receipt(msgspec.Struct, frozen=True):
    """The whole prompt: what it was put together from and what that cost."""

    snapshot: int
    model: str
    template: str
    encoding: str
    reuse: str
    documents: tuple[DocumentReceipt, ...]
    prompt_tokens: int
    cached_tokens: int
    nbytes: int
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        return msgspec.to_builtins(self)

    @property
    def exact(self) -> bool:
        """Whether every cached token is bit for bit what a live prefix would have been."""
        return all(d.context == "same prefix" and d.fidelity in ("lossless", "live") for d in self.documents)

    def __str__(self) -> str:
        lines = [f"{d.source}: {d.tokens} tokens {d.action} ({d.why}); {d.context}, {d.shown}" for d in self.documents]
        stored = sum(d.tokens for d in self.documents if d.action != "prefilled")
        total = f"{stored} of {self.prompt_tokens} tokens from the store, {self.nbytes:,} bytes, {self.milliseconds:.1f} ms"
        return "\n".join([*lines, total])
