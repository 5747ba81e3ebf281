"""The connector's scheduler side: what was offered to which request, what is to be loaded, what came back damaged. Knows neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvstore.integrations.vllm_cache import block_range
from kvstore.integrations.vllm_plan import SALT, Matcher, Offer, Part, clip


class Asked(Protocol):
    """What is read of vLLM's Request."""

    request_id: str
    prompt_token_ids: Sequence[int] | None
    prompt_embeds: Any
    prompt_is_token_ids: Any
    mm_features: Any
    lora_request: Any
    cache_salt: str | None
    num_tokens: int
    num_preemptions: int


@dataclass(frozen=True)
class Load:
    """Blocks to be filled for one request: the tokens from position `start` on, made of `parts`."""

    request_id: str
    start: int
    blocks: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(p.count for p in self.parts)


@dataclass
class _Entry:
    """One request. `tried`: blocks were given since it was last preempted; `load` is the newest one, `failed` and `exact` tell of it."""

    preemptions: int
    offer: Offer
    start: int = 0
    tried: bool = False
    load: Load | None = None
    failed: bool = False
    exact: bool = True


@dataclass
class Requests:
    """Every unfinished request that something was offered to."""

    matcher: Matcher
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _due: list[Load] = field(default_factory=list)

    def matched(self, request: Asked, computed: int) -> int:
        """Tokens that can be loaded beyond the `computed` ones (whole blocks). Asked again before blocks are given, it answers again.

        A request that is asked for again without having been preempted lost its load: what failed once is computed, not tried for ever.
        """
        entry = self._entries.get(request.request_id)
        if entry is None:
            entry = self._entries[request.request_id] = _Entry(request.num_preemptions, self._offer(request))
        elif entry.preemptions != request.num_preemptions:
            entry.preemptions, entry.offer, entry.tried = request.num_preemptions, self._offer(request), False
        entry.start = computed
        return 0 if entry.tried else max(0, entry.offer.tokens - computed)

    def _offer(self, request: Asked) -> Offer:
        """Ids alone decide, so requests whose KV depends on more than their ids are offered nothing."""
        more = (request.prompt_embeds, request.prompt_is_token_ids, request.lora_request)
        if request.prompt_token_ids is None or request.mm_features or any(x is not None for x in more):
            return Offer(0)
        approximate = (request.cache_salt or "").startswith(SALT)
        return self.matcher.offer(request.prompt_token_ids, request.num_tokens - 1, approximate)

    def allocated(self, request_id: str, block_ids: Sequence[int], external: int) -> None:
        """vLLM has given the request `block_ids`, the first of them for what it computed, and waits for `external` tokens after that."""
        entry = self._entries.get(request_id)
        if external == 0 or entry is None:
            return
        end = entry.start + external
        blocks = block_range(block_ids, entry.start, end, self.matcher.block_size)
        entry.tried, entry.failed, entry.exact = True, False, entry.offer.exact
        entry.load = Load(request_id, entry.start, blocks, clip(entry.offer.parts, entry.start, end))
        self._due.append(entry.load)

    def take_due(self) -> list[Load]:
        """The loads that were not handed out yet."""
        due, self._due = self._due, []
        return due

    def returned(self, finished: Iterable[str], damaged: set[int]) -> None:
        """Loads that ended, and the blocks that could not be filled."""
        for entry in (self._entries[r] for r in finished if r in self._entries):
            entry.failed |= entry.load is not None and not damaged.isdisjoint(entry.load.blocks)

    def closed(self, request_id: str) -> dict[str, Any] | None:
        """Forget a request. What it took from the store, for its output; None where that is nothing."""
        entry = self._entries.pop(request_id, None)
        if entry is None or entry.load is None:
            return None
        parts = entry.load.parts
        return {
            "tokens": 0 if entry.failed else entry.load.tokens,
            "context": "same prefix" if entry.exact else "approximate",
            "tiers": sorted({p.tier for p in parts}),
            "segments": [p.key for p in parts],
            "failed": entry.failed,
        }
