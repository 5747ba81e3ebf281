"""LlamaIndex: a response synthesizer for `RetrieverQueryEngine`, whose nodes come from the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.api import OpenStore
from kvstore.errors import InputError
from kvstore.integrations import not_installed, plain
from kvstore.integrations.answers import Answerer, Request
from kvstore.receipt import Receipt
from kvstore.sources import Document, text_name

try:
    from llama_index.core.base.response.schema import RESPONSE_TYPE
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.llms import CustomLLM, LLMMetadata
    from llama_index.core.response_synthesizers import BaseSynthesizer
    from llama_index.core.schema import NodeWithScore, QueryType
except ImportError as error:
    raise not_installed("llama-index", error) from error


class StoredNodesSynthesizer(BaseSynthesizer):
    """Answers a query over retrieved nodes; the receipt is in `response.metadata["receipt"]` (`receipt_of` reads it).

    `RetrieverQueryEngine(retriever, StoredNodesSynthesizer(store))`. Nodes keep their boundaries; the prompt is that of the store (its system
    text, its way to write documents) and holds a node's text without its metadata. A node is found by its text; its name in the receipt is
    the file in its metadata (`file_path`), where that is told, else its id.

    `options` are those of `store.compose` (`reuse`, `tier`, `max_kl`...), `stop` (strings that end an answer and are not part of it), and those of
    `model.generate` (default: `max_new_tokens=256`, `do_sample=False`); `synthesize(..., **options)` goes before them. With `streaming` the
    response gives tokens as they are generated, its receipt is there at once.
    """

    def __init__(self, store: OpenStore, *, streaming: bool = False, callback_manager: CallbackManager | None = None, **options: Any):
        self.answerer = Answerer(store, options)
        source = store.source
        super().__init__(
            llm=StoreModel(name=source.identity.name, context=source.context_tokens), callback_manager=callback_manager, streaming=streaming
        )

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **options: Any,
    ) -> RESPONSE_TYPE:
        """Raises what `store.compose` does. Without nodes: the framework's empty response, which carries no receipt."""
        return super().synthesize(query, nodes, additional_source_nodes, retrieved=nodes, **options)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **options: Any,
    ) -> RESPONSE_TYPE:
        """The same, with the work in a thread."""
        return await super().asynthesize(query, nodes, additional_source_nodes, retrieved=nodes, **options)

    def get_response(self, query_str: str, text_chunks: Sequence[str], *, retrieved: Sequence[NodeWithScore] | None = None, **options: Any) -> Any:
        """The answer's text, or a generator of it: each of `text_chunks` is one document. `synthesize` passes the nodes."""
        answered = self._answered(Request(_documents(text_chunks, retrieved), query_str), options)
        return answered.body if retrieved is None else answered

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], *, retrieved: Sequence[NodeWithScore] | None = None, **options: Any
    ) -> Any:
        """The same in a thread; the generator is an asynchronous one."""
        request = Request(_documents(text_chunks, retrieved), query_str)
        answered = await asyncio.to_thread(self._answered, request, options)
        if isinstance(answered.body, Generator):
            answered = Answered(_asynchronous(answered.body), answered.receipt)
        return answered.body if retrieved is None else answered

    def _answered(self, request: Request, options: dict[str, Any]) -> Answered:
        if self._streaming:
            stream = self.answerer.stream(request, options)
            return Answered(iter(stream), stream.receipt)
        answer = self.answerer.answer(request, options)
        return Answered(answer.text, answer.receipt)

    def _prepare_response_output(self, response_str: Any, source_nodes: list[NodeWithScore]) -> RESPONSE_TYPE:
        """Where the framework makes its response from ours: before anything that listens is told of it."""
        response = super()._prepare_response_output(response_str.body, source_nodes)
        response.metadata = {**(response.metadata or {}), "receipt": plain(response_str.receipt)}
        return response

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        if prompts:
            raise InputError("the prompt is part of the store", remedy="build with another template (kvstore build --template, --system)")


@dataclass(frozen=True)
class Answered:
    """Text, or what gives it, and the receipt of its prompt."""

    body: str | Generator[str, None, None] | AsyncGenerator[str, None]
    receipt: Receipt


class StoreModel(CustomLLM):
    """What LlamaIndex wants to know of the model. It answers nothing: the store's model does, from documents and a question."""

    name: str
    context: int

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=self.context, model_name=self.name)

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        raise InputError("this model takes documents and a question, not a finished prompt", remedy="call the synthesizer or its query engine")

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        return self.complete(prompt, formatted, **kwargs)


def _documents(texts: Sequence[str], retrieved: Sequence[NodeWithScore] | None) -> Sequence[Any]:
    return [Document(text, text_name(text)) for text in texts] if retrieved is None else retrieved


async def _asynchronous(pieces: Generator[str, None, None]) -> AsyncGenerator[str, None]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
