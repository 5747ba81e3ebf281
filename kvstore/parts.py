"""What a token policy assigned to a segment, cut into units and handed to codecs; and which codecs can take which policy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.codecs import codec_class
from kvstore.codecs.base import Array, Codec
from kvstore.codecs.masked import Mask, MaskedCodec
from kvstore.errors import IncompatibleError
from kvstore.manifest import Layout
from kvstore.policies import DROP, Assignment, Policy
from kvstore.policies.base import MOST_CLASS, Classes

Steps = npt.NDArray[np.int8]


class Part(NamedTuple):
    """One unit's share: step classes int8 [tokens], and what is dropped; None where all tokens are alike."""

    steps: Steps | None
    mask: Mask | None


class Parts:
    """An assignment, ready to be cut. Raises IncompatibleError where heads of a token have different steps: no codec keeps heads apart."""

    def __init__(self, assigned: Assignment | None, layout: Layout):
        self.steps: Steps | None = None
        self.mask: Mask | None = None
        if assigned is None:
            return
        dropped = assigned.dropped(layout.layers, layout.kv_heads)
        self.steps = steps_of(assigned.classes)
        profile = assigned.profile if assigned.profile is not None else np.zeros(dropped.shape[:2], np.uint8)
        self.mask = Mask(dropped, profile)

    def cell(self, layer: int, layers: int, token: int, tokens: int) -> Part:
        """The unit of `layers` from `layer` and `tokens` from `token`; the last ones may be short."""
        down, along = slice(layer, layer + layers), slice(token, token + tokens)
        mask = None if self.mask is None else Mask(self.mask.dropped[down, :, along], self.mask.profile[down])
        return Part(None if self.steps is None else np.ascontiguousarray(self.steps[along]), mask)


def steps_of(classes: Classes) -> Steps | None:
    """int8 [tokens]: the class that a token's heads share, the coarsest where all of them drop it. None where all classes are 0."""
    heads = classes.reshape(-1, classes.shape[-1])
    coarsest, finest = np.where(heads == DROP, -MOST_CLASS, heads).max(axis=0), np.where(heads == DROP, MOST_CLASS, heads).min(axis=0)
    if (coarsest > finest).any():
        raise IncompatibleError("a token has one step for all its heads, the policy gives them different ones", remedy="use it with rest=drop")
    found = finest.astype(np.int8)
    return found if (found[(heads != DROP).any(axis=0)] != 0).any() else None


def encode_part(codec: Codec, values: Array, dtype: str, group: int, part: Part) -> list[bytes]:
    """`Codec.encode` with what the codec's policy, if it has one, makes of the tokens."""
    options = {"steps": part.steps} if codec.takes_steps and "policy" in codec.params and part.steps is not None else {}
    if isinstance(codec, MaskedCodec) and part.mask is not None:
        return codec.encode_masked(values, dtype, group, part.mask, **options)
    return codec.encode(values, dtype, group, **options)


def policy_params(policy: Policy | None, codec: str) -> dict[str, int | str]:
    """What a policy adds to the parameters of the codec of that name. Raises IncompatibleError where the codec cannot do it."""
    if policy is None or policy.name == "uniform":
        return {}
    kind = codec_class(codec)
    if kind.exact:
        raise IncompatibleError(f"codec {codec} stores every bit, policy {policy.name} would not", remedy="use --codec transform")
    if policy.per_head and not policy.drops:
        raise IncompatibleError(
            f"codec {codec} codes all heads of a token with one step, policy {policy.name} gives each head its own",
            remedy=f"use {policy.name}:rest=drop, or h2o or kvzip, whose classes are those of whole tokens",
        )
    keeps = policy.params.get("keep", 0) == 0
    if not kind.takes_steps and not (policy.drops and keeps):
        raise IncompatibleError(f"codec {codec} has one step for all tokens, policy {policy.spec} has several",
                                remedy="use --codec transform, or the policy with rest=drop")  # fmt: skip
    return {"policy": policy.spec}
