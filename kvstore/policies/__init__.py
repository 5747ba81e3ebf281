"""The registry of token policies. Which token gets which step; one policy a file."""

from __future__ import annotations

from importlib import import_module

from kvstore.errors import InputError
from kvstore.policies.base import DROP, Assignment, Policy, View

__all__ = ["DROP", "NAMES", "Assignment", "Policy", "View", "parse"]
REGISTRY = {
    "uniform": "kvstore.policies.uniform:Uniform",
    "sink+recent": "kvstore.policies.sink_recent:SinkRecent",
    "fastgen": "kvstore.policies.fastgen:FastGen",
    "h2o": "kvstore.policies.h2o:H2O",
    "kvzip": "kvstore.policies.kvzip:KVzip",
}
NAMES = tuple(REGISTRY)


def policy_class(name: str) -> type[Policy]:
    """Raises InputError for a policy that this version does not have."""
    if name not in REGISTRY:
        raise InputError(f"unknown policy {name!r}", remedy=f"choose one of {', '.join(NAMES)}")
    module, _, attribute = REGISTRY[name].partition(":")
    found: type[Policy] = getattr(import_module(module), attribute)
    return found


def parse(text: str) -> Policy:
    """The policy that `name`, or `name:key=value,...`, names. Raises InputError."""
    name, _, listed = text.partition(":")
    params: dict[str, int | str] = {}
    for part in filter(None, listed.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key in params:
            raise InputError(f"policy {text!r}: {part!r} is no key=value, or names a key twice", remedy=f"write {name}:key=value,key=value")
        params[key] = int(value) if value.removeprefix("-").isdecimal() and value.isascii() else value
    return policy_class(name)(params)
