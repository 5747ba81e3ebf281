"""Hot documents: what was decoded is kept, least recently used out first, and shared without copying. Nothing here is ever written to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from kvstore.errors import InputError

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values up to `budget` bytes together, in the order of their last use. For many threads; 0 keeps nothing.

    `size` gives a value's bytes. A value larger than the budget is handed through and not kept.
    """

    def __init__(self, budget: int, size: Callable[[Value], int]):
        if budget < 0:
            raise InputError(f"a cache of {budget} bytes", remedy="give 0 or more")
        self.budget, self._size = budget, size
        self.nbytes = 0
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Value | None:
        """The value, now the most recent; None where there is none."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: Hashable, value: Value) -> None:
        """Keep a value, and let go of the oldest ones until all fit. Of two threads that made the same one the later stays."""
        size = self._size(value)
        if size > self.budget:
            return
        with self._lock:
            self._drop(key)
            self._kept[key] = value
            self.nbytes += size
            while self.nbytes > self.budget:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: Hashable) -> None:
        if (value := self._kept.pop(key, None)) is not None:
            self.nbytes -= self._size(value)
