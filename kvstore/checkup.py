"""What kvstore can do with a model, tried on that model: a short prefix is stored, loaded, used in every way, and compared with a live one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import DynamicCache

from kvstore.artifact import Stored
from kvstore.decode import KV, Decoder, Piece, allocate, stored_states
from kvstore.encode import Encoder, bits_of, make_encoding
from kvstore.errors import InputError, KvstoreError
from kvstore.families.assemble import dynamic_cache, static_cache
from kvstore.families.capture import evaluating, prefill
from kvstore.families.probe import probe_ids
from kvstore.families.refuse import context_tokens, text_config
from kvstore.families.slots import kv_layers, window_of
from kvstore.families.states import require_no_state, state_bytes, take_states
from kvstore.identity import Context
from kvstore.manifest import Layout
from kvstore.pack import PACKS, Pack
from kvstore.pack_writer import PackWriter
from kvstore.prompt import Prompt, collate
from kvstore.receipt import Receipt
from kvstore.storage.local import LocalStorage

Outcome = Literal["exact", "rounding", "refused", "wrong"]
PREFIX, SUFFIX, WIDEST = 64, 24, 1024  # tokens; a window up to WIDEST is filled by the prefix, a wider one is not
STILL = 0.05  # of the largest logit: more than rounding changes when everything moves
_NOBODY = "0" * 64
TEXT = (
    "The library keeps two copies of every letter that the harbour master wrote in 1931. One lies in the reading room, the other in a box of oak "
    "below the stairs, where nobody has looked since the flood. Whoever asks for the second copy is sent to the archive in the next town; its index "
    "lists names, dates and the colour of the ink, but no page numbers. "
)


@dataclass(frozen=True)
class Check:
    """One way to use a stored prefix. `exact`: bit for bit as live; `rounding`: as far as the model's own rounding goes; `refused`: `detail` says
    why; `wrong`: neither, which is a fault to report. `difference`: the largest of the logits, by the largest of them; None where refused."""

    name: str
    outcome: Outcome
    detail: str = ""
    difference: float | None = None

    @property
    def ok(self) -> bool:
        return self.outcome in ("exact", "rounding")


def check_up(model: Any, layout: Layout, ids: Sequence[int], codec: str = "lossless") -> list[Check]:
    """All checks over the beginning of `ids` (`probe_tokens` many are enough), stored by `codec`, which restores every bit by default.

    Raises InputError where `ids` are too few.
    """
    needed = probe_tokens(model)
    if len(ids) < needed:
        raise InputError(f"{len(ids)} tokens to probe with, {needed} are needed")
    with _stored(model, layout, list(ids[:needed]), codec) as trial:
        return [_tried(trial, name, check) for name, check in CHECKS.items()]


def text_ids(model: Any, tokenizer: Any = None) -> list[int]:
    """Ids to probe with: a short text again and again; without a tokenizer ids spread over the vocabulary."""
    needed = probe_tokens(model)
    one = [] if tokenizer is None else tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if not one or max(one) >= model.get_input_embeddings().weight.shape[0]:  # another model's tokenizer
        return list(probe_ids(model, needed))
    return (one * -(-needed // len(one)))[:needed]


def probe_tokens(model: Any) -> int:
    """Tokens of a probe: a prefix that fills the model's windows where they are not too wide, and what follows it."""
    filling = max((w + PREFIX // 2 for w in _windows(model) if w <= WIDEST), default=PREFIX)
    return min(max(PREFIX, filling) + SUFFIX, context_tokens(text_config(model)) // 2)


def unfilled(model: Any) -> list[int]:
    """Windows that a probe leaves partly empty, so that what happens beyond them is not tried."""
    return sorted({w for w in _windows(model) if w > probe_tokens(model) - SUFFIX})


def _windows(model: Any) -> list[int]:
    return [w for layer in kv_layers(DynamicCache(config=model.config)) if (w := window_of(layer)) is not None]


class Trial:
    """A model and a prefix of it that is stored; `live` logits are those after a live prefix, `whole` those of one pass over everything."""

    def __init__(self, model: Any, layout: Layout, ids: list[int], stored: Stored):
        self.model, self.layout, self.ids, self.stored, self.decoder = model, layout, ids, stored, Decoder(workers=2)
        self.count, self.tier = len(ids) - SUFFIX, stored.encoding.tiers[-1].name
        self.cache = DynamicCache(config=model.config)
        self.logits(ids[: self.count], self.cache)
        self.loaded, self.states = self.load(self.count), stored_states(stored, model.device)
        self.kept = [(x.keys.clone(), x.values.clone()) for x in kv_layers(self.cache)]
        self.state = take_states(self.cache)
        self.live = self.logits(ids[self.count :], self.cache)
        self.whole = self.logits(ids, DynamicCache(config=model.config))
        self.scale = float(self.whole.abs().max())
        self.limit = max(10 * self.distance(self.live, self.whole[self.count :]), 1e-4, 8 * torch.finfo(model.dtype).eps)

    def load(self, count: int, position: int = 0) -> list[KV]:
        """The first `count` tokens as a load gives them at `position`."""
        layers = allocate(self.layout, count, self.model.device)
        self.decoder.decode(Piece(self.stored, self.tier, count, 0, position), layers)
        return layers

    def continued(self) -> Any:
        """A fresh cache of the whole stored prefix."""
        return dynamic_cache(self.model.config, self.loaded, self.states)

    def logits(self, ids: Sequence[int], cache: Any, **more: Any) -> torch.Tensor:
        """float32 [tokens, vocabulary] of one sequence after `cache`."""
        given = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode(), evaluating(self.model):
            found: torch.Tensor = self.model(given, past_key_values=cache, use_cache=True, **more).logits[0].float()
        return found

    def distance(self, found: torch.Tensor, wanted: torch.Tensor) -> float:
        """The largest difference, by the largest logit of the model; infinite for what is not finite."""
        difference = float((found - wanted).abs().max()) / self.scale
        return difference if difference == difference else float("inf")


@contextmanager
def _stored(model: Any, layout: Layout, ids: list[int], codec: str) -> Iterator[Trial]:
    """A pack in a folder of its own that holds the prefix."""
    encoding, prefix = make_encoding(codec, layout), ids[: len(ids) - SUFFIX]
    with tempfile.TemporaryDirectory(prefix="kvstore-checkup-") as folder:
        storage = LocalStorage(Path(folder))
        writer = PackWriter(storage, _NOBODY, layout, encoding, {})
        values, cache = prefill(model, layout, prefix)
        state = state_bytes(layout, take_states(cache) if layout.state else ())
        writer.add(_NOBODY, Context.root(), prefix, Encoder(encoding, layout).encode(bits_of(values)), state=state)
        storage.path(PACKS).mkdir()
        pack = Pack(storage, writer.close() or "")
        yield Trial(model, layout, ids, Stored(pack, pack.segment(0)))


@dataclass(frozen=True)
class Found:
    """A difference to what is wanted, whether it is none in any bit, and how much of it may be rounding (None: as everywhere)."""

    difference: float
    equal: bool = False
    limit: float | None = None


def _tried(trial: Trial, name: str, check: Callable[[Trial], Found]) -> Check:
    try:
        found = check(trial)
    except KvstoreError as error:
        return Check(name, "refused", str(error))
    except Exception as error:  # a model's own code runs here: that it fails is a finding
        return Check(name, "wrong", f"{type(error).__name__}: {error}")
    difference, limit = found.difference, found.limit or trial.limit
    if found.equal:
        return Check(name, "exact", difference=difference)
    if difference <= limit:
        return Check(name, "rounding", f"within {difference:.1g} of the largest", difference)
    return Check(name, "wrong", f"{difference:.2g} of the largest off, at most {limit:.2g} is rounding", difference)


def _store(trial: Trial) -> Found:
    """Keys, values and recurrent states of a load against those of a live cache."""
    loaded = [(x.keys, x.values) for x in kv_layers(trial.continued())]
    pairs = [(a, b) for mine, theirs in zip(loaded, trial.kept, strict=True) for a, b in zip(mine, theirs, strict=True)]
    pairs += [(a.value, b.value) for a, b in zip(trial.states, trial.state, strict=True)]
    difference = max(float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-9)) for a, b in pairs)
    return Found(difference, all(torch.equal(a, b) for a, b in pairs))


def _continue(trial: Trial) -> Found:
    found = trial.logits(trial.ids[trial.count :], trial.continued())
    return Found(trial.distance(found, trial.live), torch.equal(found, trial.live))


def _cut(trial: Trial) -> Found:
    """A third of the prefix, and a little less than all of it: within windows and beyond them."""
    require_no_state(trial.layout, "a prefix that is no whole segment", "use reuse='prefix'")
    differences = []
    for count in (trial.count // 3, trial.count - 5):
        found = trial.logits(trial.ids[count:], dynamic_cache(trial.model.config, trial.load(count)))
        differences.append(trial.distance(found, trial.whole[count:]))
    return Found(max(differences))


def _batch(trial: Trial) -> Found:
    """Three rows of unlike lengths, of cached tokens and of others, as `collate` puts them together; the last logits of each."""
    end = len(trial.ids)
    rows = [(trial.count, end), (trial.count // 3, trial.count // 3 + 5), (trial.count - 5, end - 9)]
    batch = collate([_prompt(trial, count, length) for count, length in rows])
    cached = batch["past_key_values"].get_seq_length()
    mask, ids = batch["attention_mask"], batch["input_ids"][:, cached:]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, cached:]
    with torch.inference_mode(), evaluating(trial.model):
        found = trial.model(ids, attention_mask=mask, position_ids=positions, past_key_values=batch["past_key_values"], use_cache=True).logits[:, -1]
    return Found(max(trial.distance(row.float(), trial.whole[length - 1]) for row, (_, length) in zip(found, rows, strict=True)))


def _prompt(trial: Trial, count: int, length: int) -> Prompt:
    """The first `length` ids of a trial, `count` of them cached."""
    receipt = Receipt(0, _NOBODY, _NOBODY, _NOBODY, "prefix", (), length, count, 0, 0.0)
    ids = torch.tensor([trial.ids[:length]], device=trial.model.device)
    states = trial.states if count == trial.count else ()
    return Prompt(ids, receipt, tuple(trial.load(count)), trial.model.config, states=states)


def _static(trial: Trial) -> Found:
    cache = static_cache(trial.model.config, trial.loaded, len(trial.ids) + 8, trial.states)
    found = trial.logits(trial.ids[trial.count :], cache)
    return Found(trial.distance(found, trial.live), torch.equal(found, trial.live))


def _move(trial: Trial) -> Found:
    """The prefix rotated to a later position, against a live pass at that position."""
    require_no_state(trial.layout, "a prefix at another place", "use reuse='prefix'")
    offset = min(1000, context_tokens(text_config(trial.model)) - len(trial.ids) - 1)
    places = torch.arange(offset, offset + len(trial.ids), device=trial.model.device)[None]
    wanted = trial.logits(trial.ids, DynamicCache(config=trial.model.config), position_ids=places)
    loaded = dynamic_cache(trial.model.config, trial.load(trial.count, offset))
    found = trial.logits(trial.ids[trial.count :], loaded, position_ids=places[:, trial.count :])
    moving = trial.distance(wanted, trial.whole)  # what the model's own rounding makes of a move: without it logits would stay as they are
    return Found(trial.distance(found, wanted[trial.count :]), limit=max(trial.limit, 3 * min(moving, STILL)))


CHECKS: dict[str, Callable[[Trial], Found]] = {
    "store and reload": _store,
    "continue": _continue,
    "cut": _cut,
    "batch": _batch,
    "static cache": _static,
    "move": _move,
}
