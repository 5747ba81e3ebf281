"""Encoding what lies on a GPU: transform and quantization there, entropy coding on the CPU's threads.

Codecs that cannot be split so (all but `transform`, and that under a policy that drops tokens) get the values copied to the CPU, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.calibration.record import Calibration
from kvstore.codecs.base import BITS, Codec, Header
from kvstore.codecs.transform_ladder import Ladder
from kvstore.codecs.transform_levels import Limits, limits_of
from kvstore.codecs.transform_sets import RAW
from kvstore.codecs.transform_units import Set, Unit
from kvstore.device.levels import Analysis, blocks, holdable, quantise
from kvstore.manifest import Encoding

Records = list[list[list[bytes]]]  # [group][block][tier]
I8 = npt.NDArray[np.int8]


@runtime_checkable
class Quantises(Protocol):
    """A codec whose records are made of levels, which may come from elsewhere."""

    calibration: Calibration
    ladders: list[Ladder]

    def records(self, header: Header, unit: Unit) -> list[bytes]: ...


class DeviceEncoder:
    """Encodes values of one layout that lie on `device`; the matrices are put there once, a group at its first use."""

    def __init__(self, encoding: Encoding, codecs: Mapping[str, Codec], dtype: str, pool: ThreadPoolExecutor, device: torch.device):
        self.encoding, self.dtype, self.pool, self.device = encoding, dtype, pool, device
        self.splits: dict[str, Quantises] = {name: codec for name, codec in codecs.items() if isinstance(codec, Quantises)}
        self._analyses: dict[tuple[str, int], Analysis] = {}

    def encode(self, name: str, values: Tensor, steps: I8 | None = None) -> Records | None:
        """Records of all tiers of codec `name`, of `values` [layers, 2, tokens, channels]; `steps` int8 [tokens], the classes a policy chose.

        None where it must be left to the CPU: for codecs that cannot be split, and for values that no lossy codec can hold, which it names.
        """
        codec = self.splits.get(name)
        if codec is None or not holdable(values):
            return None
        size, block = self.encoding.group_layers, self.encoding.block_tokens
        waiting: list[list[Future[list[bytes]]]] = []
        for group, first in enumerate(range(0, values.shape[0], size)):
            mine = values[first : first + size]
            limits = self._limits(codec, group)
            codes, sets = quantise(mine, steps, self._analysis(name, codec, group), codec.ladders[group], limits)
            raw = _patterns(mine[:, :, torch.from_numpy(np.flatnonzero(codes == RAW)).to(mine.device)], self.dtype)
            units = _units(group, blocks(codes, sets, block), raw, self.dtype)
            waiting.append([self.pool.submit(codec.records, _header(unit, mine), unit) for unit in units])  # while the next group is on the device
        return [[done.result() for done in group] for group in waiting]

    def _analysis(self, name: str, codec: Quantises, group: int) -> Analysis:
        if (name, group) not in self._analyses:
            self._analyses[name, group] = Analysis.of(codec.calibration.bases[group], self.device)
        return self._analyses[name, group]

    @staticmethod
    def _limits(codec: Quantises, group: int) -> Limits:
        record = codec.calibration.record
        return limits_of(codec.calibration.bases[group], codec.ladders[group], record.exempt, record.energy[group])


def _units(group: int, parts: Sequence[tuple[I8, list[Set]]], raw: npt.NDArray[np.generic], dtype: str) -> list[Unit]:
    """One a block. `raw` [layers, 2, raw tokens, channels] are the bits of all blocks' raw tokens, in order."""
    ends = np.cumsum([int((mine == RAW).sum()) for mine, _ in parts])
    cuts = np.split(raw, ends[:-1], axis=2)
    return [Unit(group, mine, sets, np.ascontiguousarray(bits), dtype) for (mine, sets), bits in zip(parts, cuts, strict=True)]


def _header(unit: Unit, values: Tensor) -> Header:
    return Header(len(unit.codes), values.shape[0], 0, values.shape[3])


def _patterns(values: Tensor, dtype: str) -> npt.NDArray[np.generic]:
    """Bit patterns on the CPU."""
    kind = BITS[dtype]
    return values.cpu().contiguous().view(torch.int32 if kind.itemsize == 4 else torch.int16).numpy().view(kind)
