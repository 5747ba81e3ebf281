"""The learned transform: whitening and a Karhunen-Loeve transform over the layers of a group, K and V together, in nested tiers.

A calibration, learned once a model, holds the transform, the step, and the tables; see `kvstore.calibration`. Each token of a group of layers becomes
coefficients in order of importance. All are rounded to the same step, three times as wide one tier up, and coded by the table of their scale
class, shifted by eight classes a tier; those whose class rounds to zero at a tier are not coded there. A token far from what the calibration saw
(an attention sink) gets a ninth of the step, or, where the transform cannot hold it, is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from kvstore.calibration.record import Calibration
from kvstore.codecs.base import Array, Codec, Header, Record, check_bits, expect
from kvstore.codecs.scalar import largest_of, to_float32
from kvstore.codecs.transform_ladder import Ladder
from kvstore.codecs.transform_sets import RAW, STEP_CLASSES
from kvstore.errors import FormatError, InputError

if TYPE_CHECKING:
    from kvstore.codecs.transform_units import Unit

MAX_RANK = 1 << 16  # coefficients are listed as uint16


class TransformCodec(Codec):
    """See the module. As many tiers as the calibration says, three at most; tier 0 stands alone."""

    name: ClassVar[str] = "transform"
    exact: ClassVar[bool] = False
    n_tiers: ClassVar[int] = 3
    needs_calibration: ClassVar[bool] = True
    takes_steps: ClassVar[bool] = True

    def __init__(self, params: Mapping[str, int | str], calibration: Calibration | None = None):
        super().__init__(params, calibration)
        if calibration is None or any(basis.rank > MAX_RANK for basis in calibration.bases):
            raise FormatError("codec transform needs a calibration of at most 65,536 coefficients a group")
        record = calibration.record
        self.calibration, self.tiers = calibration, record.tiers
        self.ladders = [Ladder(classes.astype(np.int64), record.tiers, record.least, record.step) for classes in calibration.classes]

    def encode(self, bits: Array, dtype: str, group: int = 0, steps: npt.NDArray[np.int8] | None = None) -> list[bytes]:
        """As every codec. `steps` int8 [tokens], -3 to 3: each token's step is multiplied by 3 ** its class; 0 where missing."""
        from kvstore.codecs import transform_levels, transform_units

        header = check_bits(bits, dtype)
        chosen = self._checked(header, group, steps)
        values = to_float32(bits, dtype)
        for layer, both in enumerate(values):
            for kind, plane in enumerate(both):
                largest_of(plane, layer, kind)
        basis, ladder, record = self.calibration.bases[group], self.ladders[group], self.calibration.record
        limits = transform_levels.limits_of(basis, ladder, record.exempt, record.energy[group])
        codes, sets = transform_levels.encode(*transform_levels.centred(values, basis), chosen, basis, ladder, limits)
        return self.records(header, transform_units.Unit(group, codes, sets, bits[:, :, codes == RAW], dtype))

    def records(self, header: Header, unit: Unit) -> list[bytes]:
        """One record per tier of what is quantised already."""
        from kvstore.codecs import tables, transform_units

        built = tables.build(self.calibration.weights, self.calibration.thirds)
        return transform_units.encode(header, unit, self.ladders[unit.group], built)

    def decode(self, records: Sequence[Record], out: Array) -> None:
        from kvstore.codecs import tables, transform_decode

        expect(records, out, self.tiers)
        if out.dtype != np.float32:
            raise InputError(f"codec transform decodes to float32, not to {out.dtype}")
        built = tables.build(self.calibration.weights, self.calibration.thirds)
        transform_decode.decode(records, self.calibration, self.ladders, built, out)

    def fill(self, values: npt.NDArray[np.float32], gone: npt.NDArray[np.bool_], group: int) -> npt.NDArray[np.float32]:
        """`values` [layers, 2, tokens, channels] with what costs least in place of those `gone` (bool [layers, heads, tokens])."""
        from kvstore.codecs import transform_fill

        record, classes = self.calibration.record, self.calibration.classes[group].astype(np.float32)
        deviations = (record.step * 3 ** ((classes - 24) / 8)).astype(np.float32)
        return transform_fill.fill(values, gone, self.calibration.bases[group], deviations, record.step)

    def _checked(self, header: Header, group: int, steps: npt.NDArray[np.int8] | None) -> npt.NDArray[np.int8]:
        """The step classes. Raises InputError for what the calibration is not for."""
        groups, record = len(self.ladders), self.calibration.record
        layers = len(self.calibration.group_layers(group)) if 0 <= group < groups else 0
        if (header.layers, header.channels) != (layers, record.kv_heads * record.head_dim):
            raise InputError(f"group {group} of {header.layers} layers and {header.channels} channels; the calibration has {groups} groups of "
                             f"{record.group_layers} layers and {record.kv_heads * record.head_dim} channels")  # fmt: skip
        if steps is None:
            return np.zeros(header.tokens, np.int8)
        if steps.shape != (header.tokens,) or not np.isin(steps, STEP_CLASSES).all():
            raise InputError(f"step classes {steps.shape} for {header.tokens} tokens", remedy=f"give one of {sorted(STEP_CLASSES)} a token")
        return steps.astype(np.int8)
