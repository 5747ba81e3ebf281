"""Any lossy codec under a policy that drops tokens: which heads of which tokens are left out stands in the record of tier 0.

Dropped values are replaced, before the codec sees them, by what costs it least, and come back as NaN keys and zero values: nothing that is read as
data by mistake stays unnoticed. After the record's header stands a section of the mask, little-endian: u16 heads, u16 per_head (0: one row for all
heads of all layers; 1: one row each); one byte a layer and head, the policy's choice (zeros where it makes none), padded with zeros to whole words;
the rows of ceil(tokens / 32) words each, bit t mod 32 of word t div 32 set where token t is dropped. Then the codec's own record goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvstore.codecs.base import BITS, HEADER_WORDS, Array, Codec, Header, Record, check_bits, damaged, expect, read_header, words_of
from kvstore.codecs.scalar import to_float32
from kvstore.errors import FormatError, InputError
from kvstore.policies import parse

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
HEADER = 4 * HEADER_WORDS


@dataclass(frozen=True)
class Mask:
    """`dropped` bool [layers, heads, tokens] of one unit, `profile` uint8 [layers, heads]."""

    dropped: Flags
    profile: npt.NDArray[np.uint8]

    def bytes(self) -> bytes:
        layers, heads, tokens = self.dropped.shape
        per_head = bool((self.dropped != self.dropped[:1, :1]).any())
        rows = self.dropped.reshape(-1, tokens)[: None if per_head else 1]
        packed = np.packbits(np.pad(rows, ((0, 0), (0, -tokens % 32))), axis=1, bitorder="little")
        labels = self.profile.tobytes() + bytes(-layers * heads % 4)
        return np.array([heads, per_head], "<u2").tobytes() + labels + packed.tobytes()


def split(record: Record) -> tuple[bytes, Mask]:
    """The codec's own record of tier 0, and the mask. Raises IntegrityError."""
    header, words = read_header(record), words_of(record)
    if len(words) <= HEADER_WORDS:
        raise damaged("it has no mask")
    heads, per_head = int(words[HEADER_WORDS]) & 0xFFFF, int(words[HEADER_WORDS]) >> 16
    if heads == 0 or header.channels % heads or per_head > 1:
        raise damaged(f"a mask of {heads} heads for {header.channels} channels, or of an unknown kind")
    rows, each = (header.layers * heads if per_head else 1), -(-header.tokens // 32)
    labels = -(-header.layers * heads // 4)
    first = HEADER_WORDS + 1 + labels
    end = first + rows * each
    if end > len(words):
        raise damaged("its mask ends too early")
    flags = np.unpackbits(words[first:end].astype("<u4").view(np.uint8).reshape(rows, -1), axis=1, bitorder="little").astype(np.bool_)
    profile = words[HEADER_WORDS + 1 : first].astype("<u4").view(np.uint8)
    if flags[:, header.tokens :].any() or profile[header.layers * heads :].any():
        raise damaged("its mask is padded with something")
    each_head = flags[:, : header.tokens].reshape(*((header.layers, heads) if per_head else (1, 1)), -1)
    dropped = np.broadcast_to(each_head, (header.layers, heads, header.tokens))
    whole = bytes(record)
    return whole[:HEADER] + whole[4 * end :], Mask(dropped, profile[: header.layers * heads].reshape(header.layers, heads))


class MaskedCodec(Codec):
    """`inner` with dropped tokens. Its `params` are the inner ones and the policy."""

    def __init__(self, inner: Codec, policy: str):
        self.inner, self.params = inner, {**inner.params, "policy": policy}
        for name in ("name", "version", "exact", "n_tiers", "needs_calibration", "takes_steps"):
            setattr(self, name, getattr(inner, name))

    def encode(self, bits: Array, dtype: str, group: int = 0, **options: Any) -> list[bytes]:
        """Nothing dropped; `encode_masked` drops."""
        header = check_bits(bits, dtype)
        nothing = Mask(np.zeros((header.layers, 1, header.tokens), np.bool_), np.zeros((header.layers, 1), np.uint8))
        return self.encode_masked(bits, dtype, group, nothing, **options)

    def encode_masked(self, bits: Array, dtype: str, group: int, mask: Mask, **options: Any) -> list[bytes]:
        """As `Codec.encode`, without what `mask` drops. Raises InputError where the mask does not fit the values."""
        header = check_bits(bits, dtype)
        layers, heads, tokens = mask.dropped.shape
        if (layers, tokens) != (header.layers, header.tokens) or header.channels % heads:
            raise InputError(f"a mask of {mask.dropped.shape} for values of {bits.shape}")
        if self.inner.takes_kept:
            options["kept"] = ~mask.dropped
        first, *others = self.inner.encode(self._filled(bits, group, mask.dropped, dtype), dtype, group, **options)
        return [first[:HEADER] + mask.bytes() + first[HEADER:], *others]

    def decode(self, records: Sequence[Record], out: Array) -> None:
        header = expect(records, out, self.n_tiers)
        first, mask = split(records[0])
        self.inner.decode([first, *records[1:]], out)
        _mark(out, mask.dropped, header)

    def _filled(self, bits: Array, group: int, dropped: Flags, dtype: str) -> Array:
        """A copy with cheap values where tokens are dropped."""
        if not dropped.any():
            return bits
        fill = self.inner.fill if isinstance(self.inner, Fills) else _with_means
        cheap = to_bits(fill(to_float32(bits, dtype), dropped, group), dtype)
        return np.where(_spread(dropped, bits), cheap, bits)


@runtime_checkable
class Fills(Protocol):
    """A codec that knows what costs it least in place of values [layers, 2, tokens, channels] that are gone [layers, heads, tokens]."""

    def fill(self, values: Floats, gone: Flags, group: int) -> Floats: ...


def _spread(gone: Flags, values: Array) -> Flags:
    """bool, shaped as the values."""
    layers, kinds, tokens, channels = values.shape
    heads = gone.shape[1]
    return np.broadcast_to(gone.transpose(0, 2, 1)[:, None, :, :, None], (layers, kinds, tokens, heads, channels // heads)).reshape(values.shape)


def _with_means(values: Floats, gone: Flags, group: int) -> Floats:
    """The mean key of the tokens that stay, 0 for values: what codecs without a calibration centre."""
    flags = _spread(gone, values)
    kept = ~flags
    mean = np.where(kept, values, 0).sum(axis=2, keepdims=True) / np.maximum(kept.sum(axis=2, keepdims=True), 1)
    mean[:, 1] = 0
    return np.where(flags, mean.astype(np.float32), values)


def to_bits(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """Bit patterns of `values` in `dtype`, rounded to nearest even."""
    if dtype != "bfloat16":
        return values.astype(np.float16 if dtype == "float16" else np.float32).view(BITS[dtype])
    raw = values.view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) >> 16).astype(np.uint16)


def _mark(out: Array, dropped: Flags, header: Header) -> None:
    heads = dropped.shape[1]
    for layer, gone in enumerate(dropped.transpose(0, 2, 1)):  # [tokens, heads]
        for kind, value in ((0, np.nan), (1, 0.0)):
            rows = out[layer, kind].reshape(header.tokens, heads, -1)
            rows[gone] = value


def under(codec: Codec, policy: str) -> Codec:
    """`codec` under the policy of its parameters. Raises FormatError for one that this version does not know, or the codec does not serve."""
    try:
        found = parse(policy)
    except InputError as error:
        raise FormatError(f"codec {codec.name}: {error.message}", remedy="upgrade kvstore") from error
    if found.spec != policy or found.name == "uniform" or not (found.drops or codec.takes_steps) or codec.exact:
        raise FormatError(f"codec {codec.name} does not take the policy {policy!r}", remedy="upgrade kvstore")
    if found.drops:
        return MaskedCodec(codec, policy)
    codec.params = {**codec.params, "policy": policy}
    return codec


def drops(params: Mapping[str, int | str]) -> bool:
    """Whether values of a codec with these parameters may lack tokens. Raises FormatError for a policy that this version does not know."""
    try:
        return parse(str(params.get("policy", "uniform"))).drops
    except InputError as error:
        raise FormatError(error.message, remedy="upgrade kvstore") from error
