"""Answers over the sample corpus with LangChain: BM25 finds chunks, the store holds their KV, the chain answers and says what it reused.

pip install "kvstore-compiler[examples]"
python examples/langchain_rag.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
from langchain_classic.chains import create_retrieval_chain
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_text_splitters import RecursiveCharacterTextSplitter

import kvstore
from kvstore import bundled
from kvstore.integrations import receipt_of
from kvstore.integrations.langchain import StoredDocumentsChain

QUESTIONS = [
    "What is the access code of the red castle?",
    "What is the colour of the grey lantern?",
    "What is the secret word of the southern castle?",
]


class BM25(BaseRetriever):
    """The `k` documents with the highest BM25 score."""

    documents: list[Document]
    index: Any
    k: int = 3

    @classmethod
    def over(cls, documents: list[Document]) -> BM25:
        index = bm25s.BM25()
        index.index(bm25s.tokenize([d.page_content for d in documents], show_progress=False), show_progress=False)
        return cls(documents=documents, index=index)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        words = bm25s.tokenize(query, show_progress=False)
        found, _ = self.index.retrieve(words, k=min(self.k, len(self.documents)), show_progress=False)
        return [self.documents[i] for i in found[0]]


def chunks_of(corpus: Path) -> list[Document]:
    """What is compiled and what the retriever gives are the same chunks. No overlap: each token is computed and stored once."""
    files = sorted(p for p in corpus.rglob("*") if p.suffix in (".md", ".txt"))
    documents = [Document(page_content=p.read_text(encoding="utf-8"), metadata={"source": p.relative_to(corpus).as_posix()}) for p in files]
    return RecursiveCharacterTextSplitter(chunk_size=700, chunk_overlap=0).split_documents(documents)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--corpus", type=Path, default=bundled.corpus_path(), help="a folder of .md and .txt files")
    parser.add_argument("--store", default="langchain.zarr")
    parser.add_argument("--model", default="bundled", help="a folder or a hub id")
    parser.add_argument("--reuse", default="blocks", help="prefix: exact, the first chunk from the store; blocks: all of them, approximate")
    parser.add_argument("--tier", help="default: the finest, which is lossless")
    given = parser.parse_args(arguments)

    chunks = chunks_of(given.corpus)
    # Only what the store does not hold yet is computed. `scalar` needs no calibration; float32 is fast on every processor.
    kvstore.build(chunks, given.store, given.model, regime="both", codec="scalar", lossless=True, dtype="float32")
    store = kvstore.open(given.store, given.model, dtype="float32")

    answerer = StoredDocumentsChain(store, reuse=given.reuse, tier=given.tier, max_new_tokens=12, stop=[".", "\n"])
    chain = create_retrieval_chain(BM25.over(chunks), answerer)
    outputs = [chain.invoke({"input": question}) for question in given.questions]
    for output in outputs:
        print(f"{output['input']}{output['answer'].content}\n{receipt_of(output['answer'])}\n")
    return outputs


if __name__ == "__main__":
    main()
