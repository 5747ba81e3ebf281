"""Answers from prompts, and how long the first token takes from the store and without it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvstore.prompt import Prompt

if TYPE_CHECKING:
    from kvstore.api import OpenStore

RUNS = 5
ENOUGH_SECONDS = 5.0


@dataclass(frozen=True)
class FirstToken:
    """Milliseconds until the logits of the first answer token are on the host, best of `runs` each.

    `stored`: compose (look up, read, decode, rotate) and the forward pass over what is not cached. `cold`: one prefill of the same ids.
    """

    tokens: int
    cached_tokens: int
    stored: float
    cold: float
    runs: int

    @property
    def ratio(self) -> float:
        """How many times sooner the first token comes from the store."""
        return self.cold / self.stored


def answer(store: OpenStore, prompt: Prompt, max_new_tokens: int = 64, stop: str = "") -> str:
    """Greedy continuation of a composed prompt, as text without special tokens; it ends with the first token that holds a character of `stop`."""
    return generate(store.model, store.source.tokenizer, prompt.inputs, max_new_tokens, stop)


def live_answer(store: OpenStore, prompt: Prompt, max_new_tokens: int = 64, stop: str = "") -> str:
    """The same from the ids alone, nothing taken from the store."""
    inputs = {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)}
    return generate(store.model, store.source.tokenizer, inputs, max_new_tokens, stop)


def generate(model: Any, tokenizer: Any, inputs: dict[str, Any], max_new_tokens: int, stop: str = "") -> str:
    """Greedy; `inputs` as `model.generate` takes them, one row."""
    return str(tokenizer.decode(generated_ids(model, tokenizer, inputs, max_new_tokens, stop), skip_special_tokens=True))


def generated_ids(model: Any, tokenizer: Any, inputs: dict[str, Any], max_new_tokens: int, stop: str = "") -> list[int]:
    """The same as token ids, special ones included."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def done(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.tensor([any(c in stop for c in tokenizer.decode(ids[0, -1:]))], device=ids.device)

    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, stopping_criteria=[done] if stop else None)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def stream(store: OpenStore, prompt: Prompt, max_new_tokens: int = 64, **generation: Any) -> Iterator[str]:
    """The continuation of a composed prompt piece by piece, as it comes: greedy unless `generation` says otherwise."""
    tokenizer, given = store.source.tokenizer, generation.pop("stopping_criteria", None) or []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": pad, **generation}

    def work(streamer: Any, stopped: Any) -> None:
        with torch.inference_mode():
            store.model.generate(**prompt.inputs, streamer=streamer, stopping_criteria=[*given, stopped], **options)

    return streamed(tokenizer, work)


def streamed(tokenizer: Any, work: Callable[[Any, Any], Any]) -> Generator[str, None, None]:
    """Text while `work(streamer, stopped)` generates it in a thread of its own; `stopped` is to be among its stopping criteria.

    Its errors are raised here. Whoever stops listening stops it at its next token.
    """
    from transformers import TextIteratorStreamer

    left = threading.Event()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def stopped(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        return torch.full((len(ids),), left.is_set(), device=ids.device)

    def run() -> None:
        try:
            work(streamer, stopped)
        finally:  # where it failed, the reader would wait for ever
            streamer.on_finalized_text("", stream_end=True)

    with ThreadPoolExecutor(1, "kvstore-stream") as pool:
        running = pool.submit(run)
        try:
            yield from filter(None, streamer)
        finally:
            left.set()
    running.result()


def first_token(store: OpenStore, documents: Sequence[Any], query: str = "", **options: Any) -> FirstToken:
    """Time `compose` (with its `options`) and its first forward pass against a prefill of the same ids, by turns, after one warm-up each."""
    model = store.model

    def stored() -> Prompt:
        prompt = store.compose(documents, query, **options)
        inputs = prompt.inputs
        last_logits(model, inputs["input_ids"][:, prompt.receipt.cached_tokens :], inputs["past_key_values"])
        return prompt

    prompt = stored()
    first, second, runs = by_turns(stored, lambda: last_logits(model, prompt.input_ids, None))
    return FirstToken(prompt.receipt.prompt_tokens, prompt.receipt.cached_tokens, first * 1e3, second * 1e3, runs)


def last_logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last token's logits, on the host."""
    with torch.inference_mode():
        found: torch.Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return found.cpu()


def by_turns(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float, int]:
    """Best seconds of each and the number of runs, alternating so that both meet the same machine; fewer runs where they take long."""
    begun, bests, runs = time.perf_counter(), [float("inf")] * 2, 0
    for _ in range(1 + RUNS):  # the first round warms up
        if runs > 1 and time.perf_counter() - begun > ENOUGH_SECONDS:
            break
        took = [_seconds(work) for work in (first, second)]
        bests, runs = ([min(b, t) for b, t in zip(bests, took, strict=True)] if runs else [float("inf")] * 2), runs + 1
    return bests[0], bests[1], runs - 1


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
