"""Running the model for `rate_quality.py`: prefixes prefilled once, then the same tokens after the live cache and after each reconstruction.

Everything is float32. Documents of one setting have equal lengths, run in batches, and start the sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from facts import Recall
from peers.base import Floats, Geometry, Method
from texts import Ids, Passage
from torch import Tensor
from transformers import DynamicCache

from kvstore.families.assemble import dynamic_cache
from kvstore.families.rope import rotate, unrotate
from kvstore.models import ModelSource

BATCH = 8


class Runner:
    """A model, and its caches as arrays [documents, layers, 2, tokens, channels], keys before RoPE."""

    def __init__(self, source: ModelSource):
        self.source, self.model, self.layout = source, source.model, source.layout
        self.geometry = Geometry(self.layout.layers, self.layout.kv_heads, self.layout.head_dim)

    def prefill(self, ids: Sequence[Ids], batch: int = BATCH, pieces: int = 1) -> Floats:
        made = [self._prefill(torch.tensor(ids[i : i + batch]), pieces) for i in range(0, len(ids), batch)]
        return np.concatenate(made)

    def _prefill(self, ids: Tensor, pieces: int) -> Floats:
        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            for piece in ids.chunk(pieces, 1):
                self.model.get_decoder()(input_ids=piece, past_key_values=cache, use_cache=True)
            layers = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
            stacked = torch.stack(layers, 1).transpose(3, 4).flatten(4)
        return self.turned(stacked.numpy(), back=True)

    def turned(self, kv: Floats, back: bool = False) -> Floats:
        """A copy with the keys of `kv` [..., layers, 2, tokens, channels] rotated to positions from 0, or turned back."""
        out, positions, g = np.array(kv, np.float32), torch.arange(kv.shape[-2]), self.geometry
        for layer, rope in enumerate(self.layout.rope_of):
            if rope is not None:
                keys = torch.from_numpy(out[..., layer, 0, :, :]).unflatten(-1, (g.kv_heads, g.head_dim)).transpose(-2, -3)
                change = unrotate if back else rotate
                out[..., layer, 0, :, :] = change(keys, positions, self.layout.ropes[rope]).transpose(-2, -3).flatten(-2).numpy()
        return out

    def cache(self, rotated: Floats) -> DynamicCache:
        """Of a batch [documents, layers, 2, tokens, channels], keys after RoPE."""
        g = self.geometry
        heads = torch.from_numpy(rotated).unflatten(-1, (g.kv_heads, g.head_dim)).transpose(-2, -3)
        return dynamic_cache(self.model.config, [(heads[:, i, 0], heads[:, i, 1]) for i in range(g.layers)])


@dataclass(frozen=True)
class Score:
    """Per document: KL of live against reconstructed (nats a token), agreement of the most likely token, share of questions answered right."""

    kl: npt.NDArray[np.float64]
    agree: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64] | None


class Task(ABC):
    """Documents of equal length and what is read after them."""

    documents: list[Ids]

    @abstractmethod
    def follow(self, model: Any, cache: DynamicCache, part: slice) -> list[Tensor]:
        """Logits [positions, vocabulary] of each document in `part`, after its cache."""

    def answered(self, document: int, best: Tensor) -> float | None:
        """Share of the document's questions whose answers are all in `best` [positions], the most likely tokens."""
        return None


class Continuations(Task):
    """The text goes on."""

    def __init__(self, passages: Sequence[Passage]):
        self.documents, self.ahead = [p.ids for p in passages], torch.tensor([p.ahead for p in passages])

    def follow(self, model: Any, cache: DynamicCache, part: slice) -> list[Tensor]:
        return list(model(input_ids=self.ahead[part], past_key_values=cache, use_cache=True).logits)


