"""The registry of codecs. Looking one up imports numpy and the codec's own file, nothing heavier."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from kvstore.codecs.base import Codec
from kvstore.errors import FormatError

REGISTRY = {
    "raw": "kvstore.codecs.raw:RawCodec",
    "lossless": "kvstore.codecs.lossless:LosslessCodec",
    "scalar": "kvstore.codecs.scalar:ScalarCodec",
}
NAMES = tuple(REGISTRY)


def codec_class(name: str) -> type[Codec]:
    """Raises FormatError for a codec that this version does not have."""
    if name not in REGISTRY:
        raise FormatError(f"unknown codec {name!r}, this kvstore has {', '.join(NAMES)}", remedy="upgrade kvstore")
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Codec] = getattr(import_module(module), attribute)
    return found


def get_codec(name: str, version: int, params: Mapping[str, int | str]) -> Codec:
    """The codec that wrote `version` with `params`. Raises FormatError for a version or parameters it does not know."""
    kind = codec_class(name)
    if version != kind.version:
        raise FormatError(f"codec {name} version {version}, this kvstore has version {kind.version}", remedy="upgrade kvstore")
    return kind(params)


def default_params(name: str, *, head_dim: int) -> tuple[int, dict[str, int | str]]:
    """Version and parameters for a new encoding of heads of `head_dim` channels."""
    kind = codec_class(name)
    return kind.version, kind.default_params(head_dim)
