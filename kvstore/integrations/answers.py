"""What the integrations of frameworks share: from documents and a question to an answer with its receipt, at once, batched or streamed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from transformers import GenerationConfig, GenerationMixin

from kvstore.answering import streamed
from kvstore.api import OpenStore
from kvstore.errors import InputError
from kvstore.prompt import Prompt, collate
from kvstore.receipt import Receipt

T = TypeVar("T")
MAX_NEW_TOKENS = 256
# What `store.compose` takes beside documents and query; every other option is for `model.generate`.
COMPOSE = frozenset(inspect.signature(OpenStore.compose).parameters) - {"self", "documents", "query", "messages"}
GENERATE = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
# What the prompt decides, or would be more than one answer.
REFUSED = frozenset(
    "inputs input_ids attention_mask past_key_values use_cache num_return_sequences return_dict_in_generate streamer tokenizer stop_strings "
    "assistant_model assistant_tokenizer prompt_lookup_num_tokens custom_generate".split()
)


@dataclass(frozen=True)
class Request:
    """One question over its documents, in their order in the prompt. `history`: earlier turns, as `store.compose(messages=)` takes them."""

    documents: Any
    query: str
    history: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Answer:
    """`text` ends before the first stop string; `tokens` were generated; `finish` is `length` where they were all that was allowed."""

    text: str
    receipt: Receipt
    tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Options:
    """Keyword arguments, sorted out: for `store.compose`, for `model.generate`, and the strings that end an answer."""

    compose: dict[str, Any]
    generate: dict[str, Any]
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Greedy, at most MAX_NEW_TOKENS tokens, where not told otherwise. Raises InputError for what an answer cannot be generated with."""
        if refused := sorted(REFUSED & given.keys()):
            raise InputError(f"{', '.join(refused)}: set by kvstore itself", remedy="leave it out (strings that end an answer: stop=)")
        compose = {k: v for k, v in given.items() if k in COMPOSE}
        generate = {k: v for k, v in given.items() if k not in COMPOSE and k != "stop"}
        unknown = GenerationConfig().update(**{k: v for k, v in generate.items() if k not in GENERATE})
        if unknown:
            raise InputError(f"unknown option {', '.join(sorted(unknown))}", remedy="pass those of store.compose, stop=, or those of model.generate")
        return cls(compose, _defaults(generate) | generate, _stop(given.get("stop")))

    def get(self, name: str, model: Any) -> Any:
        """A setting of generation as it will hold: given by itself, in a `generation_config`, or the model's own."""
        config = self.generate.get("generation_config") or model.generation_config
        return self.generate.get(name, getattr(config, name, None))


