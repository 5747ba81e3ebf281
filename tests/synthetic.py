"""Stores without a model: layouts by hand, random bytes as units, and what a builder would do with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np

from kvstore.digest import sha256
from kvstore.identity import Context, make_model, segment_key
from kvstore.manifest import (
    FORMAT,
    CodecSpec,
    Encoding,
    Layout,
    ModelRecord,
    Part,
    Passage,
    RopeRecord,
    Row,
    TemplateRecord,
    Tier,
)
from kvstore.pack_writer import PackWriter
from kvstore.records import add_model, add_template, create
from kvstore.snapshot import Change
from kvstore.storage.local import LocalStorage
from kvstore.store import Store

ROPE = RopeRecord(0, 8, "half", np.asarray([1.0, 0.5, 0.25, 0.125], "<f4").tobytes().hex(), 1.0, "model", "default")
LAYOUT = Layout(3, 2, 8, "bfloat16", "hooked", (0, None, 0), (ROPE,))
BLOCK = 8


def make_encoding(name: str = "noise", block: int = BLOCK, group_layers: int = 2) -> Encoding:
    """Two tiers of one codec that need not exist: packs carry bytes. The last group of layers is short."""
    tiers = (Tier("draft", "t0", name, 0, (), False), Tier("fine", "t1", name, 1, ("draft",), False))
    return Encoding((CodecSpec(name, 1, {"bits": 4}),), tiers, block, group_layers)


ENCODING = make_encoding()
MODEL = make_model("a model", weights="0" * 64, config={"hidden_size": 64, "rope_theta": 10000}, dtype="bfloat16")
RECORD = ModelRecord(FORMAT, "model", MODEL, LAYOUT, (1, 2, 3, 4), {"source": "nowhere"})
PROBE = np.arange(LAYOUT.layers * 2 * 4 * 2, dtype=np.float32).reshape(LAYOUT.layers, 2, 4, 2)
ANCHOR, HEAD = (1,), (1, 5, 6, 7)
TEMPLATE = TemplateRecord(FORMAT, "plain", "1" * 64, "0" * 64, "be brief", Part("<s>", ANCHOR), Part("<s>be brief\n", HEAD), Part("", ()),
                          Part("\n", (9,)), Part("Q: ", (8,)), Part("\nA:", (7,)))  # fmt: skip
ROOT_CONTEXT = Context.anchor(ANCHOR)
HEAD_KEY = segment_key(MODEL, LAYOUT, ROOT_CONTEXT, HEAD)


@dataclass(frozen=True)
class Task:
    """A segment to store."""

    key: str
    context: Context
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """A document of so many tokens a passage; another `version` is another text."""

    source: str
    version: int = 0
    lengths: tuple[int, ...] = (20,)

    def ids(self, passage: int) -> tuple[int, ...]:
        data = hashlib.shake_256(f"{self.source}/{self.version}/{passage}".encode()).digest(2 * self.lengths[passage])
        return tuple((np.frombuffer(data, "<u2").astype(int) + 10).tolist())

    def tasks(self) -> list[Task]:
        """The head and the passages, each after the head."""
        return list(_tasks(self))

    def row(self, encoding: Encoding = ENCODING, root: str = "") -> Row:
        passages = tuple(Passage(len(t.ids), prefix=t.key) for t in self.tasks()[1:])
        text = sha256(f"{self.source}/{self.version}/{self.lengths}".encode())
        return Row(self.source, MODEL.key, TEMPLATE.id, encoding.id, text, "whole", HEAD_KEY, passages, root, {"version": self.version})


@lru_cache(4096)
def _tasks(document: Document) -> tuple[Task, ...]:
    after, passages = Context.parent(HEAD_KEY, len(HEAD)), map(document.ids, range(len(document.lengths)))
    return (Task(HEAD_KEY, ROOT_CONTEXT, HEAD), *(Task(segment_key(MODEL, LAYOUT, after, ids), after, ids) for ids in passages))


def make_units(key: str, tokens: int, encoding: Encoding = ENCODING, layout: Layout = LAYOUT) -> dict[str, list[list[bytes]]]:
    """Units [group][block] per tier that follow from the key, of uneven sizes."""
    groups, blocks = -(-layout.layers // encoding.group_layers), -(-tokens // encoding.block_tokens)
    source = hashlib.shake_256(key.encode()).digest(1 << 12)

    def unit(tier: int, group: int, block: int) -> bytes:
        size = 4 * (4 + (source[(tier * 7 + group * 3 + block) % 4096] % 32))
        return hashlib.shake_256(f"{key}/{tier}/{group}/{block}".encode()).digest(size)

    return {t.array: [[unit(i, g, b) for b in range(blocks)] for g in range(groups)] for i, t in enumerate(encoding.tiers)}


def new_writer(storage: LocalStorage, encoding: Encoding = ENCODING) -> PackWriter:
    return PackWriter(storage, MODEL.key, LAYOUT, encoding, {"made": "by a test"})


def make_store(path: Path) -> Store:
    """An empty store that knows the model and the template; its index lies beside it."""
    create(path)
    store = Store(path, cache=path.parent / "cache")
    add_model(store.storage, RECORD, PROBE)
    add_template(store.storage, TEMPLATE)
    return store


def missing(store: Store, documents: Iterable[Document], encoding: Encoding = ENCODING) -> dict[str, Task]:
    """The segments that are not stored yet, by key, in order."""
    tasks = {t.key: t for d in documents for t in d.tasks()}
    return {k: t for k, t in tasks.items() if not store.index.has(k, encoding.id)}


def build(store: Store, documents: Sequence[Document], *, removed: Sequence[Document] = (), encoding: Encoding = ENCODING) -> str | None:
    """One pack with what is missing, then one snapshot. The pack's name."""
    store.refresh()
    writer = new_writer(store.storage, encoding)
    for task in missing(store, documents, encoding).values():
        writer.add(task.key, task.context, task.ids, make_units(task.key, len(task.ids), encoding))
    name = writer.close()
    store.commit(Change(tuple(d.row(encoding) for d in documents), tuple(d.row(encoding).id for d in removed)), "test")
    store.refresh()
    return name


def problems_with(store: Store, documents: Iterable[Document], encoding: Encoding = ENCODING) -> list[str]:
    """What is not stored as it was written, read through the same doors as a load."""
    found = []
    for document in documents:
        if document.row(encoding) not in store.rows(document.source):
            found.append(f"{document.source}: no row of version {document.version}")
        found += [f"{document.source}: {p}" for t in document.tasks() for p in _task_problems(store, t, encoding)]
    return found


def _task_problems(store: Store, task: Task, encoding: Encoding) -> Iterator[str]:
    try:
        stored = store.stored(task.key, encoding.id)
    except KeyError as error:
        yield str(error)
        return
    if tuple(stored.ids.tolist()) != task.ids:
        yield "other ids"
    wanted = make_units(task.key, len(task.ids), encoding)
    for tier in encoding.tiers:
        stored.pack.check(stored.segment, tier.array)
        units = stored.pack.units(stored.segment, tier.array)
        if [[bytes(u) for u in group] for group in units] != wanted[tier.array]:
            yield f"other units in {tier.array}"


def files_of(store: Store) -> dict[str, bytes]:
    """Every file of a store but its lock, by relative path."""
    files = (p for p in sorted(store.path.rglob("*")) if p.is_file() and p.name != "lock")
    return {p.relative_to(store.path).as_posix(): p.read_bytes() for p in files}


def replace(record: msgspec.Struct, **fields: object) -> msgspec.Struct:
    return msgspec.structs.replace(record, **fields)
