"""The connector's worker side: stored tokens are decoded on a thread of their own and put into the paged cache between two steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from kvstore.decode import KV, Decoder, Piece, allocate
from kvstore.errors import KvstoreError, NotFoundError
from kvstore.integrations.vllm_cache import slots
from kvstore.integrations.vllm_plan import Part, require_whole
from kvstore.integrations.vllm_requests import Load
from kvstore.manifest import Layout
from kvstore.store import Store

Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]  # K and V [tokens, heads of this rank, head_dim], slots int64 [tokens]
log = logging.getLogger("kvstore")


class Loads:
    """Loads of one worker. `writers` has, per stored layer that this worker computes, what puts K and V into slots of its cache."""

    def __init__(self, store: Store, layout: Layout, writers: Mapping[int, Writer], heads: slice, block_size: int, workers: int | None = None):
        self.store, self.layout, self.writers, self.heads, self.block_size = store, layout, writers, heads, block_size
        self._decoder = Decoder(workers)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvstore-vllm")  # one: the store's index is not for several
        self._running: dict[str, tuple[Load, Future[list[KV]]]] = {}
        self._damaged: set[int] = set()

    def start(self, loads: Iterable[Load]) -> None:
        for load in loads:
            self._running[load.request_id] = (load, self._pool.submit(self._decode, load))

    def finish(self) -> set[str]:
        """Put what is decoded into the cache. The requests whose loads ended, well or not."""
        done = [r for r, (_, future) in self._running.items() if future.done()]
        for request_id in done:
            load, future = self._running.pop(request_id)
            try:
                self._write(load, future.result())
            except KvstoreError as error:
                self._spoilt(load, error)
            except Exception as error:  # vLLM recomputes the blocks; an engine that dies of a load would take every request with it
                log.debug("request %s", request_id, exc_info=True)
                self._spoilt(load, error)
        return set(done)

    def take_damaged(self) -> set[int]:
        """Blocks that could not be filled since the last call."""
        damaged, self._damaged = self._damaged, set()
        return damaged

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _spoilt(self, load: Load, error: Exception) -> None:
        log.warning("vLLM recomputes %d tokens of request %s: %s", load.tokens, load.request_id, error)
        self._damaged.update(load.blocks)

    def _decode(self, load: Load) -> list[KV]:
        """Per stored layer K and V [1, kv_heads, tokens, head_dim], keys rotated to the prompt's positions."""
        layers = allocate(self.layout, load.tokens)
        for part in load.parts:
            try:
                self._fill(part, load.start, layers)
            except NotFoundError:  # gc moved it to another pack meanwhile
                self.store.refresh()
                self._fill(part, load.start, layers)
        return layers

    def _fill(self, part: Part, start: int, layers: list[KV]) -> None:
        stored = self.store.stored(part.key, part.encoding)
        require_whole(stored, part.tier)
        self._decoder.decode(Piece(stored, part.tier, part.count, part.at - start, part.at, first=part.first), layers)

    def _write(self, load: Load, layers: list[KV]) -> None:
        at = torch.from_numpy(slots(load.blocks, self.block_size))
        with torch.inference_mode():  # the cache's tensors may be of that kind
            for index, write in self.writers.items():
                keys, values = (t[0, self.heads].transpose(0, 1).contiguous() for t in layers[index])
                write(keys, values, at)


def layer_writer(layer: Any) -> Writer:
    """A writer for one of vLLM's attention layers: its backend's own, which knows how its cache is laid out."""

    def write(keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor) -> None:
        cache = layer.kv_cache
        layer.impl.do_kv_cache_update(layer, keys.to(cache.device), values.to(cache.device), cache, at.to(cache.device))

    return write
