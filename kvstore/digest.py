"""Canonical bytes and sha256 over them: every key in kvstore is made here.

A value is encoded with a one-byte type tag and an 8-byte little-endian length, so no two values share an encoding;
a domain such as `kvstore/segment/1` goes first, so no two kinds of key can meet. Floats are refused: a measured number
in a key would make equal things unequal.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

Canonical = None | bool | int | str | bytes | Sequence["Canonical"] | Mapping[str, "Canonical"]


def _tagged(tag: bytes, payload: bytes) -> bytes:
    return tag + struct.pack("<Q", len(payload)) + payload


def canonical(value: Canonical) -> bytes:
    """The one byte string of `value`. Raises TypeError for floats and anything else that has no canonical form."""
    if value is None:
        return _tagged(b"n", b"")
    if isinstance(value, bool):
        return _tagged(b"t", b"\x01" if value else b"\x00")
    if isinstance(value, int):
        return _tagged(b"i", str(value).encode())
    if isinstance(value, str):
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _tagged(b"b", bytes(value))
    if isinstance(value, Mapping):
        return _tagged(b"m", b"".join(canonical(k) + canonical(value[k]) for k in sorted(value)))
    if isinstance(value, Sequence):
        return _tagged(b"l", b"".join(map(canonical, value)))
    raise TypeError(f"{type(value).__name__} has no canonical form")


def digest(domain: str, value: Canonical) -> str:
    """sha256 of `value` in `domain`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(domain) + canonical(value)).hexdigest()


def sha256(data: bytes | memoryview) -> str:
    """sha256 of raw bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
