"""Integrations of LangChain and LlamaIndex, and their examples: answers are the live ones, and say where they came from."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from langchain_classic.chains import create_retrieval_chain
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document as LangChainDocument
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from transformers import GenerationConfig

import kvstore
from kvstore import bundled
from kvstore.answering import live_answer
from kvstore.errors import InputError, NotFoundError
from kvstore.integrations import receipt_of
from kvstore.integrations.answers import before_stop
from kvstore.integrations.langchain import StoredDocumentsChain
from kvstore.integrations.llama_index import StoredNodesSynthesizer
from kvstore.receipt import Receipt
from tests.contracts.integration import LANTERN, LENGTH, TEXTS, TOWER, Asked, IntegrationContract

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LETTERS = ("letters/about-the-inheritance.md", "letters/from-the-expedition.md")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> kvstore.OpenStore:
    path = tmp_path_factory.mktemp("store") / "kv.zarr"
    chunks = [LangChainDocument(page_content=text, metadata={"source": file}) for text, file in TEXTS]
    kvstore.build(chunks, path, regime="both", codec="scalar", lossless=True, dtype="float32", certify="none")
    return kvstore.open(path, dtype="float32")


class TestLangChain(IntegrationContract):
    def document(self, text: str, file: str) -> LangChainDocument:
        return LangChainDocument(page_content=text, metadata={"source": file})

    def made(self, store: kvstore.OpenStore, **options: Any) -> StoredDocumentsChain:
        return StoredDocumentsChain(store, **options)

    def ask(self, made: Any, documents: Sequence[Any], query: str, **options: Any) -> Asked:
        message = made.invoke({"context": documents, "input": query}, **options)
        return message.content, receipt_of(message)

    async def aask(self, made: Any, documents: Sequence[Any], query: str) -> Asked:
        message = await made.ainvoke({"context": documents, "input": query})
        return message.content, receipt_of(message)

    def stream(self, made: Any, documents: Sequence[Any], query: str) -> tuple[Receipt, Iterator[str]]:
        chunks = made.stream({"context": documents, "input": query})
        return receipt_of(next(chunks)), (c.content for c in chunks if c.content)

    async def astream(self, made: Any, documents: Sequence[Any], query: str) -> tuple[Receipt, AsyncIterator[str]]:
        chunks = made.astream({"context": documents, "input": query})
        return receipt_of(await anext(chunks)), (c.content async for c in chunks)


class TestLlamaIndex(IntegrationContract):
    def document(self, text: str, file: str) -> NodeWithScore:
        return NodeWithScore(node=TextNode(text=text, metadata={"file_path": file}), score=1.0)

    def made(self, store: kvstore.OpenStore, **options: Any) -> StoredNodesSynthesizer:
        return StoredNodesSynthesizer(store, **options)

    def ask(self, made: Any, documents: Sequence[Any], query: str, **options: Any) -> Asked:
        response = made.synthesize(query, documents, **options)
        return response.response, receipt_of(response)

    async def aask(self, made: Any, documents: Sequence[Any], query: str) -> Asked:
        response = await made.asynthesize(query, documents)
        return response.response, receipt_of(response)

    def stream(self, made: Any, documents: Sequence[Any], query: str) -> tuple[Receipt, Iterator[str]]:
        made = StoredNodesSynthesizer(made.answerer.store, streaming=True, **made.answerer.options)
        response = made.synthesize(query, documents)
        return receipt_of(response), response.response_gen

    async def astream(self, made: Any, documents: Sequence[Any], query: str) -> tuple[Receipt, AsyncIterator[str]]:
        made = StoredNodesSynthesizer(made.answerer.store, streaming=True, **made.answerer.options)
        response = await made.asynthesize(query, documents)
        return receipt_of(response), response.async_response_gen()


def documents(*numbers: int) -> list[LangChainDocument]:
    return [LangChainDocument(page_content=TEXTS[n][0], metadata={"source": TEXTS[n][1]}) for n in numbers]


class Heard(BaseCallbackHandler):
    """Runs that began and ended, by name."""

    def __init__(self) -> None:
        self.began: list[Any] = []
        self.ended: list[Any] = []
        self.failed: list[BaseException] = []

    def on_chain_start(self, serialized: Any, inputs: Any, **more: Any) -> None:
        self.began.append((more.get("name"), more.get("tags")))

    def on_chain_end(self, outputs: Any, **more: Any) -> None:
        self.ended.append(outputs)

    def on_chain_error(self, error: BaseException, **more: Any) -> None:
        self.failed.append(error)


def test_a_retrieval_chain_gives_the_message(store: kvstore.OpenStore) -> None:
    chain = create_retrieval_chain(RunnableLambda(lambda given: documents(0, 1)), StoredDocumentsChain(store, **LENGTH))
    output = chain.invoke({"input": TOWER})
    assert output["context"] == documents(0, 1)
    assert output["answer"].content.startswith(" 4821.")
    assert [d.source for d in receipt_of(output["answer"]).documents] == ["(head)", "tower.md", "lantern.md"]


def test_a_retrieval_chain_streams_tokens(store: kvstore.OpenStore) -> None:
    chain = create_retrieval_chain(RunnableLambda(lambda given: documents(0)), StoredDocumentsChain(store, **LENGTH))
    chunks = [c["answer"] for c in chain.stream({"input": TOWER}) if "answer" in c]
    assert sum(bool(c.content) for c in chunks) > 1
    assert sum(chunks[1:], chunks[0]).content.startswith(" 4821.")


def test_the_chain_goes_into_assign_and_before_a_parser(store: kvstore.OpenStore) -> None:
    chain = StoredDocumentsChain(store, documents_key="found", query_key="question", **LENGTH)
    given = {"found": documents(0), "question": TOWER}
    assert RunnablePassthrough.assign(answer=chain).invoke(given)["answer"].content.startswith(" 4821.")
    assert (chain | StrOutputParser()).invoke(given).startswith(" 4821.")
    assert "".join((chain | StrOutputParser()).stream(given)).startswith(" 4821.")
    assert chain.bind(stop=["."]).invoke(given).content == " 4821"


def test_a_message_tells_its_counts_and_survives_json(store: kvstore.OpenStore) -> None:
    chain = StoredDocumentsChain(store, stop=["."], **LENGTH)
    message = chain.invoke({"context": documents(0), "input": TOWER})
    receipt = receipt_of(message)
    assert message.usage_metadata == {
        "input_tokens": receipt.prompt_tokens,
        "output_tokens": len(store.source.tokenizer(" 4821.").input_ids),
        "total_tokens": receipt.prompt_tokens + message.usage_metadata["output_tokens"],
        "input_token_details": {"cache_read": receipt.cached_tokens},
    }
    assert message.response_metadata["finish_reason"] == "stop"
    assert json.loads(json.dumps(message.response_metadata)) == message.response_metadata
    summed = sum(chunks[1:], chunks[0]) if (chunks := list(chain.stream({"context": documents(0), "input": TOWER}))) else None
    assert isinstance(summed, AIMessageChunk)
    assert (summed.content, summed.usage_metadata) == (message.content, message.usage_metadata)
    assert summed.response_metadata.keys() == message.response_metadata.keys()
    assert chain.invoke({"context": documents(0), "input": TOWER}, max_new_tokens=2).response_metadata["finish_reason"] == "length"


def test_a_batch_answers_each_over_its_own_documents(store: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = StoredDocumentsChain(store, stop=["."], batch_size=2, max_new_tokens=16)
    inputs = [{"context": documents(*n), "input": q} for n, q in [((0,), TOWER), ((1, 0), LANTERN), ((0, 1), TOWER)]]
    rows: list[int] = []
    generate = store.model.generate
    monkeypatch.setattr(store.model, "generate", lambda **given: (rows.append(len(given["input_ids"])), generate(**given))[1])
    together = chain.batch(inputs)
    assert rows == [2, 1]
    alone = [chain.invoke(i) for i in inputs]
    assert [m.content for m in together] == [m.content for m in alone] == [" 4821", " Mercer", " 4821"]
    assert [m.usage_metadata for m in together] == [m.usage_metadata for m in alone]
    rows.clear()
    assert [m.content for m in asyncio.run(chain.abatch(inputs, {"max_concurrency": 1}))] == [m.content for m in alone]
    assert rows == [1, 1, 1]


def test_one_input_that_fails_takes_no_other_answer_away(store: kvstore.OpenStore) -> None:
    heard = Heard()
    chain = StoredDocumentsChain(store, stop=["."], **LENGTH)
    inputs = [{"context": documents(0), "input": TOWER}, {"context": ["no.md"], "input": TOWER}, {"input": TOWER}]
    first, second, third = chain.batch(inputs, {"callbacks": [heard]}, return_exceptions=True)
    assert first.content == " 4821"
    assert isinstance(second, NotFoundError)
    assert isinstance(third, InputError)
    assert (len(heard.began), len(heard.ended), heard.failed) == (3, 1, [second, third])
    with pytest.raises(NotFoundError, match=r"no\.md"):
        chain.batch(inputs)


def test_callbacks_and_config_are_honoured(store: kvstore.OpenStore) -> None:
    heard = Heard()
    chain = StoredDocumentsChain(store, **LENGTH)
    given = {"context": documents(0), "input": TOWER}
    config: Any = {"callbacks": [heard], "run_name": "from the store", "tags": ["rag"]}
    message = chain.invoke(given, config)
    list(chain.stream(given, config))
    assert heard.began == [("from the store", ["rag"])] * 2
    assert heard.ended[0] is message
    assert heard.ended[1].content == message.content

    async def events() -> list[Any]:
        return [e async for e in chain.astream_events(given, version="v2")]

    said = [e["data"]["chunk"].content for e in asyncio.run(events()) if e["event"] == "on_chain_stream"]
    assert "".join(said) == message.content


def test_earlier_turns_stand_before_the_question(store: kvstore.OpenStore) -> None:
    chain = StoredDocumentsChain(store, stop=["."], **LENGTH)
    history = [HumanMessage(LANTERN), AIMessage(" Mercer.")]
    message = chain.invoke({"context": documents(0, 1), "input": TOWER, "chat_history": history})
    turns = [{"role": "user", "content": LANTERN}, {"role": "assistant", "content": " Mercer."}, {"role": "user", "content": TOWER}]
    prompt = store.compose(documents(0, 1), messages=turns)
    assert receipt_of(message).prompt_tokens == prompt.receipt.prompt_tokens
    assert live_answer(store, prompt, stop=".", **LENGTH) == message.content + "."
    without = chain.invoke({"context": documents(0, 1), "input": TOWER, "chat_history": []})
    assert receipt_of(without).prompt_tokens < prompt.receipt.prompt_tokens


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"context": []}, "lacks 'input': got the keys 'context'"),
        (TOWER, "lacks 'context': got str"),
        ({"context": TEXTS[0][0], "input": TOWER}, "in which no document can be told"),
        ({"context": [3], "input": TOWER}, "int is not a document"),
        ({"context": [], "input": "  "}, "needs a query"),
        ({"context": [], "input": TOWER, "chat_history": "Human: hello"}, "'chat_history' is one string"),
    ],
)
def test_inputs_that_cannot_be_are_refused(store: kvstore.OpenStore, given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        StoredDocumentsChain(store).invoke(given)


class Fixed(BaseRetriever):
    """The same nodes for every question."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


