"""A tier of a store as plain Zarr: a read-only group of one array a pack, in which refinements are already applied to what they refine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.abc.store import Store as ZarrStore
from zarr.core.buffer import Buffer, BufferPrototype

from kvstore.arrays import stored_type
from kvstore.artifact import tier_chain
from kvstore.codecs import codec_of
from kvstore.errors import NotFoundError
from kvstore.manifest import zarr_group
from kvstore.pack import Pack
from kvstore.store import Store
from kvstore.zarr_json import LITTLE, array_metadata

if TYPE_CHECKING:
    from zarr import Group


def as_zarr(store: Store, tier: str) -> Group:
    """Group of arrays [layer, kv, token, channel], named by pack digest: float32, or bit patterns for exact tiers; padding is NaN.

    K is before RoPE. Decoded chunk by chunk as it is read. Raises NotFoundError where no pack has the tier.
    """
    packs = [store.index.pack(name) for name in store.index.packs()]
    having = {p.name: p for p in packs if p.encoding.tier(tier) is not None}
    if not having:
        raise NotFoundError(f"no pack of {store.path} has a tier {tier!r}", remedy="`kvstore stats` lists the tiers")
    return zarr.open_group(TierStore(having, tier), mode="r")


class TierStore(ZarrStore):
    """Zarr keys of a group of packs at one tier, made on demand."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, packs: dict[str, Pack], tier: str):
        super().__init__(read_only=True)
        self.packs, self.tier = packs, tier

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TierStore) and (self.tier, self.packs.keys()) == (other.tier, other.packs.keys())

    def __hash__(self) -> int:
        return hash((self.tier, tuple(self.packs)))

    def _value(self, key: str) -> bytes | None:
        if key == "zarr.json":
            return bytes(zarr_group())
        name, _, rest = key.partition("/")
        if name not in self.packs:
            return None
        return self._metadata(self.packs[name]) if rest == "zarr.json" else self._chunk(self.packs[name], rest)

    def _metadata(self, pack: Pack) -> bytes:
        encoding, layout = pack.encoding, pack.layout
        data_type, fill = stored_type(tier_chain(encoding, self.tier)[-1], layout.dtype)
        chunk = [encoding.group_layers, 2, encoding.block_tokens, layout.channels]
        shape = [layout.layers, 2, pack.manifest.slots, layout.channels]
        return bytes(array_metadata(data_type, shape, chunk, fill, ["layer", "kv", "token", "channel"], [LITTLE]))

    def _chunk(self, pack: Pack, key: str) -> bytes | None:
        try:
            group, _, block, _ = map(int, key.removeprefix("c.").split("."))
        except ValueError:
            return None
        if not (0 <= group < pack.groups and 0 <= block < pack.manifest.slots // pack.encoding.block_tokens):
            return None
        tiers = tier_chain(pack.encoding, self.tier)
        spec, layout = pack.encoding.codec(tiers[-1].codec), pack.layout
        records = [pack.unit(t.array, group, block) for t in tiers]
        codec = codec_of(spec, pack.encoding, layout)
        tokens, layers = codec.peek_tokens(records[0]), len(pack.group_layers(group))
        data_type, fill = stored_type(tiers[-1], layout.dtype)
        dtype = np.dtype(data_type)
        whole = np.full((pack.encoding.group_layers, 2, pack.encoding.block_tokens, layout.channels), dtype.type(fill), dtype)
        decoded = np.empty((layers, 2, tokens, layout.channels), dtype)
        codec.decode(records, decoded)
        whole[:layers, :, :tokens] = decoded
        return whole.tobytes()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await asyncio.to_thread(self._value, key)
        return None if value is None else prototype.buffer.from_bytes(_cut(value, byte_range))

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]) -> list[Buffer | None]:
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._value, key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        for key in ("zarr.json", *(f"{name}/zarr.json" for name in self.packs)):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        for name in ("zarr.json", *self.packs) if prefix in ("", "/") else ("zarr.json",):
            yield name


def _cut(value: bytes, wanted: Any) -> bytes:
    if isinstance(wanted, RangeByteRequest):
        return value[wanted.start : wanted.end]
    if isinstance(wanted, OffsetByteRequest):
        return value[wanted.offset :]
    return value[-wanted.suffix :] if isinstance(wanted, SuffixByteRequest) else value
