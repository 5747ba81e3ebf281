"""Which text a calibration learns from: every kind of document in the corpus, in turn, and what the model itself writes where that is too little.

Text unlike that of the calibration costs ten times the divergence, so documents are drawn in turn from every folder and kind of file,
whatever their number. Which ones is decided by digests of the seed and the text: the same for the same corpus, in whatever order it comes.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.calibration.live import Live
from kvstore.digest import digest
from kvstore.documents import Document, Skipped, text_digest
from kvstore.template import Renderer

SEQUENCE_TOKENS = 1024
LEAST_TOKENS = 16  # shorter sequences have no prefix and continuation to speak of
PIECE_CHARACTERS, PIECES = 6144, 64  # a long document is drawn from in pieces, each about as long as a sequence
STRATA = 1024
SPARED, SPARE_FROM = 8, 24  # of corpora that large every eighth document stays unseen, so that something is left to score
BATCH, CONTINUED = 16, 512
log = logging.getLogger("kvstore")


@dataclass(frozen=True)
class Excerpt:
    """Token ids from the first position; the first `head` of them are the prompt's head. `text` is the document's digest, "" where sampled."""

    ids: tuple[int, ...]
    head: int
    text: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Text:
    order: str
    digest: str
    pieces: tuple[str, ...]


class Pool:
    """Texts by stratum (root, folder, suffix); each keeps those that come first in the seeded order, up to a number of characters."""

    def __init__(self, seed: int, tokens: int):
        self.seed, self.room = seed, 16 * tokens
        self._strata: dict[tuple[str, ...], list[tuple[int, _Text]]] = {}
        self._sizes: dict[tuple[str, ...], int] = {}
        self.documents = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        known = text_digest(document.text)
        text = _Text(digest("kvstore/calibration-order/1", f"{self.seed}/{known}"), known, self._pieces(document.text, known))
        key = _stratum(document)
        key = key if key in self._strata or len(self._strata) < STRATA else (key[0], "", key[2])
        heap = self._strata.setdefault(key, [])
        heapq.heappush(heap, (-int(text.order[:15], 16), text))
        self._sizes[key] = self._sizes.get(key, 0) + sum(map(len, text.pieces))
        while len(heap) > 1 and self._sizes[key] > self.room:
            self._sizes[key] -= sum(map(len, heapq.heappop(heap)[1].pieces))

    def drawn(self) -> Iterator[tuple[str, str]]:
        """(text digest, piece): one stratum after the other, within it one document after the other, within that one piece after the other."""
        spare = self.documents >= SPARE_FROM
        turns = [_in_turn([_labelled(t) for t in texts]) for _, texts in sorted(self._ordered(spare).items())]
        yield from _in_turn(turns)

    def _ordered(self, spare: bool) -> dict[tuple[str, ...], list[_Text]]:
        found = {}
        for key, heap in self._strata.items():
            texts = sorted((t for _, t in heap), key=lambda t: t.order)
            kept = [t for t in texts if int(t.order[-8:], 16) % SPARED] if spare else texts
            found[key] = kept or texts
        return found

    def _pieces(self, text: str, known: str) -> tuple[str, ...]:
        """Pieces that begin where lines do, in the seeded order; of a very long text some."""
        pieces = list(_cut(text.strip()))
        random.Random(f"{self.seed}/{known}").shuffle(pieces)
        return tuple(pieces[:PIECES])


def _cut(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        stop = text.find("\n", start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
        stop = stop if stop >= 0 else start + PIECE_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _stratum(document: Document) -> tuple[str, ...]:
    folder, name = os.path.split(document.source)
    return document.root, folder, os.path.splitext(name)[1].lower()


def _labelled(text: _Text) -> Iterator[tuple[str, str]]:
    return ((text.digest, piece) for piece in text.pieces)


def _in_turn(lists: Sequence[Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """One of each, then the next of each."""
    waiting = list(lists)
    while waiting:
        left = []
        for one in waiting:
            found = next(one, None)
            if found is not None:
                yield found
                left.append(one)
        waiting = left


def pooled(documents: Iterable[Document | Skipped], seed: int, tokens: int) -> Pool:
    pool = Pool(seed, tokens)
    for document in documents:
        if isinstance(document, Document):
            pool.add(document)
    return pool


def from_corpus(pool: Pool, renderer: Renderer, tokens: int, room: int) -> list[Excerpt]:
    """Sequences of head and document, `room` tokens at most each, until there are `tokens` of them or no text is left."""
    head, found, total = tuple(renderer.head_ids), [], 0
    for text, piece in pool.drawn():
        if total >= tokens:
            break
        ids = (head + tuple(renderer.document(piece)))[:room]
        if len(ids) >= LEAST_TOKENS:
            found.append(Excerpt(ids, min(len(head), len(ids)), text))
            total += len(ids)
    return found


def from_model(live: Live, begun: Sequence[Excerpt], head: Sequence[int], tokens: int, room: int, seed: int) -> list[Excerpt]:
    """Sequences that the model writes (temperature 1) after the head and the first few tokens of texts, `tokens` in all or a little more."""
    chance, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    found: list[Excerpt] = []
    total, length = 0, min(CONTINUED, room)
    while total < tokens:
        taken = draw.choice((1, 8, 32))  # one length a batch: nothing is padded
        starts = [_start(draw.choice(begun) if begun else None, head, taken, live.vocabulary, draw) for _ in range(BATCH)]
        width = min(min(map(len, starts)), length - 1)
        rows = continued(live, torch.tensor([s[:width] for s in starts]), length, chance)
        found += [Excerpt(tuple(row), min(len(head), length)) for row in rows.tolist()]
        total += rows.numel()
    return found


def _start(text: Excerpt | None, head: Sequence[int], taken: int, vocabulary: int, draw: random.Random) -> list[int]:
    """The head and the beginning of a text; without any text, a token."""
    body = list(text.ids[text.head : text.head + taken]) if text is not None else [draw.randrange(vocabulary)]
    return [*head, *body]


@torch.no_grad()
def continued(live: Live, ids: Tensor, length: int, chance: torch.Generator) -> Tensor:
    """ids int64 [rows, begun] continued to [rows, length], one draw after the other."""
    cache, step = None, ids
    while ids.shape[1] < length:
        out = live.model(step.to(live.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = torch.multinomial(out.logits[:, -1].float().softmax(-1).cpu(), 1, generator=chance)
        cache, ids = out.past_key_values, torch.cat([ids, step], 1)
    return ids