def _defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments go before what a `generation_config` says: there must be none that nobody gave."""
    if "generation_config" in given:
        return {}
    return {"do_sample": False} if "max_length" in given else {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}


def _stop(given: str | Iterable[str] | None) -> tuple[str, ...]:
    strings = (given,) if isinstance(given, str) else tuple(given or ())
    if not all(isinstance(s, str) and s for s in strings):
        raise InputError("a stop string is empty or no string", remedy="pass stop=['...']")
    return strings


class Answerer:
    """A store that answers. `options`: those of `store.compose` (`reuse`, `tier`, `max_kl`...), `stop`, and those of `model.generate`.

    Each method takes options that go before these. Threads may share one.
    """

    def __init__(self, store: OpenStore, options: Mapping[str, Any]):
        if not isinstance(store, OpenStore):
            raise InputError(f"{type(store).__name__} is not an open store", remedy="pass kvstore.open(path, model, tokenizer)")
        self.store, self.options = store, dict(options)
        Options.of(options)

    def with_options(self, more: Mapping[str, Any]) -> Options:
        return Options.of(self.options | dict(more))

    def answer(self, request: Request, more: Mapping[str, Any]) -> Answer:
        """Raises what `store.compose` and `model.generate` do."""
        options = self.with_options(more)
        prompt = self.composed(request, options)
        (ids,) = self.generate(prompt.inputs, options)
        return self.finished(ids, prompt.receipt, options)

    def batch(self, requests: Sequence[Request | Exception], more: Mapping[str, Any], rows: int) -> list[Answer | Exception]:
        """An answer for each request, or what it failed with; `rows` at a time go through the model together, each over its own documents.

        A request that has failed already keeps its place.
        """
        options = self.with_options(more)
        groups = [self._together(requests[first : first + rows], options) for first in range(0, len(requests), rows)]
        return [answer for group in groups for answer in group]

    def stream(self, request: Request, more: Mapping[str, Any]) -> Stream:
        """An answer that comes in pieces. Its prompt is composed here, so that the receipt is known before the first token."""
        options = self.with_options(more)
        return Stream(self, self.composed(request, options), options)

    def composed(self, request: Request, options: Options) -> Prompt:
        if not request.history:
            return self.store.compose(request.documents, request.query, **options.compose)
        messages = [*request.history, {"role": "user", "content": request.query}]
        return self.store.compose(request.documents, messages=messages, **options.compose)

    def _together(self, requests: Sequence[Request | Exception], options: Options) -> list[Answer | Exception]:
        prompts = [r if isinstance(r, Exception) else tried(self.composed, r, options) for r in requests]
        good = [p for p in prompts if isinstance(p, Prompt)]
        answers: list[Answer | Exception] = []
        try:
            rows = self.generate(collate(good, self.pad), options) if good else []
            answers += [self.finished(ids, p.receipt, options) for ids, p in zip(rows, good, strict=True)]
        except Exception as error:  # of the group: which row it came from cannot be told
            answers = [error] * len(good)
        left = iter(answers)
        return [p if isinstance(p, Exception) else next(left) for p in prompts]

    def generate(self, inputs: dict[str, Any], options: Options, **more: Any) -> list[list[int]]:
        """Generated ids of each row, padded where a row ended before others."""
        settings = {"pad_token_id": self.pad, "tokenizer": self.store.source.tokenizer, **options.generate, **more}
        if options.stop:
            settings["stop_strings"] = list(options.stop)
        beams = int(options.get("num_beams", self.store.model) or 1)
        if beams > 1:  # generate repeats the ids for each beam, but not the cache
            inputs["past_key_values"].batch_repeat_interleave(beams)
        with torch.inference_mode():
            rows = self.store.model.generate(**inputs, **settings)
        found: list[list[int]] = rows[:, inputs["input_ids"].shape[1] :].tolist()
        return found

    def finished(self, row: Sequence[int], receipt: Receipt, options: Options) -> Answer:
        ends = self._ends(options)
        ids = list(row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))])
        text = str(self.store.source.tokenizer.decode(ids, skip_special_tokens=True))
        kept = "".join(before_stop([text], options.stop))
        padding = {self.pad} | ends if kept != text else {self.pad} - ends  # after a stop string even the end-of-sequence token is padding
        while ids and ids[-1] in padding:
            ids.pop()
        return Answer(kept, receipt, len(ids), "stop" if kept != text or ends & set(ids[-1:]) else "length")

    @property
    def pad(self) -> int | None:
        tokenizer = self.store.source.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _ends(self, options: Options) -> set[int]:
        given = options.get("eos_token_id", self.store.model)
        return set() if given is None else set(given) if isinstance(given, (list, tuple)) else {given}


class Stream:
    """Iterating gives text as it is generated. `receipt` is there from the start, `answer` at the end."""

    def __init__(self, answerer: Answerer, prompt: Prompt, options: Options):
        self.answerer, self.prompt, self.options = answerer, prompt, options
        self.receipt = prompt.receipt
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """Raises InputError while text is still to come."""
        if self._answer is None:
            raise InputError("the answer is not complete yet", remedy="iterate to its end first")
        return self._answer

    def __iter__(self) -> Generator[str, None, None]:
        """Generation runs in a thread of its own; one that nobody waits for any more ends at its next token."""
        rows: list[list[int]] = []
        given = self.options.generate.get("stopping_criteria") or []

        def work(streamer: Any, stopped: Any) -> None:
            rows[:] = self.answerer.generate(self.prompt.inputs, self.options, streamer=streamer, stopping_criteria=[*given, stopped])

        with closing(streamed(self.answerer.store.source.tokenizer, work)) as pieces:
            yield from before_stop(pieces, self.options.stop)
        self._answer = self.answerer.finished(rows[0], self.receipt, self.options)


def tried(work: Callable[..., T], *given: Any) -> T | Exception:
    """What it gives, or what it raises: one row that fails takes no other row's answer away."""
    try:
        return work(*given)
    except Exception as error:
        return error


def before_stop(pieces: Iterable[str], stop: Sequence[str]) -> Generator[str, None, None]:
    """Text up to the first stop string; what may be the beginning of one is held back until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.index(s) for s in stop if s in held]
        if ends:
            yield from filter(None, [held[: min(ends)]])
            return
        begun = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        said, held = held[: len(held) - begun], held[len(held) - begun :]
        yield from filter(None, [said])
    yield from filter(None, [held])
