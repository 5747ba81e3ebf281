"""kvstore: compile the KV caches of language models offline, keep them in a store, bring them back at question time.

Everything heavy is imported at first use, so that `import kvstore` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvstore.errors import (
    FormatError,
    IncompatibleError,
    InputError,
    IntegrityError,
    KvstoreError,
    NotFoundError,
    ResourceError,
    StorageError,
)

if TYPE_CHECKING:
    from kvstore.answering import stream
    from kvstore.api import OpenStore, open
    from kvstore.build_report import BuildReport
    from kvstore.builder import build
    from kvstore.calibrator import CalibrationReport, calibrate
    from kvstore.documents import Document
    from kvstore.families.masking import mask_dropped
    from kvstore.prompt import Prompt, collate

__version__ = "0.1.0"
__all__ = [
    "BuildReport",
    "CalibrationReport",
    "Document",
    "FormatError",
    "IncompatibleError",
    "InputError",
    "IntegrityError",
    "KvstoreError",
    "NotFoundError",
    "OpenStore",
    "Prompt",
    "ResourceError",
    "StorageError",
    "build",
    "calibrate",
    "collate",
    "mask_dropped",
    "open",
    "stream",
]
_HOMES = {
    "open": "api",
    "OpenStore": "api",
    "build": "builder",
    "BuildReport": "build_report",
    "calibrate": "calibrator",
    "CalibrationReport": "calibrator",
    "Prompt": "prompt",
    "mask_dropped": "families.masking",
    "collate": "prompt",
    "Document": "documents",
    "stream": "answering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvstore.{_HOMES[name]}"), name)
