"""What a load or a prompt did, and why: kept apart are where tokens came from (context) and how exactly (fidelity)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class DocumentReceipt(msgspec.Struct, frozen=True):
    """One piece of a prompt.

    `action`: reused (stored after these very tokens), moved (stored alone, rotated to its place), recomputed (moved, then `recomputed` of its tokens
    computed anew among the others), prefilled (computed now or by the first forward pass). `context`: same prefix, or approximate where the piece did
    not see what stands before it, or what it saw was approximate. `fidelity`: lossless, a tier's name, or live; of what came from the store.
    `cut`: of a prefilled piece, how many of its first tokens came from the store nevertheless, and have that fidelity; None where none did.
    `kl` is nats a token where known, 0 for lossless; `kl_from` says from what: `exact`, measured on this `artifact`, or the upper bound of the
    encoding's `report`.
    """

    source: str
    tokens: int
    action: Literal["reused", "moved", "recomputed", "prefilled"]
    why: str
    context: Literal["same prefix", "approximate"]
    fidelity: str
    kl: float | None
    nbytes: int
    kl_from: Literal["exact", "artifact", "report"] | None = None
    recomputed: int = 0
    cut: int | None = None

    @property
    def stored(self) -> int:
        """Tokens whose keys and values came from the store."""
        return (self.cut or 0) if self.action == "prefilled" else self.tokens - self.recomputed

    @property
    def partly(self) -> str:
        return "" if self.cut is None else f", the first {self.cut} of them reused"

    @property
    def shown(self) -> str:
        """The fidelity for people: `lossless`, `fine (KL 0.00021)`, `fine (KL up to 0.00035)`, `fine (KL not measured)`."""
        if self.fidelity in ("lossless", "live"):
            return self.fidelity
        if self.kl is None:
            return f"{self.fidelity} (KL not measured)"
        return f"{self.fidelity} (KL {'' if self.kl_from == 'artifact' else 'up to '}{self.kl:.2g})"


class Receipt(msgspec.Struct, frozen=True):
    """The whole prompt: what it was put together from and what that cost. `recompute` is the reuse mode's budget, None where it has none.

    `order`: whether documents could be put in another order so that more is reused. `given`: their order as asked for, where it was changed.
    """

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
    recompute: int | float | None = None
    peak_nbytes: int = 0
    order: Literal["given", "cached"] = "given"
    given: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return msgspec.to_builtins(self)

    @property
    def exact(self) -> bool:
        """Whether every cached token is bit for bit what a live prefix would have been (up to rounding where the store was built in batches)."""
        return all(d.context == "same prefix" and d.fidelity in ("lossless", "live") for d in self.documents)

    def __str__(self) -> str:
        lines = [f"{d.source}: {d.tokens} tokens {d.action}{d.partly} ({d.why}); {d.context}, {d.shown}" for d in self.documents]
        if self.given is not None:
            lines.append(f"documents were reordered, so that more is reused; given: {', '.join(self.given)}")
        stored = sum(d.stored for d in self.documents)
        total = f"{stored} of {self.prompt_tokens} tokens from the store, {self.nbytes:,} bytes, {self.milliseconds:.1f} ms"
        return "\n".join([*lines, total])