class Questions(Task):
    """Each question follows its document alone: all of a document run as one row, a mask keeps them from seeing each other.

    Teacher-forced: an answer is right where each of its tokens is the most likely one after those before, as greedy decoding has it.
    """

    def __init__(self, found: Sequence[Recall], tokenizer: Any):
        self.documents = [r.ids for r in found]
        self.asked = [[_tokenised(tokenizer, q.text, q.answer) for q in r.questions] for r in found]

    def follow(self, model: Any, cache: DynamicCache, part: slice) -> list[Tensor]:
        rows = self.asked[part]
        past, width = len(self.documents[0]), max(sum(len(q + a) for q, a in row) for row in rows)
        ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), past)
        mask = torch.full((len(rows), 1, width, past + width), torch.finfo(torch.float32).min)
        mask[..., :past] = 0
        for row, questions in enumerate(rows):
            at = 0
            for question, answer in questions:
                n = len(question) + len(answer)
                ids[row, at : at + n] = torch.tensor(question + answer)
                positions[row, at : at + n] = past + torch.arange(n)
                mask[row, 0, at : at + n, past + at : past + at + n].masked_fill_(torch.ones(n, n).tril().bool(), 0.0)
                at += n
        hidden = model.get_decoder()(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
        head = model.get_output_embeddings()
        return [head(hidden[row, self._before(questions)]) for row, questions in enumerate(rows)]

    def _before(self, questions: Sequence[tuple[list[int], list[int]]]) -> list[int]:
        """The places in a row whose next token is one of an answer."""
        places, at = [], 0
        for question, answer in questions:
            places += range(at + len(question) - 1, at + len(question) + len(answer) - 1)
            at += len(question) + len(answer)
        return places

    def answered(self, document: int, best: Tensor) -> float | None:
        right, at = 0, 0
        for _, answer in self.asked[document]:
            right += best[at : at + len(answer)].tolist() == answer
            at += len(answer)
        return right / len(self.asked[document])


def _tokenised(tokenizer: Any, *texts: str) -> tuple[list[int], ...]:
    return tuple(tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts)


class Setting:
    """One task with its live caches and what the model says after them; methods are scored against it."""

    def __init__(self, runner: Runner, task: Task, threads: int):
        self.runner, self.task, self.pool = runner, task, ThreadPoolExecutor(threads)
        self.kv = runner.prefill(task.documents)
        self.rotated = runner.turned(self.kv)
        with torch.inference_mode():
            self.live = [row.log_softmax(-1) for part in self._batches() for row in self._follow(self.rotated[part], part)]
        self.live_recall = self._recall([row.argmax(-1) for row in self.live])

    def measure(self, method: Method) -> list[tuple[str, dict[str, float], Score]]:
        """(setting, bytes a token by way of counting, score) of each version of a method."""
        source = self.rotated if method.rotated else self.kv
        coded = list(self.pool.map(method.code, source, self.task.documents))
        tokens, out = self.kv.shape[3], []
        for i, setting in enumerate(method.settings):
            nbytes = {way: float(np.mean([d[i].nbytes[way] for d in coded])) / tokens for way in coded[0][i].nbytes}
            out.append((setting, nbytes, self.score([d[i].values for d in coded], method.rotated)))
        return out

    def score(self, values: Sequence[Floats], rotated: bool) -> Score:
        """Of one reconstruction a document."""
        kl, agree, best = [], [], []
        with torch.inference_mode():
            for part in self._batches():
                batch = np.stack(values[part])
                for live, row in zip(self.live[part], self._follow(batch if rotated else self.runner.turned(batch), part), strict=True):
                    other = row.log_softmax(-1)
                    kl.append(float((live.exp() * (live - other)).sum(-1).mean()))
                    best.append(other.argmax(-1))
                    agree.append(float((best[-1] == live.argmax(-1)).float().mean()))
        return Score(np.array(kl), np.array(agree), self._recall(best))

    def noise(self) -> Score:
        """Two live runs of other batch shape: here one document at a time, in two pieces."""
        return self.score(list(self.runner.turned(self.runner.prefill(self.task.documents, batch=1, pieces=2))), rotated=True)

    def _follow(self, rotated: Floats, part: slice) -> list[Tensor]:
        return self.task.follow(self.runner.model, self.runner.cache(rotated), part)

    def _batches(self) -> Iterator[slice]:
        count = len(self.task.documents)
        return (slice(i, min(i + BATCH, count)) for i in range(0, count, BATCH))

    def _recall(self, best: Sequence[Tensor]) -> npt.NDArray[np.float64] | None:
        shares = [self.task.answered(i, row) for i, row in enumerate(best)]
        return None if None in shares else np.array(shares, np.float64)
