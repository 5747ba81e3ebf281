"""The codec `transform` on a device: units of a group to levels (Triton), levels to values (a matrix product), values into a cache (Triton).

A coefficient with levels beyond 2,048 (escapes only), which float16 does not hold exactly, is summed twice: as its float16 and as what that leaves.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.calibration.record import Calibration
from kvstore.codecs import tables
from kvstore.codecs.base import Record, damaged, read_header, words_of
from kvstore.codecs.transform_ladder import CLASSES, Ladder
from kvstore.device.placement import KV, Place, Target, place_rows
from kvstore.device.plan import LANES, PART, TOKEN_BITS, WHOLE, Matrix, Plan, RawTokens, make_plan
from kvstore.device.synthesis import Group, group_bytes, product
from kvstore.errors import InputError, ResourceError
from kvstore.families.rope import Angles
from kvstore.manifest import RopeRecord

__all__ = ["Levels", "Target", "TransformOnDevice", "decode_group", "unusable"]

AT_ONCE = 1 << 24  # values that a matrix product makes at a time: 64 MiB, most of which the L2 cache of a large GPU holds until they are placed
TORCH = (2, 8)  # the first torch whose products of float16 matrices can be float32
ESCAPES = 128  # escapes a program
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]


def unusable(device: torch.device | str) -> str | None:
    """Why units cannot be decoded on `device`; None where they can. The CPU decodes with `codecs.transform`, here only by Triton's interpreter."""
    kind = torch.device(device).type
    if kind not in ("cuda", "cpu"):
        return f"no kernels for {kind}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "the kernels are for GPUs, but for Triton's interpreter (TRITON_INTERPRET=1)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        return f"torch {torch.__version__} is older than 2.8"
    return None if torch.cuda.is_available() else "torch sees no GPU"


@dataclass(frozen=True)
class Levels:
    """Decoded units of a group, on the device: `coefficients` of all matrices of the plan, in steps; `exact` int16, the same levels where float16
    may not hold them; raw tokens' values float32 [n, D]; `names` int32 [rows] as `Plan.table` has them. `flags` int32 [units]: not 0 where damaged.
    """

    plan: Plan
    coefficients: Tensor
    exact: Tensor | None
    raws: list[tuple[RawTokens, Tensor]]
    names: Tensor
    flags: Tensor


