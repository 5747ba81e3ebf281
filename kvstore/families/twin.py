"""A second view of a model: the same weights under configs of its own.

Attention layers look their function up in their config at each call, so a pass that needs another one would otherwise change it for every thread that
generates meanwhile. What does not go through its modules' own configs (compiled or wrapped forwards) still runs the original: callers check.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def twin_of(model: nn.Module) -> nn.Module:
    """Modules that share the parameters, buffers and hooks of `model`, with copies of its configs. Takes milliseconds and no memory to speak of."""
    return _twin(model, {}, {})


def _twin(module: nn.Module, made: dict[int, nn.Module], configs: dict[int, Any]) -> nn.Module:
    """`made` keeps modules that are registered twice one; `configs`, deepcopy's memo, does so for configs and their parts."""
    if id(module) not in made:
        twin = made[id(module)] = object.__new__(type(module))
        vars(twin).update(vars(module))
        if hasattr(module, "config"):
            vars(twin)["config"] = copy.deepcopy(module.config, configs)
        vars(twin)["_modules"] = {name: None if child is None else _twin(child, made, configs) for name, child in module._modules.items()}
    return made[id(module)]