class Ended(BaseEventHandler):
    """Responses as listeners get them."""

    found: ClassVar[list[Any]] = []

    def handle(self, event: Any, **more: Any) -> None:
        if isinstance(event, SynthesizeEndEvent):
            self.found.append(dict(event.response.metadata or {}))


def nodes(*numbers: int) -> list[NodeWithScore]:
    made = [TextNode(text=TEXTS[n][0], metadata={"file_path": TEXTS[n][1]}, id_=f"node-{n}") for n in numbers]
    return [NodeWithScore(node=node, score=1.0) for node in made]


def test_a_query_engine_answers_and_tells_its_listeners(store: kvstore.OpenStore) -> None:
    engine = RetrieverQueryEngine(Fixed(nodes(0, 1)), StoredNodesSynthesizer(store, **LENGTH))
    handler, dispatcher = Ended(), get_dispatcher()
    dispatcher.add_event_handler(handler)
    try:
        response = engine.query(TOWER)
    finally:
        dispatcher.event_handlers.remove(handler)
    assert str(response).startswith(" 4821.")
    assert [n.node.node_id for n in response.source_nodes] == ["node-0", "node-1"]
    assert response.metadata["node-0"] == {"file_path": "tower.md"}
    assert json.loads(json.dumps(response.metadata)) == response.metadata
    assert handler.found == [response.metadata]
    assert str(asyncio.run(engine.aquery(TOWER))) == str(response)


