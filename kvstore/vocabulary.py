"""A tokenizer's JSON made safe: the same tokenizer in which no text can spell a control token.

Works on the plain values of a Hugging Face `tokenizer.json`; imports neither `tokenizers` nor `transformers`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import msgspec

from kvstore.digest import digest

State = dict[str, Any]
Prefix = Literal["never", "first", "always"]
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PROBE = "A probe: 1, 22,\n333\n\nthe  End. Ünïcode <tag> you'll"
_DECIDES_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")


@dataclass(frozen=True)
class Control:
    """An added token that steers the model. `strip_before` and `strip_after`: it swallows the white space there."""

    id: int
    content: str
    strip_before: bool = False
    strip_after: bool = False

    @property
    def pattern(self) -> str:
        return r"\s*" * self.strip_before + re.escape(self.content) + r"\s*" * self.strip_after


def state_digest(state: State) -> str:
    """Of what decides a text's ids: not of padding, truncation or the post-processor, which change in use."""
    decisive = {name: state.get(name) for name in _DECIDES_IDS}
    return digest("kvstore/tokenizer/1", msgspec.json.encode(decisive, order="deterministic"))


def controls(state: State) -> dict[int, Control]:
    """Every added token but those that ordinary text must be able to produce, by id.

    Ordinary are white space (`\\n\\n`, `▁▁`), bytes of a byte fallback, and single characters of the vocabulary
    (padding with `!`).
    """
    found = {}
    for token in state["added_tokens"]:
        if not _is_ordinary(token["content"], state["model"]):
            found[token["id"]] = Control(token["id"], token["content"], bool(token.get("lstrip")), bool(token.get("rstrip")))
    return found


def _is_ordinary(content: str, model: dict[str, Any]) -> bool:
    blank = not content.replace("▁", "").strip()
    byte = bool(model.get("byte_fallback")) and _BYTE.fullmatch(content) is not None
    return blank or byte or (len(content) == 1 and content in _entries(model))


def _entries(model: dict[str, Any]) -> set[str]:
    vocab = model.get("vocab") or {}
    return set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}


def unknown_id(state: State) -> int | None:
    """The id that the model gives to what it cannot spell, if any: text may yield it."""
    model = state["model"]
    if isinstance(model.get("vocab"), list):
        return model.get("unk_id")
    unknown = model.get("unk_token")
    return None if unknown is None else (model.get("vocab") or {}).get(unknown)


def without_controls(state: State, found: dict[int, Control]) -> State:
    """The tokenizer with each control token renamed, among added tokens and in the vocabulary, to what no text can say.

    Renaming keeps all ids and scores; removing would shift the ids of added white space. The nonce is new in each
    process.
    """
    nonce = secrets.token_hex(12)
    model = dict(state["model"])
    names = {i: f"\U0010fffe {nonce} {i}" for i in found}
    renamed = {c.content: names[i] for i, c in found.items()}
    if isinstance(model.get("vocab"), list):
        model["vocab"] = [[names.get(i, entry[0]), entry[1]] for i, entry in enumerate(model["vocab"])]
    elif isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(i, content): i for content, i in model["vocab"].items()}
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if not _spells(m, renamed, model)]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "dropout" in model:  # a stored segment must have one spelling
        model["dropout"] = None
    blank = {"normalized": False, "lstrip": False, "rstrip": False}
    added = [
        {**t, **blank, "content": names[t["id"]]} if t["id"] in names else t
        for t in state["added_tokens"]
        if t["id"] in names or not _BYTE.fullmatch(t["content"])
    ]
    return {**state, "added_tokens": added, "model": model, "post_processor": None, "padding": None, "truncation": None}


def _spells(merge: str | list[str], renamed: dict[str, str], model: dict[str, Any]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    joined = left + right.removeprefix(model.get("continuing_subword_prefix") or "")
    return left in renamed or right in renamed or joined in renamed


def prefix_rule(state: State) -> Prefix:
    """Where the tokenizer puts a space of its own: nowhere, before the whole text, or also after each control token."""
    found = {_prefix_of(part) for part in _parts(state)}
    return "always" if "always" in found else "first" if "first" in found else "never"


def without_prefix(state: State) -> State:
    """The tokenizer without the space it puts before a text: for text in the middle of a prompt."""
    changed = {name: _unprefixed(state.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return {**state, **changed}


def _parts(state: State) -> Iterator[dict[str, Any]]:
    for name in ("normalizer", "pre_tokenizer"):
        part = state.get(name) or {}
        yield from part.get("normalizers") or part.get("pretokenizers") or [part]


def _prefix_of(part: dict[str, Any]) -> Prefix:
    if part.get("type") == "Metaspace":
        return part.get("prepend_scheme", "always")
    adds = part.get("type") == "Prepend" or (part.get("type") == "ByteLevel" and part.get("add_prefix_space"))
    return "always" if adds else "never"


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part.get("type") == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, name: [p for p in map(_unprefixed, part[name]) if p is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {**part, "add_prefix_space": False} if part["type"] == "ByteLevel" and "add_prefix_space" in part else part


class Vocabulary(Protocol):
    """A tokenizer whose control tokens cannot be spelt. Text may yield those among them that are `allowed`."""

    @property
    def digest(self) -> str: ...
    @property
    def controls(self) -> Mapping[int, Control]: ...
    @property
    def allowed(self) -> frozenset[int]: ...
    @property
    def prefix(self) -> Prefix: ...

    def plain(self, texts: Sequence[str], prefixed: bool) -> list[list[int]]: ...


class FastVocabulary:
    """A copy of a `tokenizers` backend in which control tokens cannot be spelt."""

    def __init__(self, backend: Any):
        state: State = msgspec.json.decode(backend.to_str())
        self.digest = state_digest(state)
        self.controls = controls(state)
        self.allowed = frozenset(i for i in [unknown_id(state)] if i is not None)
        self.prefix: Prefix = prefix_rule(state)
        self._backend_type, self._state = type(backend), without_controls(state, self.controls)

    def plain(self, texts: Sequence[str], prefixed: bool) -> list[list[int]]:
        tokenizer = self._with_prefix if prefixed else self._without_prefix
        return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _with_prefix(self) -> Any:
        return self._backend_type.from_str(msgspec.json.encode(self._state).decode())

    @cached_property
    def _without_prefix(self) -> Any:
        if self.prefix == "never":
            return self._with_prefix
        return self._backend_type.from_str(msgspec.json.encode(without_prefix(self._state)).decode())


class SlowVocabulary:
    """A tokenizer written in Python: asked not to look for special tokens, and to encode after a newline if wanted."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        ordinary = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if str(t).replace("▁", "").strip()}
        self.controls = {i: Control(i, c) for i, c in ordinary.items()}
        unknown = getattr(tokenizer, "unk_token_id", None)
        self.allowed = frozenset(i for i in [unknown] if i is not None)
        self.prefix: Prefix = "always" if self._encode("A") != self._after_newline("A") else "never"

    @cached_property
    def digest(self) -> str:
        vocab = {str(k): int(v) for k, v in self.tokenizer.get_vocab().items()}
        return digest("kvstore/tokenizer/1", [type(self.tokenizer).__name__, vocab, sorted(self.controls), self._encode(_PROBE)])

    def plain(self, texts: Sequence[str], prefixed: bool) -> list[list[int]]:
        return [self._encode(t) if prefixed else self._after_newline(t) for t in texts]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _after_newline(self, text: str) -> list[int]:
        newline, ids = self._encode("\n"), self._encode("\n" + text)
        return ids[len(newline) :] if newline and ids[: len(newline)] == newline else self._encode(text)
