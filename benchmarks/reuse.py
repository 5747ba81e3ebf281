"""Answers from several documents: accuracy, divergence from a full prefill and time of each reuse mode, behind a BM25 retriever.

    python benchmarks/reuse.py --dtype float32 [--corpus DIR] [--questions N] [--runs N] [--quick]

DIR has a folder prose/ of .md or .txt files, the first third of which calibrates; without it Python's help topics serve. The pool's documents hold
two facts each. Questions want one fact, or two facts of two documents; BM25 (bm25s, from PyPI) chooses the documents of each prompt, which then stand
in random order. KL is of full prefill against the mode, nats a token over the answers. What is stored is kept in --work between runs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, kl, median, model_of, paired, parser, ratio, result_name, show, text_of
from multidoc import Asked, Pool
from texts import Texts, parted

import kvstore
from kvstore import Document
from kvstore.answering import last_logits
from kvstore.models import ModelSource

TOKENS = 249  # of a document, its end not counted: sixteen of 256, BOS and two questions do not fit the bundled model's 4,096 positions
COUNTS = (1, 4, 8, 16)
BUDGETS: tuple[tuple[str, int | float | None], ...] = (
    ("prefix", None), ("blocks", None), ("epic", 4), ("epic", 16), ("epic", 32), ("cacheblend", 0.05), ("cacheblend", 0.15), ("cacheblend", 0.3),
    ("query", 0.05), ("query", 0.15), ("query", 0.3),
)  # fmt: skip
DEFAULTS = (("prefix", None), ("blocks", None), ("epic", 16), ("cacheblend", 0.15), ("query", 0.15))
TIERED = 8  # documents in the prompts that are asked at every tier
Way = tuple[str, "int | float | None", str]


def main() -> None:
    args = options()
    source = model_of(args)
    bench = Bench(args, source)
    setting = bench.setting()
    keep = partial(show, setting=setting, folder=args.work / "quick" if args.quick else RESULTS)
    head = ["questions", "documents", "reuse", "recompute", "tier", "right", "asked", "KL", "computed anew"]
    keep("Answers from several documents", head, list(bench.answers()), result_name("reuse", args))
    head = ["documents", "prompt tokens", "reuse", "recompute", "stored ms", "full prefill ms", "times faster"]
    keep(f"First token from several documents, tier {bench.tier}", head, list(bench.times()), result_name("reuse_time", args))
    head = ["questions", "documents", "BM25 has all", "live right"]
    keep("The retriever, and what the model can answer at all", head, bench.live, result_name("reuse_retriever", args))


def options() -> argparse.Namespace:
    p = parser(__doc__ or "")
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.set_defaults(runs=5)
    p.add_argument("--questions", type=int, default=24, help="questions about one fact; two thirds as many about two (default: 24)")
    p.add_argument("--documents", type=int, default=96, help="documents in the pool (default: 96)")
    p.add_argument("--quick", action="store_true", help="a few questions, to try it out; results go below --work")
    p.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kvstore-reuse", help="where the store is kept between runs")
    args = p.parse_args()
    if args.quick:
        args.questions, args.documents, args.runs = 2, 20, 1
    return args


@dataclass(frozen=True)
class Rest:
    """What is read after the documents, teacher-forced: ids, the places whose next token is one of an answer, and these tokens."""

    ids: list[int]
    places: list[int]
    wanted: list[int]


class Bench:
    """A store of the pool, and questions over it."""

    def __init__(self, args: argparse.Namespace, source: ModelSource):
        self.args, self.source, self.chance = args, source, random.Random(5)
        ids, calibrates = self._texts()
        self.pool = Pool(source.tokenizer, ids, TOKENS, args.documents)
        path = args.work / source.identity.key[:12] / f"{'quick' if args.quick else args.documents}-{args.corpus.name if args.corpus else 'help'}"
        if not path.exists():
            kvstore.calibrate(calibrates, path, source, tokens=4_096 if args.quick else None)
        kvstore.build(self.pool.documents, path, source, regime="both", lossless=True, certify="none")
        self.store = kvstore.open(path, source.model, source.tokenizer)
        self.tiers = [t.name for t in self.store.encodings()[self.store.view.encoding_id].tiers]
        self.tier = self.tiers[-2]  # the finest that is not lossless
        self.one, self.two = self.pool.one_fact(args.questions), self.pool.two_facts(max(2, args.questions * 2 // 3))
        self.live: list[list[object]] = []

    def _texts(self) -> tuple[list[int], list[Document]]:
        """Token ids of the prose that the pool is made of, and documents to calibrate on, of other prose."""
        tokenizer = self.source.tokenizer
        if self.args.corpus is None:
            first, rest = parted([text_of(None)])
            return tokenizer(rest[:400_000], add_special_tokens=False)["input_ids"], _cut(first)
        texts = Texts(self.args.corpus, tokenizer)
        return texts.tokens("prose", "scoring").tolist(), _cut(tokenizer.decode(texts.tokens("prose", "calibration")[:200_000].tolist()))

    def setting(self) -> dict[str, Any]:
        tokens = [len(self.store.view.renderer.document(d.text)) for d in self.pool.documents]
        found = {"model": self.source.identity.name, "dtype": self.source.identity.dtype, "corpus": self.args.corpus and self.args.corpus.name}
        return found | {"pool": len(tokens), "tokens a document": [min(tokens), max(tokens)], "facts a document": 2, "runs": self.args.runs}

    def answers(self) -> Iterator[list[object]]:
        """Rows of accuracy and divergence, by task and number of documents; the retriever's hits and live accuracy on the way."""
        for task, asked in (("one fact", self.one), ("two facts", self.two)):
            for count in COUNTS:
                if count >= len(asked[0].sources):
                    yield from self._asked(task, asked, count)
        self._chained()

    def _asked(self, task: str, asked: Sequence[Asked], count: int) -> Iterator[list[object]]:
        ways: list[Way] = [(*way, "lossless") for way in BUDGETS]
        if count == TIERED:
            ways += [(*way, tier) for way in DEFAULTS for tier in self.tiers[:-1]]
        found: dict[Way, list[tuple[bool, float, float]]] = {way: [] for way in ways}
        live, hits = [], []
        for question in asked:
            names = self._retrieved(question, count)
            hits.append(set(question.sources) <= set(names))
            documents, rest = self._documents(names, question), self._rest(question)
            said = self._said(None, documents, rest)
            live.append(said.argmax(-1).tolist() == rest.wanted)
            for way in ways:
                found[way].append(self._scored(way, names, question, documents, rest, said))
        self.live.append([task, count, share(hits), share(live)])
        yield [task, count, "full prefill", "-", "-", share(live), len(live), 0.0, "100 %"]
        for (mode, budget, tier), scores in found.items():
            right, divergence, computed = zip(*scores, strict=True)
            yield [task, count, mode, "-" if budget is None else budget, tier, share(right), len(right), mean(divergence), f"{mean(computed):.0%}"]
        print(f"{task}, {count} documents: done", flush=True)

    def _retrieved(self, question: Asked, count: int) -> list[str]:
        names = self.pool.retrieve(question, count)
        self.chance.shuffle(names)
        return names

    def _documents(self, names: Sequence[str], question: Asked) -> list[int]:
        """Ids of head and documents."""
        ids = self.store.compose(names, question.query).input_ids[0].tolist()
        return ids[: len(ids) - len(self.store.view.tail(question.query))]

    def _rest(self, question: Asked) -> Rest:
        rest, encode = Rest([], [], []), partial(self.source.tokenizer, add_special_tokens=False)
        for read, said in question.turns():
            rest.ids.extend(encode(read)["input_ids"])
            answer = encode(said)["input_ids"]
            rest.places.extend(range(len(rest.ids) - 1, len(rest.ids) + len(answer) - 1))
            rest.wanted.extend(answer)
            rest.ids.extend(answer)
        return rest

    def _said(self, cache: Any, before: Sequence[int], rest: Rest) -> torch.Tensor:
        """Logits at the answers' tokens, [tokens, vocabulary], after `cache` and the ids `before`."""
        with torch.inference_mode():
            decoder = self.store.model.get_decoder()
            hidden = decoder(torch.tensor([[*before, *rest.ids]]), past_key_values=cache, use_cache=True)[0][0]
            found: torch.Tensor = self.store.model.get_output_embeddings()(hidden[[len(before) + place for place in rest.places]])
        return found

    def _scored(self, way: Way, names: list[str], question: Asked, documents: list[int], rest: Rest, live: torch.Tensor) -> tuple[bool, float, float]:
        """Whether the answers are right, KL, and the share of the documents' tokens that were computed in this prompt."""
        mode, budget, tier = way
        prompt = self.store.compose(names, question.query, reuse=mode, recompute=budget, tier=tier)  # type: ignore[arg-type]
        said = self._said(prompt.cache, documents[prompt.receipt.cached_tokens :], rest)
        stored = sum(d.stored for d in prompt.receipt.documents)
        return said.argmax(-1).tolist() == rest.wanted, max(0.0, float(kl(live, said).mean())), 1 - stored / len(documents)

    def _chained(self) -> None:
        """Questions that need one document to find the other: live only, to say whether the model can answer such at all."""
        right = []
        for documents, question in self.pool.chained(self.args.questions):
            rest = self._rest(question)
            right.append(self._said(None, self._documents(documents, question), rest).argmax(-1).tolist() == rest.wanted)
        self.live.append(["chained", 2, "-", share(right)])

    def times(self) -> Iterator[list[object]]:
        """Rows of the time to the first token, each mode by turns with a full prefill of the same ids."""
        for count in COUNTS:
            names = self._retrieved(self.one[0], count)
            ids = self.store.compose(names, self.one[0].query).input_ids
            sides = {mode: partial(self._first, names, mode, budget) for mode, budget in DEFAULTS}
            seconds = paired({**sides, "full": partial(last_logits, self.store.model, ids, None)}, self.args.runs, warmup=1)
            for mode, budget in DEFAULTS:
                took = [median(seconds[side]) * 1e3 for side in (mode, "full")]
                yield [count, ids.shape[1], mode, "-" if budget is None else budget, *took, ratio(seconds, "full", mode)]

    def _first(self, names: list[str], mode: str, budget: int | float | None) -> torch.Tensor:
        prompt = self.store.compose(names, self.one[0].query, reuse=mode, recompute=budget, tier=self.tier)  # type: ignore[arg-type]
        return last_logits(self.store.model, prompt.input_ids[:, prompt.receipt.cached_tokens :], prompt.cache)


def _cut(text: str) -> list[Document]:
    """Documents of about 700 tokens."""
    return [Document(text[i : i + 2_800], f"calibration/{i}.txt") for i in range(0, len(text), 2_800)]


def share(flags: Sequence[bool]) -> str:
    return f"{sum(flags) / len(flags):.0%}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