def test_metadata_of_nodes_is_not_in_the_prompt(store: kvstore.OpenStore) -> None:
    """`get_content` of a node with metadata gives another text, which nobody built."""
    receipt = receipt_of(StoredNodesSynthesizer(store, **LENGTH).synthesize(TOWER, nodes(0)))
    assert receipt.documents[1].action == "reused"
    assert receipt.prompt_tokens == len(store.view.renderer.prompt([TEXTS[0][0]], TOWER))


def test_texts_without_nodes_are_documents_too(store: kvstore.OpenStore) -> None:
    plain, streaming = StoredNodesSynthesizer(store, **LENGTH), StoredNodesSynthesizer(store, streaming=True, **LENGTH)
    text = plain.get_response(TOWER, [TEXTS[1][0], TEXTS[0][0]])
    assert text == live_answer(store, store.compose(nodes(1, 0), TOWER), **LENGTH)
    assert "".join(streaming.get_response(TOWER, [TEXTS[1][0], TEXTS[0][0]])) == text
    assert asyncio.run(plain.aget_response(TOWER, [TEXTS[1][0], TEXTS[0][0]])) == text


def test_without_nodes_the_framework_says_so(store: kvstore.OpenStore) -> None:
    response = StoredNodesSynthesizer(store).synthesize(TOWER, [])
    assert str(response) == "Empty Response"
    with pytest.raises(InputError, match="Response carries no receipt"):
        receipt_of(response)
    with pytest.raises(InputError, match="str carries no receipt"):
        receipt_of(str(response))


