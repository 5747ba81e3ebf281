"""The registry of codecs. Looking one up imports numpy and the codec's own file, nothing heavier."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from kvstore.codecs.base import Codec, Record
from kvstore.errors import FormatError
from kvstore.manifest import CodecSpec, Encoding, Layout

if TYPE_CHECKING:
    from kvstore.calibration.record import Calibration

REGISTRY = {
    "raw": "kvstore.codecs.raw:RawCodec",
    "lossless": "kvstore.codecs.lossless:LosslessCodec",
    "scalar": "kvstore.codecs.scalar:ScalarCodec",
    "cachegen": "kvstore.codecs.cachegen:CacheGenCodec",
    "transform": "kvstore.codecs.transform:TransformCodec",
}
NAMES = tuple(REGISTRY)
CALIBRATED = frozenset({"transform"})  # the classes say so too; here a manifest is judged without importing them


def codec_class(name: str) -> type[Codec]:
    """Raises FormatError for a codec that this version does not have."""
    if name not in REGISTRY:
        raise FormatError(f"unknown codec {name!r}, this kvstore has {', '.join(NAMES)}", remedy="upgrade kvstore")
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Codec] = getattr(import_module(module), attribute)
    return found


def get_codec(name: str, version: int, params: Mapping[str, int | str], calibration: Calibration | None = None) -> Codec:
    """The codec that wrote `version` with `params` and, where it needs one, `calibration`. Any lossy codec may have the parameter `policy` besides.

    Raises FormatError for a version or parameters it does not know, and for a calibration too many or too few.
    """
    kind = codec_class(name)
    if version != kind.version:
        raise FormatError(f"codec {name} version {version}, this kvstore has version {kind.version}", remedy="upgrade kvstore")
    codec = kind({k: v for k, v in params.items() if k != "policy"}, calibration)
    if "policy" not in params:
        return codec
    from kvstore.codecs.masked import under

    return under(codec, str(params["policy"]))


def codec_of(spec: CodecSpec, encoding: Encoding, layout: Layout) -> Codec:
    """The codec of one of an encoding's specs, for values of `layout`, with its calibration from the process's registry.

    Raises FormatError where the calibration is not to be found, or was made for other groups, tiers or another layout, IntegrityError where it
    is damaged.
    """
    if spec.calibration is None:
        return get_codec(spec.name, spec.version, spec.params)
    from kvstore.calibration import registry
    from kvstore.calibration.checks import require_use

    calibration = registry.find(spec.calibration)
    require_use(calibration, spec, encoding, layout)
    return get_codec(spec.name, spec.version, spec.params, calibration)


def kind_nbytes(spec: CodecSpec, level: int, record: Record, dtype: str) -> tuple[int, int] | None:
    """`Codec.kind_nbytes` of one tier's record, whatever policy it was encoded under: the mask of dropped tokens belongs to neither kind."""
    from kvstore.codecs import masked

    own = masked.split(record)[0] if level == 0 and masked.drops(spec.params) else record
    return codec_class(spec.name).kind_nbytes(own, {k: v for k, v in spec.params.items() if k != "policy"}, dtype)


def default_params(name: str, *, head_dim: int) -> tuple[int, dict[str, int | str]]:
    """Version and parameters for a new encoding of heads of `head_dim` channels."""
    kind = codec_class(name)
    return kind.version, kind.default_params(head_dim)
