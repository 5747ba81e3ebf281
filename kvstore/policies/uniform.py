"""Every token alike: what a build does when nobody names a policy."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvstore.policies.base import Assignment, Policy, View


class Uniform(Policy):
    """Class 0 for all."""

    name: ClassVar[str] = "uniform"

    def assign(self, view: View) -> Assignment:
        return Assignment(np.zeros(len(view.ids), np.int8))