class TransformOnDevice:
    """One calibration on one device, for values of `dtype`. Threads may share it. Launches go to the current stream; nothing but `load` waits."""

    def __init__(self, calibration: Calibration, device: torch.device | str, dtype: str, *, lanes: int = LANES):
        self.calibration, self.device, self.dtype, self.lanes = calibration, torch.device(device), dtype, lanes
        if (reason := unusable(self.device)) is not None:
            raise ResourceError(f"cannot decode on {self.device}: {reason}", remedy="pip install 'kvstore-compiler[gpu]', or decode on the CPU")
        record, built = calibration.record, tables.build(calibration.weights, calibration.thirds)
        self.ladders = [Ladder(classes.astype(np.int64), record.tiers, record.least, record.step) for classes in calibration.classes]
        self.matrix = torch.float32 if dtype == "float32" else torch.float16
        self.symbols, self.thirds = (torch.from_numpy(t.view(np.int32).copy()).to(self.device) for t in (built.decode, built.thirds))
        self._groups: dict[int, Group] = {}

    def group_bytes(self, group: int) -> int:
        """Bytes that `load` puts on the device."""
        return group_bytes(self.calibration.bases[group], self.matrix)

    def load(self, group: int) -> Group:
        """The group's matrices on the device; put there once."""
        if group not in self._groups:
            self._groups[group] = Group.of(self.calibration, group, self.device, self.matrix)
        return self._groups[group]

    def plan(self, words: U32, spans: I64, tokens: I64, group: int) -> Plan:
        """What `decode` needs to know of units whose records lie in `words` (uint32 [n]); the host's part, without torch.

        `spans` int64 [units, tiers, 2]: first word and number of words of each record, tiers base first; `tokens` int64 [units], as the manifest's
        row says. Raises IntegrityError for records that no encoder writes, InputError.
        """
        return make_plan(words, spans, tokens, self.calibration, self.ladders[group], group, self.lanes)

    def work_bytes(self, plan: Plan) -> int:
        """The most that `decode` and `fill` allocate for a plan."""
        dim = self.calibration.bases[plan.group].dim
        raw = sum(found.tokens for found in plan.raws)
        kept = plan.elements * (self.matrix.itemsize + (0 if self._shares(plan) else 2))
        wide = sum(len(matrix.wide) * (matrix.columns * 12 + dim * self.matrix.itemsize) for matrix in plan.matrices)
        return kept + wide + 4 * (raw * dim + 2 * plan.rows + len(plan.tokens)) + 8 * max(min(AT_ONCE, plan.rows * dim), WHOLE * dim)

    def decode(self, plan: Plan, words: Tensor, table: Tensor) -> Levels:
        """Launch the entropy decoder. `words` and `table` (`plan.table`), int32 on the device, are not read after what is launched here."""
        group, keep = self.load(plan.group), self._keeps(plan)
        flags = torch.zeros(len(plan.tokens), dtype=torch.int32, device=self.device)
        coefficients = torch.empty(plan.elements, dtype=self.matrix, device=self.device)
        levels = coefficients.view(torch.int16) if self._shares(plan) else torch.empty(plan.elements, dtype=torch.int16, device=self.device)
        with self._here():
            for tier in range(plan.level + 1):
                self._tier(plan, tier, group, words, table, levels, coefficients, flags)
        raws = [(found, self._raw(found, words, plan)) for found in plan.raws]
        names = table[plan.rows_at : plan.rows_at + plan.rows].clone()
        return Levels(plan, coefficients, levels if keep else None, raws, names, flags)

    def _tier(self, plan: Plan, tier: int, group: Group, words: Tensor, table: Tensor, levels: Tensor, coefficients: Tensor, flags: Tensor) -> None:
        from kvstore.device import decode_kernels

        launch, last, keep = plan.launches[tier], tier == plan.level, self._keeps(plan)
        one = 1.0 - self.calibration.record.shrink[tier]
        if launch.programs:
            decode_kernels.decode_streams[(launch.programs,)](
                words, table, group.classes, self.symbols, self.thirds, levels, coefficients, flags, launch.programs_at, launch.parts_at, CLASSES - 1,
                one, LAST=last, KEEP=keep, LANES=self.lanes, PART=PART, num_warps=max(1, self.lanes // 32),
            )  # fmt: skip
        if launch.escapes:
            decode_kernels.correct[(-(-launch.escapes // ESCAPES),)](
                table, levels, coefficients, flags, launch.escapes_at, launch.escapes, self.ladders[plan.group].limit(tier),
                LAST=last, KEEP=keep, LANES=ESCAPES,
            )  # fmt: skip

    def _keeps(self, plan: Plan) -> bool:
        return plan.keeps_levels and self.matrix == torch.float16

    def _shares(self, plan: Plan) -> bool:
        """Whether levels are turned into coefficients where they stand."""
        return self.matrix == torch.float16 and not plan.keeps_levels

    def _raw(self, found: RawTokens, words: Tensor, plan: Plan) -> Tensor:
        """float32 [tokens, D]."""
        kind: torch.dtype = getattr(torch, found.dtype)
        layers, channels = len(self.calibration.group_layers(plan.group)), self.calibration.bases[plan.group].dim
        count = found.tokens * channels
        bits = words[found.at : found.at + -(-count * kind.itemsize // 4)].view(kind)[:count]
        return bits.view(2 * layers, found.tokens, -1).transpose(0, 1).reshape(found.tokens, -1).float()

    def fill(self, levels: Levels, target: Target, caches: Sequence[KV], ropes: Sequence[RopeRecord | None], angles: Sequence[Angles | None]) -> None:
        """Synthesis of all tokens into the rows of `caches` that `target` says, keys turned.

        `caches`: of each layer of the group keys and values [1, kv_heads, T, head_dim] in the model's dtype, with contiguous channels; `ropes` and
        `angles` (of positions 0, 1, ... in the type of the products, on the device) of each layer, None where keys are not turned. Raises InputError
        for targets outside them. What is written is worth nothing until `flags` are known to be 0.
        """
        place = Place(target, levels.plan.tokens, caches, ropes, angles, self.device)
        with self._here():
            for row, sums, factor, mean in self._sums(levels):
                place_rows(sums, mean, factor, levels.names[row : row + len(sums)], place)

    def values(self, levels: Levels, dtype: torch.dtype = torch.float32) -> Tensor:
        """[layers, 2, tokens, channels] of all units end to end, keys not turned."""
        tokens, dim = levels.plan.tokens, self.calibration.bases[levels.plan.group].dim
        total = int(tokens.sum())
        starts = torch.from_numpy(np.cumsum(tokens) - tokens).to(self.device)
        out = torch.empty((total + 1, dim), dtype=dtype, device=self.device)  # rows without a token go to the last one
        for row, sums, factor, mean in self._sums(levels):
            names = levels.names[row : row + len(sums)].long()
            at = torch.where(names < 0, total, starts[(names >> TOKEN_BITS).clamp(min=0)] + (names & ((1 << TOKEN_BITS) - 1)))
            out[at] = (sums * factor + mean).to(dtype)
        layers = len(self.calibration.group_layers(levels.plan.group))
        return out[:total].view(total, layers, 2, -1).permute(1, 2, 0, 3)

    def _sums(self, levels: Levels) -> Any:
        """One stretch of rows after the other: the first, sums float32 [rows, D], what they are to be multiplied by, and the mean to add."""
        group, plan = self.load(levels.plan.group), levels.plan
        once = max(WHOLE, AT_ONCE // len(group.mean) // WHOLE * WHOLE)
        for matrix in plan.matrices:
            factor = float(self.ladders[plan.group].step_of(plan.level, matrix.step_class)) * group.unit
            for first in range(0, matrix.columns, once):
                columns = slice(first, min(first + once, matrix.columns))
                yield matrix.row + first, self._products(levels, matrix, columns, group), factor, group.mean
        for found, values in levels.raws:
            yield found.row, values, 1.0, torch.full_like(group.mean, -0.0)  # the only number whose addition leaves every other as it is

    def _products(self, levels: Levels, matrix: Matrix, columns: slice, group: Group) -> Tensor:
        """Sums of synthesis rows, float32 [columns, D]."""
        end = matrix.at + matrix.coefficients * matrix.columns
        found = levels.coefficients[matrix.at : end].view(matrix.coefficients, matrix.columns)[:, columns]
        sums = product(found, group.rows[: matrix.coefficients])
        if len(matrix.wide) and levels.exact is not None:
            which = torch.from_numpy(matrix.wide).to(self.device)
            exact = levels.exact[matrix.at : end].view(matrix.coefficients, matrix.columns)[:, columns][which].float()
            sums += product((exact - exact.half().float()).half(), group.rows[which])
        return sums

    def check(self, flags: Tensor, names: Sequence[str] | None = None) -> None:
        """Raises IntegrityError where one of `flags` (`Levels.flags`, on the host) says that a unit is damaged."""
        bad = np.flatnonzero(flags.numpy())
        if len(bad):
            raise damaged(f"a stream does not decode, or a level is out of range ({', '.join(names[i] if names else f'unit {i}' for i in bad[:4])})")

    def _here(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def decode_group(
    units: Sequence[Sequence[Record]], calibration: Calibration, group: int, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[layers, 2, tokens, channels] of the blocks `units`, each its records base first, end to end. Waits for the device.

    Raises IntegrityError for damaged records, InputError for units with different numbers of tiers.
    """
    if len({len(records) for records in units}) != 1:
        raise InputError("units with different numbers of tiers, or none")
    found = [words_of(record) for records in units for record in records]
    sizes = np.array([len(words) for words in found])
    spans = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).reshape(len(units), -1, 2)
    tokens = np.array([read_header(records[0]).tokens for records in units])
    on, words = TransformOnDevice(calibration, device, str(dtype).removeprefix("torch.")), np.concatenate(found)
    plan = on.plan(words, spans, tokens, group)
    levels = on.decode(plan, *(torch.from_numpy(array.view(np.int32)).to(on.device) for array in (words, plan.table)))
    out = on.values(levels, dtype)
    on.check(levels.flags.cpu())
    return out
