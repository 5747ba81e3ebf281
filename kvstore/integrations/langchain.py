"""LangChain: a Runnable in the place of `create_stuff_documents_chain`, whose documents come from the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from kvstore.api import OpenStore
from kvstore.errors import InputError
from kvstore.integrations import not_installed, plain
from kvstore.integrations.answers import Answer, Answerer, Request, tried
from kvstore.receipt import Receipt

try:
    from langchain_core.messages import AIMessage, AIMessageChunk, convert_to_openai_messages
    from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
    from langchain_core.runnables import Runnable, RunnableConfig
    from langchain_core.runnables.config import run_in_executor
except ImportError as error:
    raise not_installed("langchain", error) from error

_END = object()


class StoredDocumentsChain(Runnable[dict[str, Any], AIMessage]):
    """Answers `{"context": [Document], "input": str}` with an AIMessage, its receipt in `response_metadata["receipt"]` (`receipt_of` reads it).

    It fits into `create_retrieval_chain(retriever, chain)` and `RunnablePassthrough.assign(answer=chain)`; `chain | StrOutputParser()` gives the
    text alone. The prompt is that of the store (its system text, its way to write documents): `context` holds Documents, not their text in one
    string. A document is found by its text; its name in the receipt is the file in its metadata (`source`), where that is told.

    `options` are those of `store.compose` (`reuse`, `tier`, `max_kl`...), `stop` (strings that end an answer and are not part of it), and those of
    `model.generate` (default: `max_new_tokens=256`, `do_sample=False`). `invoke(..., **options)` and `bind(**options)` go before them.
    Where the input has a `chat_history` (messages), its turns stand between the documents and the question.
    `batch_size`: rows that `batch` sends through the model together, at most; `max_concurrency` of the config may lower it. (A chain around this
    one may call `invoke` in threads instead, as `RunnablePassthrough.assign` does.)
    `usage_metadata` counts the tokens that were in the cache as `cache_read`.
    """

    def __init__(
        self,
        store: OpenStore,
        *,
        documents_key: str = "context",
        query_key: str = "input",
        history_key: str = "chat_history",
        batch_size: int = 8,
        **options: Any,
    ):
        if batch_size < 1:
            raise InputError(f"a batch of {batch_size}", remedy="pass batch_size=1 or more")
        self.answerer, self.batch_size = Answerer(store, options), batch_size
        self.documents_key, self.query_key, self.history_key = documents_key, query_key, history_key

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        """Raises InputError for an input without its keys, and what `store.compose` raises."""
        return self._call_with_config(lambda given: self._message(self.answerer.answer(self._request(given), kwargs)), input, config)

    def batch(
        self,
        inputs: list[dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """As `invoke` for each, several rows at a time."""
        first = (config[0] if config else None) if isinstance(config, list) else config
        rows = min(self.batch_size, (first or {}).get("max_concurrency") or self.batch_size)

        def answers(given: list[dict[str, Any]]) -> list[AIMessage | Exception]:
            found = self.answerer.batch([tried(self._request, i) for i in given], kwargs, rows)
            return [a if isinstance(a, Exception) else self._message(a) for a in found]

        return self._batch_with_config(answers, inputs, config, return_exceptions=return_exceptions)

    async def abatch(
        self,
        inputs: list[dict[str, Any]],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        return await run_in_executor(None, partial(self.batch, inputs, config, return_exceptions=return_exceptions, **kwargs))

    def stream(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[AIMessageChunk]:
        """Chunks while they are generated: the first has the receipt, the last the counts; their sum is the message of `invoke`."""

        def chunks(inputs: Iterator[dict[str, Any]]) -> Iterator[AIMessageChunk]:
            for given in inputs:
                yield from self._chunks(given, kwargs)

        yield from self._transform_stream_with_config(iter([input]), chunks, config)

    async def astream(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[AIMessageChunk]:
        async def one() -> AsyncIterator[dict[str, Any]]:
            yield input

        async def chunks(inputs: AsyncIterator[dict[str, Any]]) -> AsyncIterator[AIMessageChunk]:
            async for given in inputs:
                source = self._chunks(given, kwargs)
                while (chunk := await run_in_executor(None, next, source, _END)) is not _END:
                    yield chunk

        async for chunk in self._atransform_stream_with_config(one(), chunks, config):
            yield chunk

    def _chunks(self, given: dict[str, Any], options: Mapping[str, Any]) -> Iterator[AIMessageChunk]:
        stream = self.answerer.stream(self._request(given), options)
        yield AIMessageChunk(content="", response_metadata=self._origin(stream.receipt))
        for text in stream:
            yield AIMessageChunk(content=text)
        yield AIMessageChunk(content="", response_metadata={"finish_reason": stream.answer.finish}, usage_metadata=_usage(stream.answer))

    def _message(self, answer: Answer) -> AIMessage:
        metadata = self._origin(answer.receipt) | {"finish_reason": answer.finish}
        return AIMessage(content=answer.text, response_metadata=metadata, usage_metadata=_usage(answer))

    def _origin(self, receipt: Receipt) -> dict[str, Any]:
        return {"receipt": plain(receipt), "model_name": self.answerer.store.source.identity.name}

    def _request(self, given: Any) -> Request:
        documents, query = (self._field(given, key) for key in (self.documents_key, self.query_key))
        if isinstance(documents, str):
            raise InputError(
                f"{self.documents_key!r} is one string, in which no document can be told from the next",
                remedy="pass the retriever's Documents as they are, without a format_docs",
            )
        history = given.get(self.history_key) or []
        if isinstance(history, str):
            raise InputError(f"{self.history_key!r} is one string", remedy="pass messages, such as [HumanMessage(...), AIMessage(...)]")
        return Request(documents, query, convert_to_openai_messages(list(history)))

    def _field(self, given: Any, key: str) -> Any:
        if not isinstance(given, Mapping) or key not in given:
            found = f"the keys {', '.join(map(repr, given))}" if isinstance(given, Mapping) else type(given).__name__
            raise InputError(f"the chain's input lacks {key!r}: got {found}", remedy="see documents_key= and query_key=")
        return given[key]


def _usage(answer: Answer) -> UsageMetadata:
    read, written = answer.receipt.prompt_tokens, answer.tokens
    return UsageMetadata(
        input_tokens=read,
        output_tokens=written,
        total_tokens=read + written,
        input_token_details=InputTokenDetails(cache_read=answer.receipt.cached_tokens),
    )