def test_the_prompt_is_not_for_llama_index_to_change(store: kvstore.OpenStore) -> None:
    synthesizer = StoredNodesSynthesizer(store)
    assert synthesizer.get_prompts() == {}
    with pytest.raises(InputError, match="the prompt is part of the store"):
        synthesizer.update_prompts({"text_qa_template": PromptTemplate("{context_str}")})
    with pytest.raises(InputError, match="documents and a question"):
        synthesizer._llm.complete("Who?")


def test_a_generation_config_is_not_overridden(store: kvstore.OpenStore) -> None:
    config = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0)
    chain = StoredDocumentsChain(store, generation_config=config)
    given = {"context": documents(0), "input": TOWER}
    assert chain.invoke(given).usage_metadata["output_tokens"] == 3
    assert chain.invoke(given, max_new_tokens=1).usage_metadata["output_tokens"] == 1


@pytest.fixture(params=["own", "end"])
def padding(request: pytest.FixtureRequest, store: kvstore.OpenStore) -> Iterator[int]:
    """Many tokenizers have no token for padding: the end-of-sequence token takes its place."""
    tokenizer = store.source.tokenizer
    before = tokenizer.pad_token
    tokenizer.pad_token = before if request.param == "own" else tokenizer.eos_token
    yield tokenizer.pad_token_id
    tokenizer.pad_token = before


