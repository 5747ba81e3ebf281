"""Answers over the sample corpus with LlamaIndex: BM25 finds nodes, the store holds their KV, the synthesizer answers and says what it reused.

pip install "kvstore-compiler[examples]"
python examples/llama_index_rag.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llama_index.core import SimpleDirectoryReader
from llama_index.core.base.response.schema import Response
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode
from llama_index.retrievers.bm25 import BM25Retriever

import kvstore
from kvstore import bundled
from kvstore.integrations import receipt_of
from kvstore.integrations.llama_index import StoredNodesSynthesizer

QUESTIONS = [
    "What is the access code of the red castle?",
    "What is the colour of the grey lantern?",
    "What is the secret word of the southern castle?",
]


def nodes_of(corpus: Path) -> list[BaseNode]:
    """What is compiled and what the retriever gives are the same nodes. No overlap: each token is computed and stored once."""
    reader = SimpleDirectoryReader(
        corpus,
        recursive=True,
        required_exts=[".md", ".txt"],
        file_metadata=lambda path: {"file_path": Path(path).relative_to(corpus).as_posix()},
    )
    return SentenceSplitter(chunk_size=256, chunk_overlap=0).get_nodes_from_documents(reader.load_data())


def main(arguments: Sequence[str] | None = None) -> list[Response]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--corpus", type=Path, default=bundled.corpus_path(), help="a folder of .md and .txt files")
    parser.add_argument("--store", default="llama_index.zarr")
    parser.add_argument("--model", default="bundled", help="a folder or a hub id")
    parser.add_argument("--reuse", default="blocks", help="prefix: exact, the first node from the store; blocks: all of them, approximate")
    parser.add_argument("--tier", help="default: the finest, which is lossless")
    given = parser.parse_args(arguments)

    nodes = nodes_of(given.corpus)
    # Only what the store does not hold yet is computed. `scalar` needs no calibration; float32 is fast on every processor.
    kvstore.build(nodes, given.store, given.model, regime="both", codec="scalar", lossless=True, dtype="float32")
    store = kvstore.open(given.store, given.model, dtype="float32")

    synthesizer = StoredNodesSynthesizer(store, reuse=given.reuse, tier=given.tier, max_new_tokens=12, stop=[".", "\n"])
    engine = RetrieverQueryEngine(BM25Retriever(nodes=nodes, similarity_top_k=3), synthesizer)
    responses = [engine.query(question) for question in given.questions]
    for question, response in zip(given.questions, responses, strict=True):
        print(f"{question}{response}\n{receipt_of(response)}\n")
    return responses


if __name__ == "__main__":
    main()
