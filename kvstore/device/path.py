"""Which loads a device decodes by itself, and one pipeline a device for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from kvstore.artifact import tier_chain
from kvstore.codecs import codec_of, masked
from kvstore.device.pipeline import OnDevice, Pipeline, angles_of
from kvstore.device.ready import KV, Ready
from kvstore.device.streams import Streams
from kvstore.device.wanted import Wanted
from kvstore.families.rope import Angles
from kvstore.manifest import Layout

if TYPE_CHECKING:
    from kvstore.decode import Piece

Table = Callable[[Any, torch.dtype, int], Angles]
log = logging.getLogger("kvstore")


class DevicePath:
    """Decodes on the device of `streams` what can be decoded there: whole ladders of the codec `transform` from which nothing was dropped.

    `table(rope, dtype, count)` makes cos and sin of positions from 0 on that device.
    """

    def __init__(self, streams: Streams, pool: Executor, table: Table):
        self.streams, self.table = streams, table
        self.pipeline = Pipeline(streams, pool)
        self._on: dict[tuple[str, str], OnDevice] = {}
        self._lock = threading.Lock()

    @cached_property
    def why_not(self) -> str | None:
        """Why nothing can be decoded here; None where it can."""
        from kvstore.device.codec import unusable

        why: str | None = unusable(self.streams.device)
        if why is not None:
            log.info("decoding for %s on the CPU: %s", self.streams.device, why)
        return why

    def takes(self, piece: Piece) -> bool:
        """Whether this piece can be decoded here."""
        stored, layout = piece.stored, piece.stored.pack.layout
        spec = stored.encoding.codec(tier_chain(stored.encoding, piece.tier)[-1].codec)
        return spec.name == "transform" and not masked.drops(spec.params) and _plain(layout) and self.why_not is None

    def load(self, pieces: Sequence[Piece], cache: Sequence[KV], checks: Sequence[Future[None]]) -> Ready:
        """Start decoding pieces of one encoding at one tier. Raises IntegrityError, ResourceError, FormatError."""
        wanted = Wanted(pieces)
        angles = angles_of(wanted, lambda rope, count: self.table(rope, cache[0][0].dtype, count))
        return self.pipeline.load(self._decoder_for(wanted), wanted, cache, angles, checks)

    def _decoder_for(self, wanted: Wanted) -> OnDevice:
        from kvstore.device.codec import TransformOnDevice

        spec, dtype = wanted.encoding.codec(wanted.tiers[-1].codec), wanted.layout.dtype
        codec: Any = codec_of(spec, wanted.encoding, wanted.layout)
        with self._lock, torch.inference_mode(False):  # matrices outlive the caller's mode
            key = (codec.calibration.digest, dtype)
            if key not in self._on:
                self._on[key] = TransformOnDevice(codec.calibration, self.streams.device, dtype)
            return self._on[key]


def _plain(layout: Layout) -> bool:
    """Keys and values of one width, keys rotated: what the kernels place."""
    return layout.latent is None and layout.rotated == "keys"


def together(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that one load can take: those of one encoding and layout at one tier."""
    found: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        pack = piece.stored.pack
        found.setdefault((pack.manifest.encoding_id, pack.layout, piece.tier), []).append(piece)
    return list(found.values())
