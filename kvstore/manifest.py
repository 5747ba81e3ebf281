"""What kvstore writes as JSON: frozen records, parsed strictly (unknown fields are refused), with a version gate.

`schemas/README.md` is the normative text; these types are its executable form. Nothing here imports torch or zarr.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvstore.digest import digest
from kvstore.errors import FormatError, IntegrityError

FORMAT = 1
ValueDtype = Literal["bfloat16", "float16", "float32"]
Regime = Literal["prefix", "isolated"]
Record = TypeVar("Record", bound=msgspec.Struct)

# what may stand in a record at all: held when it is parsed, before anything is allocated or any path is formed from it
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]  # `$` alone would let a newline follow
Positive = Annotated[int, Meta(ge=1, le=2**53 - 1)]  # whole in every JSON reader
Layers = Annotated[int, Meta(ge=1, le=1 << 12)]
Width = Annotated[int, Meta(ge=1, le=1 << 16)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 2)]  # 2**32 - 1 is padding


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record on disk."""


class RopeRecord(Strict, frozen=True):
    """How one class of layers rotates its keys, so that loading needs no model code.

    Channels `start : start + dim` of each head are rotated in pairs: (i, i + dim/2) for `half`, (2i, 2i + 1) for `interleaved`.
    `inv_freq` is float32 little-endian in hexadecimal; cos and sin are multiplied by `scaling`. `arithmetic` says in which
    precision the model multiplies: its own dtype (cos and sin rounded first), float32, or float32 with cos and sin rounded first.
    """

    start: Annotated[int, Meta(ge=0, lt=1 << 16)]
    dim: Annotated[int, Meta(ge=2, le=1 << 16, multiple_of=2)]
    layout: Literal["half", "interleaved"]
    inv_freq: Annotated[str, Meta(pattern=r"^([0-9a-f]{8})+$(?!\n)", max_length=1 << 18)]
    scaling: float
    arithmetic: Literal["model", "float32", "rounded"]
    kind: str

    def frequencies(self) -> npt.NDArray[np.float32]:
        """float32 [dim / 2], radians a token."""
        return np.frombuffer(bytes.fromhex(self.inv_freq), dtype="<f4")


class StateTensor(Strict, frozen=True):
    """One tensor of a layer's recurrent state, of one sequence. `layer` counts all layers of the model's cache, `shape` is without the batch.

    `name` is its kind (`conv` or `recurrent`) and its number among those of the kind in the layer.
    """

    layer: Annotated[int, Meta(ge=0, lt=1 << 12)]
    name: Annotated[str, Meta(pattern=r"^(conv|recurrent)(0|[1-9][0-9]?)$(?!\n)")]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 31)], ...], Meta(min_length=1, max_length=8)]
    dtype: ValueDtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2)


