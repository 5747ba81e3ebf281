"""numba's compiler behind one door: cached on disk where some folder is writable, compiled afresh where none is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from kvstore.errors import ResourceError

try:
    import numba
    from numba import float32, int8, int32, int64, uint8, uint16, uint32, uint64
except ImportError as missing:
    raise ResourceError("this codec needs numba, which is not installed", remedy="pip install numba, or use the codec raw") from missing

__all__ = ["compiled", "float32", "helper", "inlined", "int8", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]

log = logging.getLogger("kvstore")
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """`function` as machine code that releases the GIL.

    numba keeps its cache beside the source, else in the user's cache folder (or `NUMBA_CACHE_DIR`), and refuses to decorate
    where neither is writable (read-only image without a home): then the code lives as long as the process.
    """
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        wrapped: Function = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        log.info("no folder for compiled code is writable, compiling %s afresh: set NUMBA_CACHE_DIR", function.__name__)
        wrapped = numba.njit(**options)(function)
    return wrapped


def inlined(function: Function) -> Function:
    """A helper of compiled functions, part of their code."""
    wrapped: Function = numba.njit(forceinline=True, nogil=True, error_model="numpy", boundscheck=False)(function)
    return wrapped


def helper(function: Function) -> Function:
    """A function that compiled functions call."""
    wrapped: Function = numba.njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    return wrapped