def test_padding_of_a_batch_counts_as_nothing(store: kvstore.OpenStore, padding: int) -> None:
    chain = StoredDocumentsChain(store, stop=["."], max_new_tokens=16)
    assert chain.answerer.pad == padding
    inputs = [{"context": documents(0), "input": TOWER}, {"context": documents(2), "input": "What is the colour of the quiet garden?"}]
    counts = [m.usage_metadata["output_tokens"] for m in chain.batch(inputs)]
    assert counts == [chain.invoke(i).usage_metadata["output_tokens"] for i in inputs]
    assert counts[0] != counts[1]


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["ab", "c", "d"], ["cd"], "ab"),
        (["ab", "c", "e"], ["cd"], "abce"),
        (["a", "b", "a", "b", "c"], ["abc"], "ab"),
        (["one.two\n"], ["\n", "."], "one"),
        (["abab"], ["abc", "b"], "a"),
        ([], ["x"], ""),
        (["whole"], [], "whole"),
    ],
)
def test_what_may_begin_a_stop_string_is_held_back(pieces: list[str], stop: list[str], text: str) -> None:
    assert "".join(before_stop(pieces, stop)) == text


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("langchain", "langchain_core", "langchain"), ("llama_index", "llama_index.core", "llama-index")]
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str) -> None:
    for module in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"kvstore.integrations.{name}")
    with pytest.raises(InputError, match=rf"pip install 'kvstore-compiler\[{extra}\]'") as caught:
        importlib.import_module(f"kvstore.integrations.{name}")
    assert caught.value.code == "not-installed"


def test_nothing_is_imported_unless_asked() -> None:
    code = "import sys, kvstore.api, kvstore.integrations; print([m for m in sys.modules if m.split('.')[0] in ('langchain_core', 'llama_index')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # pydantic looks there for the names in annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["langchain_rag", "llama_index_rag"])
def test_examples_answer_from_the_store_what_the_live_model_answers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [q for q in bundled.questions() if q.source in LETTERS][:2]
    for source in LETTERS:
        shutil.copy(bundled.corpus_path() / source, tmp_path)
    arguments = ["--corpus", str(tmp_path), "--store", str(tmp_path / "kv.zarr"), "--reuse"]
    module = example(name, monkeypatch)
    exact = module.main([*arguments, "prefix", *(q.question for q in asked)])
    approximate = module.main([*arguments, "blocks", "--tier", "fine", asked[0].question])
    opened = kvstore.open(tmp_path / "kv.zarr", dtype="float32")
    for question, output in zip(asked, exact, strict=True):
        text, receipt, retrieved = parts(output)
        live = live_answer(opened, opened.compose(retrieved, question.question), 12, ".\n")
        assert text == live.split(".")[0].split("\n")[0]
        assert receipt.exact
        assert receipt.documents[1].action == "reused"
    assert [parts(o)[0].strip() for o in exact] == [q.answer for q in asked]
    actions = [d.action for d in parts(approximate[0])[1].documents]
    assert actions[:3] == ["reused", "reused", "moved"]
    assert set(actions[3:]) <= {"moved"}
    assert f"{asked[0].question} {asked[0].answer}\n(head): 1 tokens reused" in capsys.readouterr().out


def parts(output: Any) -> tuple[str, Receipt, list[Any]]:
    """Text, receipt and retrieved documents of either framework's output."""
    if isinstance(output, dict):
        return output["answer"].content, receipt_of(output["answer"]), output["context"]
    return output.response, receipt_of(output), output.source_nodes