class Layout(Strict, frozen=True, omit_defaults=True):
    """What is cached per layer. `rope_of[layer]` indexes `ropes`, or is None where the layer has no RoPE.

    Layers are those of the model's cache that have keys and values, in order. `capture` is `hooked` where K was seen before its rotation,
    `unrotated` where it had to be computed back from the cache. `latent`: widths of the cached keys and values of latent attention, whose one
    head is stored as two halves of `head_dim` channels (families/latent.py). `rotated` is the cached tensor that RoPE turns.
    `rope_regime` names the one frequency table that holds up to `rope_limit` positions, where the model has several; `static` where it has one.
    `state`: the recurrent tensors that a segment's end leaves in the cache, by layer and name; a segment is exact only with them.
    Fields with a default are left out of files and keys where they have it.
    """

    layers: Layers
    kv_heads: Annotated[int, Meta(ge=1, le=1 << 14)]
    head_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    dtype: ValueDtype
    capture: Literal["hooked", "unrotated"]
    rope_of: tuple[Annotated[int, Meta(ge=0, lt=1 << 12)] | None, ...]
    ropes: tuple[RopeRecord, ...]
    latent: tuple[Width, Width] | None = None
    rotated: Literal["keys", "values"] = "keys"
    rope_regime: Annotated[str, Meta(pattern=r"^[a-z]{1,32}$(?!\n)")] = "static"
    rope_limit: Positive | None = None
    state: tuple[StateTensor, ...] = ()

    @property
    def channels(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def values_per_token(self) -> int:
        return self.layers * 2 * self.channels

    @property
    def state_nbytes(self) -> int:
        """Bytes of one segment's recurrent state; 0 for models that have none."""
        return sum(t.nbytes for t in self.state)

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of a head of the cached keys, and of the cached values."""
        return self.latent or (self.head_dim, self.head_dim)

    @property
    def turned(self) -> int:
        """Which of the pair (keys, values) RoPE turns: 0 or 1."""
        return ("keys", "values").index(self.rotated)

    def identity(self) -> dict[str, Any]:
        """The part that enters keys: no measured float (inv_freq follows from the config, which the model key holds)."""
        turned = [None if r is None else self._geometry(self.ropes[r]) for r in self.rope_of]
        found: dict[str, Any] = {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "capture": self.capture,
            "keys": "before-rope",
            "rotated": turned,
        }
        if self.latent is not None:
            found["latent"] = list(self.latent)
        if self.rotated != "keys":
            found["tensor"] = self.rotated
        if self.state:
            found["state"] = [{"layer": t.layer, "name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in self.state]
        return found

    @staticmethod
    def _geometry(rope: RopeRecord) -> dict[str, Any]:
        return {"start": rope.start, "dim": rope.dim, "layout": rope.layout}


class Tier(Strict, frozen=True):
    """One layer of quality. `array` is its folder in the pack; `requires` names the tiers that must be read with it."""

    name: Annotated[str, Meta(min_length=1)]
    array: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$(?!\n)")]
    codec: str
    level: Annotated[int, Meta(ge=0, le=15)]
    requires: tuple[str, ...]
    exact: bool


class CodecSpec(Strict, frozen=True):
    name: str
    version: Positive
    params: dict[str, int | str]
    calibration: Digest | None = None


class Encoding(Strict, frozen=True):
    """How values become bytes: the codecs, their tiers (base first), and the unit's size."""

    codecs: Annotated[tuple[CodecSpec, ...], Meta(min_length=1)]
    tiers: Annotated[tuple[Tier, ...], Meta(min_length=1)]
    block_tokens: Annotated[int, Meta(ge=1, le=1 << 12)]
    group_layers: Layers

    @property
    def id(self) -> str:
        return digest("kvstore/encoding/1", msgspec.to_builtins(self))

    def tier(self, name: str) -> Tier | None:
        return next((t for t in self.tiers if t.name == name), None)

    def codec(self, name: str) -> CodecSpec:
        return next(c for c in self.codecs if c.name == name)


class FileDigest(Strict, frozen=True):
    """`sha256` is None for shards: their content is covered by the digests of `segments`, their index by its own crc32c."""

    bytes: Positive
    sha256: Digest | None = None


class Model(Strict, frozen=True):
    """The model as packs and snapshots name it; `key` is design section 3's model_key."""

    key: Digest
    name: str
    weights: Digest
    config: dict[str, Any]
    dtype: ValueDtype
    adapters: tuple[str, ...] = ()
    quantization: str | None = None
    code: Digest | None = None


class ModelRecord(Strict, frozen=True):
    """models/<key>/zarr.json: the model, its layout, and the ids of the probe whose sketch lies beside it.

    `digest` covers all other fields, `probe_sha256` the sketch's bytes; `add_model` fills both in.
    """

    format: int
    kind: Literal["model"]
    model: Model
    layout: Layout
    probe_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=1 << 12)]
    provenance: dict[str, str]
    probe_sha256: Digest = ""
    digest: Digest = ""

    def own_digest(self) -> str:
        body = {k: v for k, v in msgspec.to_builtins(self).items() if k != "digest"}
        return digest("kvstore/model-record/1", msgspec.json.encode(body, order="deterministic"))


class PackManifest(Strict, frozen=True):
    """packs/<digest>/zarr.json, attributes.kvstore."""

    format: int
    kind: Literal["pack"]
    model: Digest
    layout: Layout
    encoding: Encoding
    encoding_id: Digest
    segments: Positive
    slots: Positive
    files: dict[str, FileDigest]
    provenance: dict[str, str]


class Part(Strict, frozen=True):
    """A piece of a template: its text and the ids it became."""

    text: str
    ids: tuple[TokenId, ...]


class TemplateRecord(Strict, frozen=True):
    """.kvstore/templates/<digest>.json: the prompt's fixed parts. `source` tells from what it was cut (so that it is reused)."""

    format: int
    kind: str
    source: Digest
    tokenizer: Digest
    system: str | None
    anchor: Part
    head: Part
    document_start: Part
    document_end: Part
    query_start: Part
    query_end: Part

    @property
    def id(self) -> str:
        return digest("kvstore/template/1", msgspec.to_builtins(self))


