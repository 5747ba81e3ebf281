"""Query logs: which documents were asked for together, in which order, and the chains of them that are worth storing."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvstore.errors import InputError

LEAST_COUNT = 2  # what was asked for once may never be asked for again
Place = tuple[str, int]  # source, passage
_Offer = tuple[int, int, Place, int, "Node"]  # what goes first: -count, depth, place, and a number so that nodes are never compared


class Request(msgspec.Struct, frozen=True):
    """One line: the names of the documents (`a.md`, `a.md#3`) as they stood in the prompt, and how often. Other fields are left alone."""

    documents: tuple[str, ...]
    query: str = ""
    count: Annotated[int, Meta(ge=1, le=2**53 - 1)] = 1


@dataclass(slots=True, eq=False)
class Node:
    """A passage after the passages above it. `count`: requests that begin so; `ended`: those of them that end here."""

    place: Place
    tokens: int
    count: int = 0
    ended: int = 0
    after: dict[Place, Node] = field(default_factory=dict)


@dataclass
class Trie:
    """All requests, from their beginnings. `unknown`: requests with a document that is not there (first of all `missing`), or beyond the context."""

    root: Node
    requests: int = 0
    unknown: int = 0
    missing: str | None = None


def read_log(log: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Request]:
    """Requests of a JSONL file, or of objects. Raises InputError, naming the line, for what is none."""
    if isinstance(log, (str, Path)):
        yield from _read(Path(log))
        return
    for number, given in enumerate(log, 1):
        try:
            yield msgspec.convert(given, Request)
        except (msgspec.ValidationError, RecursionError) as error:
            raise _refused(f"request {number}", error) from error


def _read(path: Path) -> Iterator[Request]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(line, f"{path}, line {number}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}", remedy="check the path") from error


def _parsed(line: bytes, where: str) -> Request:
    try:
        return msgspec.json.decode(line, type=Request)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _refused(where, error) from error


def _refused(where: str, error: Exception) -> InputError:
    remedy = 'a request is {"documents": ["a.md", "b.md#3"], "query": "...", "count": 2}, query and count optional'
    return InputError(f"{where}: {error}", remedy=remedy, code="log")


def count(requests: Iterable[Request], passages: Callable[[str], Sequence[tuple[Place, int]] | None], room: int) -> Trie:
    """Requests as a trie of passages. `passages` gives a name's places and tokens, None where it is not known; chains end at `room` tokens."""
    trie = Trie(Node(("", 0), 0))
    for request in requests:
        if request.documents:
            trie.requests += request.count
            _add(trie, request, passages, room)
    return trie


def _add(trie: Trie, request: Request, passages: Callable[[str], Sequence[tuple[Place, int]] | None], room: int) -> None:
    node, left = trie.root, room
    for name in request.documents:
        found = passages(name)
        if found is None:
            trie.missing = name if trie.missing is None else trie.missing
        for place, tokens in found or ():
            left -= tokens
            if left < 0:
                break
            node = node.after.setdefault(place, Node(place, tokens))
            node.count += request.count
        if found is None or left < 0:
            trie.unknown += request.count
            return
    node.ended += request.count


def choose(trie: Trie, free: Callable[[Place], bool], budget: int, least: int = LEAST_COUNT) -> list[Node]:
    """The nodes to store, most popular first, parents before children, of at most `budget` tokens together.

    `free`: places that are stored after the head anyway. A request that begins as a chain does is served its tokens, so a token stored is worth
    its node's count: taking the greatest counts first is the best use of a budget. Of equal counts the shallower goes first, then by name.
    """
    chosen: list[Node] = []
    waiting: list[_Offer] = []
    serial = itertools.count()

    def offer(node: Node, depth: int) -> None:
        for child in node.after.values():
            heapq.heappush(waiting, (-child.count, depth, child.place, next(serial), child))

    offer(trie.root, 1)
    while waiting:
        popularity, depth, place, _, node = heapq.heappop(waiting)
        if not (depth == 1 and free(place)):
            if -popularity < least or node.tokens > budget:
                continue
            budget -= node.tokens
            chosen.append(node)
        offer(node, depth + 1)
    return chosen


@dataclass(frozen=True)
class Share:
    """Of the log's requests, how many are stored to their last document; of their documents' tokens, how many are stored in their place. 0 to 1."""

    requests: float
    tokens: float


def share(trie: Trie, stored: Callable[[Node, int], bool]) -> Share:
    """What is served where the nodes for which `stored` (of a node and its depth, from 1) holds are there, with all nodes above them."""
    ended = served = total = 0
    left = [(child, 1, True) for child in trie.root.after.values()]
    while left:
        node, depth, reached = left.pop()
        reached = reached and stored(node, depth)
        total += node.count * node.tokens
        served += node.count * node.tokens * reached
        ended += node.ended * reached
        left += [(child, depth + 1, reached) for child in node.after.values()]
    return Share(ended / max(1, trie.requests), served / max(1, total))
