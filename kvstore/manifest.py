"""What kvstore writes as JSON: frozen records, parsed strictly (unknown fields are refused), with a version gate.

`schemas/README.md` is the normative text; these types are its executable form. Nothing here imports torch or zarr.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.digest import digest
from kvstore.errors import FormatError, IntegrityError

FORMAT = 1
ValueDtype = Literal["bfloat16", "float16", "float32"]
Regime = Literal["prefix", "isolated"]
Record = TypeVar("Record", bound=msgspec.Struct)


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of every record on disk."""


class RopeRecord(Strict):
    """How one class of layers rotates its keys, so that loading needs no model code.

    Channels `start : start + dim` of each head are rotated in pairs: (i, i + dim/2) for `half`, (2i, 2i + 1) for `interleaved`.
    `inv_freq` is float32 little-endian in hexadecimal; cos and sin are multiplied by `scaling`. `arithmetic` says in which
    precision the model multiplies: its own dtype (cos and sin rounded first) or float32.
    """

    start: int
    dim: int
    layout: Literal["half", "interleaved"]
    inv_freq: str
    scaling: float
    arithmetic: Literal["model", "float32"]
    kind: str

    def frequencies(self) -> npt.NDArray[np.float32]:
        """float32 [dim / 2], radians a token."""
        return np.frombuffer(bytes.fromhex(self.inv_freq), dtype="<f4")


class Layout(Strict):
    """What is cached per layer. `rope_of[layer]` indexes `ropes`, or is None where the layer has no RoPE.

    `capture` is `hooked` where K was seen before its rotation, `unrotated` where it had to be computed back from the cache.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: ValueDtype
    capture: Literal["hooked", "unrotated"]
    rope_of: tuple[int | None, ...]
    ropes: tuple[RopeRecord, ...]

    @property
    def channels(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def values_per_token(self) -> int:
        return self.layers * 2 * self.channels

    def identity(self) -> dict[str, Any]:
        """The part that enters keys: no measured float (inv_freq follows from the config, which the model key holds)."""
        rotated = [None if r is None else self._geometry(self.ropes[r]) for r in self.rope_of]
        return {"layers": self.layers, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "dtype": self.dtype,
                "capture": self.capture, "keys": "before-rope", "rotated": rotated}  # fmt: skip

    @staticmethod
    def _geometry(rope: RopeRecord) -> dict[str, Any]:
        return {"start": rope.start, "dim": rope.dim, "layout": rope.layout}


class Tier(Strict):
    """One layer of quality. `array` is its folder in the pack; `requires` names the tiers that must be read with it."""

    name: str
    array: str
    codec: str
    level: int
    requires: tuple[str, ...]
    exact: bool


class CodecSpec(Strict):
    name: str
    version: int
    params: dict[str, int | str]
    calibration: str | None = None


class Encoding(Strict):
    """How values become bytes: the codecs, their tiers (base first), and the unit's size."""

    codecs: tuple[CodecSpec, ...]
    tiers: tuple[Tier, ...]
    block_tokens: int
    group_layers: int

    @property
    def id(self) -> str:
        return digest("kvstore/encoding/1", msgspec.to_builtins(self))

    def tier(self, name: str) -> Tier | None:
        return next((t for t in self.tiers if t.name == name), None)

    def codec(self, name: str) -> CodecSpec:
        return next(c for c in self.codecs if c.name == name)


class FileDigest(Strict):
    """`sha256` is None for shards: their content is covered by the digests of `segments`, their index by its own crc32c."""

    bytes: int
    sha256: str | None = None


class Model(Strict):
    """The model as packs and snapshots name it; `key` is design section 3's model_key."""

    key: str
    name: str
    weights: str
    config: dict[str, Any]
    dtype: ValueDtype
    adapters: tuple[str, ...] = ()
    quantization: str | None = None
    code: str | None = None


class ModelRecord(Strict):
    """models/<key>/zarr.json: the model, its layout, and the ids of the probe whose sketch lies beside it.

    `digest` covers all other fields, `probe_sha256` the sketch's bytes; `add_model` fills both in.
    """

    format: int
    kind: Literal["model"]
    model: Model
    layout: Layout
    probe_ids: tuple[int, ...]
    provenance: dict[str, str]
    probe_sha256: str = ""
    digest: str = ""

    def own_digest(self) -> str:
        body = {k: v for k, v in msgspec.to_builtins(self).items() if k != "digest"}
        return digest("kvstore/model-record/1", msgspec.json.encode(body, order="deterministic"))


class PackManifest(Strict):
    """packs/<digest>/zarr.json, attributes.kvstore."""

    format: int
    kind: Literal["pack"]
    model: str
    layout: Layout
    encoding: Encoding
    encoding_id: str
    segments: int
    slots: int
    files: dict[str, FileDigest]
    provenance: dict[str, str]


class Part(Strict):
    """A piece of a template: its text and the ids it became."""

    text: str
    ids: tuple[int, ...]


class TemplateRecord(Strict):
    """.kvstore/templates/<digest>.json: the prompt's fixed parts. `source` tells from what it was cut (so that it is reused)."""

    format: int
    kind: str
    source: str
    tokenizer: str
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


class Passage(Strict):
    """One stored piece of a document: its length and the segment keys it is stored under."""

    tokens: int
    prefix: str | None = None
    isolated: str | None = None


class Row(Strict):
    """One document of a snapshot in one model, template and encoding.

    `text` is the digest of the document's text, `recipe` says how it was cut, `root` is the folder a build syncs.
    """

    source: str
    model: str
    template: str
    encoding: str
    text: str
    recipe: str
    head: str | None
    passages: tuple[Passage, ...]
    root: str = ""
    metadata: dict[str, Any] = {}

    @property
    def id(self) -> tuple[str, str, str, str]:
        return (self.source, self.model, self.template, self.encoding)

    def keys(self) -> set[str]:
        """Every segment key this row needs, the head's included."""
        found = {k for p in self.passages for k in (p.prefix, p.isolated)} | {self.head}
        return {k for k in found if k is not None}


class Snapshot(Strict):
    """.kvstore/snapshots/<number>.json: a delta against `parent`, or (`full`) every row.

    `digest` covers all other fields; `removed` lists row ids.
    """

    format: int
    number: int
    parent: int | None
    parent_digest: str | None
    full: bool
    created: str
    note: str
    rows: tuple[Row, ...]
    removed: tuple[tuple[str, str, str, str], ...]
    digest: str = ""

    def own_digest(self) -> str:
        body = {k: v for k, v in msgspec.to_builtins(self).items() if k != "digest"}
        return digest("kvstore/snapshot/1", msgspec.json.encode(body, order="deterministic"))


class StoreRecord(Strict):
    """zarr.json of the root, attributes.kvstore."""

    format: int
    kind: Literal["store"]
    id: str


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
    document = {"zarr_format": 3, "node_type": "group",
                "attributes": {} if attributes is None else {"kvstore": msgspec.to_builtins(attributes)}}  # fmt: skip
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=1)


def parse_group(data: bytes, kind: type[Record], where: str) -> Record:
    """The kvstore attributes of a group's zarr.json as a record of type `kind`."""
    try:
        attributes = msgspec.json.decode(data)["attributes"]["kvstore"]
    except (msgspec.DecodeError, RecursionError, KeyError, TypeError) as error:
        raise FormatError(f"{where}: not a kvstore group ({error!r})", remedy="check the path") from error
    return parse(attributes, kind, where)