class Passage(Strict, frozen=True):
    """One stored piece of a document: its length and the segment keys it is stored under."""

    tokens: Positive
    prefix: Digest | None = None
    isolated: Digest | None = None


class Chained(Strict, frozen=True):
    """A passage of a row (by its place) stored once more, under `key`, after another segment than the head: a passage of this or another document."""

    passage: Annotated[int, Meta(ge=0, le=2**53 - 1)]
    parent: Digest
    key: Digest


class Row(Strict, frozen=True):
    """One document of a snapshot in one model, template and encoding.

    `text` is the digest of the document's text, `recipe` says how it was cut, `root` is the folder a build syncs. `chains` is absent where there
    are none: `chained` is the same as a tuple.
    """

    source: Annotated[str, Meta(min_length=1)]
    model: Digest
    template: Digest
    encoding: Digest
    text: Digest
    recipe: str
    head: Digest | None
    passages: tuple[Passage, ...]
    root: str = ""
    metadata: dict[str, Any] = {}
    chains: Annotated[tuple[Chained, ...], Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET

    @property
    def id(self) -> tuple[str, str, str, str]:
        return (self.source, self.model, self.template, self.encoding)

    @property
    def chained(self) -> tuple[Chained, ...]:
        return () if self.chains is msgspec.UNSET else self.chains

    def segment_keys(self) -> set[str]:
        """Every segment key this row needs, the head's and those of its chains included."""
        found = {k for p in self.passages for k in (p.prefix, p.isolated)} | {self.head}
        return {k for k in found if k is not None} | {k for c in self.chained for k in (c.parent, c.key)}


class Snapshot(Strict, frozen=True):
    """.kvstore/snapshots/<number>.json: a delta against `parent`, or (`full`) every row.

    `digest` covers all other fields; `removed` lists row ids.
    """

    format: int
    number: Positive
    parent: Positive | None
    parent_digest: Digest | None
    full: bool
    created: str
    note: str
    rows: tuple[Row, ...]
    removed: tuple[tuple[str, Digest, Digest, Digest], ...]
    digest: Digest = ""

    def own_digest(self) -> str:
        body = {k: v for k, v in msgspec.to_builtins(self).items() if k != "digest"}
        return digest("kvstore/snapshot/1", msgspec.json.encode(body, order="deterministic"))


class StoreRecord(Strict, frozen=True):
    """zarr.json of the root, attributes.kvstore."""

    format: int
    kind: Literal["store"]
    id: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]


def parse(data: bytes | dict[str, Any], kind: type[Record], where: str) -> Record:
    """A record of type `kind` from JSON bytes or plain values.

    Raises FormatError for another format version or fields that this version does not know, IntegrityError for broken JSON.
    """
    try:
        plain = msgspec.json.decode(data) if isinstance(data, bytes) else data
    except (msgspec.DecodeError, RecursionError) as error:
        raise IntegrityError(f"{where}: not JSON ({error})", remedy="restore the file from a copy, or rebuild") from error
    if "format" in kind.__struct_fields__:
        check_format(plain, where)
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where}: {error}", remedy="it was not written by this version of kvstore") from error


def check_format(plain: Any, where: str) -> None:
    """Refuse what another format version wrote, before looking at anything else in it."""
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != FORMAT:
        raise FormatError(f"{where}: format {found!r}, this kvstore reads format {FORMAT}", remedy="upgrade kvstore")


def zarr_group(attributes: msgspec.Struct | None = None) -> bytes:
    """zarr.json of a Zarr v3 group that carries `attributes` under the name kvstore; deterministic bytes."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": {} if attributes is None else {"kvstore": msgspec.to_builtins(attributes)}}
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=1)


class _Attributes(Strict, frozen=True):
    kvstore: dict[str, Any]


class _Group(Strict, frozen=True):
    """zarr.json of a group that kvstore wrote, and nothing else: no consolidated metadata, no attributes of others."""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: _Attributes


def parse_group(data: bytes, kind: type[Record], where: str) -> Record:
    """The kvstore attributes of a group's zarr.json as a record of type `kind`."""
    try:
        attributes = msgspec.json.decode(data, type=_Group).attributes.kvstore
    except (msgspec.DecodeError, RecursionError) as error:
        raise FormatError(f"{where}: not a kvstore group ({error})", remedy="check the path") from error
    return parse(attributes, kind, where)
