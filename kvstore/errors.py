"""Exceptions, grouped by what the caller does next. Each has a stable `code` and, on the command line, an exit status."""

from __future__ import annotations


class KvstoreError(Exception):
    """Base of every error that kvstore raises on purpose.

    `code` is stable across versions; `remedy`, where given, says what to do and is part of the message.
    """

    code = "error"
    exit_status = 1

    def __init__(self, message: str, *, remedy: str | None = None, code: str | None = None):
        super().__init__(message if remedy is None else f"{message}; {remedy}")
        self.message, self.remedy = message, remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:  # KeyError and OSError would quote or renumber the text
        return self.message if self.remedy is None else f"{self.message}; {self.remedy}"


class InputError(KvstoreError, ValueError):
    """The caller's input is wrong: mend it and call again."""

    code, exit_status = "input", 2


class NotFoundError(KvstoreError, KeyError):
    """Nothing stored under that name: build it."""

    code, exit_status = "not-found", 3


class IncompatibleError(KvstoreError):
    """Stored for another model, template or RoPE: prefill instead. There is no override."""

    code, exit_status = "incompatible", 4


class FormatError(KvstoreError):
    """Written by a newer kvstore, or by something else."""

    code, exit_status = "format", 5


class IntegrityError(KvstoreError):
    """Stored bytes do not match their digest: rebuild the artifact."""

    code, exit_status = "integrity", 6


class StorageError(KvstoreError, OSError):
    """The disk, its permissions or its network failed."""

    code, exit_status = "storage", 7


class ResourceError(KvstoreError):
    """Not enough memory for what was asked."""

    code, exit_status = "resource", 8
