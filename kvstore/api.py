"""What users open: a store with its model, ready to load and to compose. Heavy imports happen at the first load, not at open."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from kvstore.artifact import Stored
from kvstore.errors import InputError, KvstoreError
from kvstore.hot import Recent
from kvstore.manifest import Row
from kvstore.store import Store

if TYPE_CHECKING:
    import torch
    from zarr import Group

    from kvstore.chains import Order
    from kvstore.compose import Composer
    from kvstore.decode import Decoder
    from kvstore.loader import Prefix
    from kvstore.lookup import View
    from kvstore.match import Match
    from kvstore.models import ModelSource
    from kvstore.prompt import Prompt
    from kvstore.reuse import Reuse
    from kvstore.verify import VerifyReport


def open(
    path: str | Path = "kv.zarr",
    model: Any = None,
    tokenizer: Any = None,
    *,
    template: str | None = None,
    encoding: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    host_cache: int = 0,
    device_cache: int = 0,
) -> OpenStore:
    """Open a store. With a `model` (path, hub id, or object with its `tokenizer`) its identity is checked, and its probe for objects.

    Without a model the store lists, verifies and compares; the first `load` or `compose` then loads the model that built it.
    Hot documents: `host_cache` bytes of decoded documents are kept in host memory, usable at any position; `device_cache` bytes of whole
    beginnings of prompts on the model's device, handed out again without a copy. Least recently used go first.
    Raises NotFoundError, FormatError, IncompatibleError.
    """
    return OpenStore(
        path, model, tokenizer, template=template, encoding=encoding, dtype=dtype, device=device, host_cache=host_cache, device_cache=device_cache
    )


class OpenStore(Store):
    """A store and, once needed, its model. `template` and `encoding` choose where the store holds several (beginnings of keys will do)."""

    def __init__(
        self,
        path: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        *,
        template: str | None = None,
        encoding: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        host_cache: int = 0,
        device_cache: int = 0,
    ):
        super().__init__(path)
        self._host_cache, self._device_cache = host_cache, device_cache
        self._given, self._tokenizer, self._dtype, self._device = model, tokenizer, dtype, device
        self._choice = {"template": template, "encoding": encoding}
        if model is not None:
            threading.Thread(target=_import_kernels, name="kvstore-import").start()
            self.source.require_known(self)
            if self.source.is_object and self.has_model(self.source.identity.key):
                self.source.check(self)
                self._warm_up()

    @cached_property
    def source(self) -> ModelSource:
        """The model, loaded lazily; compared with the store's probe when it is."""
        from kvstore.models import ModelSource, model_for

        if self._given is not None:
            return ModelSource(self._given, self._tokenizer, dtype=self._dtype, device=self._device)
        return model_for(self, None, dtype=self._dtype, device=self._device)

    @cached_property
    def model(self) -> Any:
        """The live model. Raises IncompatibleError where it does not compute what the store holds."""
        self.source.require_known(self)
        if not self.source.is_object:
            self._warm_up()  # while the weights are read
            self.source.check(self)
        return self.source.model

    def _warm_up(self) -> None:
        with suppress(KvstoreError):  # what is missing or damaged is for the load that wants it to report
            for row in self.rows(model=self.source.identity.key)[:1]:
                self._decoder.warm_up(self.artifacts(row)[-1], self.source.place)

    @cached_property
    def _decoder(self) -> Decoder:
        from kvstore.decode import Decoder

        return Decoder(host_cache=self._host_cache)

    @cached_property
    def _hot(self) -> Recent[Sequence[tuple[torch.Tensor, torch.Tensor]]]:
        """Outlives the composer: keys are content, which no snapshot changes. `tensors`: those of a cache on its way to a GPU, not waited for."""
        return Recent(self._device_cache, lambda layers: sum(k.nbytes + v.nbytes for k, v in getattr(layers, "tensors", layers)))

    def refresh(self) -> None:
        """See what others committed since."""
        super().refresh()
        self.__dict__.pop("_composer", None)

    @cached_property
    def _composer(self) -> Composer:
        from kvstore.compose import Composer

        _ = self.model  # checked before anything of it is used
        return Composer(self.view, self.source, self._decoder, self._hot)

    @property
    def view(self) -> View:
        """The model, template and encoding that loads come from."""
        from kvstore.lookup import View
        from kvstore.tokens import TextEncoder

        self.source.require_known(self)
        return View(self, self.source.identity, TextEncoder(self.source.tokenizer), **self._choice)

    def compose(
        self,
        documents: Any = (),
        query: str = "",
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        reuse: Reuse = "prefix",
        recompute: int | float | None = None,
        order: Order = "given",
        tier: str | None = None,
        max_kl: float | None = None,
        max_bytes: int | None = None,
        deadline: float | None = None,
    ) -> Prompt:
        """A prompt of head, `documents` and `query`, its beginning from the store. `model.generate(**prompt.inputs)` answers.

        `messages` instead of a query: earlier questions and answers and the question, as dicts of `role` and `content`, after the documents.
        `documents`: source names (`a.md`, `a.md#3`), Documents, dicts with text, or retriever objects. `reuse`: `prefix` takes the longest
        stored chain and is exact; `blocks` puts separately stored documents side by side, which is approximate; `epic`, `cacheblend` and `query` do
        too and compute some of their tokens anew: the first of each, those that changed most, those that the question attends to. `recompute` is
        how many: a whole number of tokens a document (epic: 16), or a share of all, 0.0 to 1.0 (the others: 0.15). `order`: `cached` may put the
        documents in another order, so that a longer stored chain is reused, and the receipt says so. At most one of `tier`, `max_kl`
        (nats a token), `max_bytes`, `deadline` (seconds); the finest stored tier otherwise.
        """
        from kvstore.quality import Quality

        quality = Quality(tier, max_kl, max_bytes, deadline)
        return self._composer.compose(listed(documents), _asked(query, messages), reuse, quality, recompute, order)

    def load(
        self, source: str, *, tier: str | None = None, max_kl: float | None = None, max_bytes: int | None = None, deadline: float | None = None
    ) -> Prefix:
        """The head and one stored document, or passage of it, as a cache to go on from: `.cache .input_ids .receipt .prompt(query)`."""
        from kvstore.loader import load
        from kvstore.quality import Quality

        return load(self._composer, source, Quality(tier, max_kl, max_bytes, deadline))

    def read(
        self,
        source: str,
        *,
        tier: str | None = None,
        max_kl: float | None = None,
        max_bytes: int | None = None,
        deadline: float | None = None,
        position: int = 0,
        device: str = "cpu",
    ) -> tuple[list[int], list[tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
        """One document's own KV, decoded at `position`, without a model: token ids, per layer (K, V) [1, heads, tokens, head_dim], receipt."""
        from kvstore.loader import read
        from kvstore.quality import Quality

        model = self.source.identity.key if self._given is not None else None
        artifact = self.artifact(source, model=model, **self._choice)
        return read(artifact, source, Quality(tier, max_kl, max_bytes, deadline), self._decoder, position, device)

    def match(self, text: str, source: str | None = None) -> Match:
        """The longest stored run for a text, and where it first differs."""
        from kvstore.match import match

        view = self.view
        record = view.renderer.record
        return match(self, view.renderer.document(text), model=view.model.key, template=record.id, encoding=view.encoding_id, source=source)

    def verify(self) -> VerifyReport:
        """Check every digest in the store."""
        from kvstore.verify import verify

        return verify(self)

    def as_zarr(self, tier: str) -> Group:
        """A read-only Zarr group with one array a pack, at `tier`, refinements applied. K is before RoPE."""
        from kvstore.zarr_view import as_zarr

        return as_zarr(self, tier)

    def artifacts(self, row: Row) -> list[Stored]:
        """Every stored artifact that a row needs."""
        return [self.stored(key, row.encoding) for key in sorted(row.segment_keys())]


def _asked(query: Any, messages: Sequence[Mapping[str, Any]] | None) -> str | Sequence[Mapping[str, Any]]:
    """The query, or the messages instead. Raises InputError for neither and for both."""
    if messages is not None:
        if query:
            raise InputError("both a query and messages", remedy="the last message is the query: pass one of the two")
        return messages
    if not isinstance(query, str) or not query.strip():
        raise InputError("a prompt needs a query", remedy="pass query=, or use load() for the cache alone")
    return query


def _import_kernels() -> None:
    """numba takes a third of a second to import: done while the model is read, not at the first load."""
    with suppress(KvstoreError):  # numba may be missing: whoever needs it says so
        importlib.import_module("kvstore.placing")


def listed(documents: Any) -> list[Any]:
    """One document or many, as a list. Raises InputError for what is neither."""
    if documents is None:
        return []
    if isinstance(documents, (str, Mapping)) or any(hasattr(documents, name) for name in ("text", "page_content", "node")):
        return [documents]
    if not isinstance(documents, Iterable) or isinstance(documents, (bytes, PurePath)):
        raise InputError(
            f"{type(documents).__name__} is not a document", remedy="pass source names, Documents, dicts with text, or retriever objects"
        )
    return list(documents)
