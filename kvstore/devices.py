"""What torch can use here, and how much of it is free."""

from __future__ import annotations

import torch

from kvstore.errors import InputError


def known_device(name: torch.device | str) -> torch.device:
    """Raises InputError for a device that torch does not have here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"no device {str(name)!r} here: {str(error).splitlines()[0]}", remedy="use cpu, or a torch build for it") from error
    return device


def usual_device(name: str | None) -> torch.device:
    """The device of that name, else the first GPU, else the CPU. Raises InputError."""
    return known_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, None where nobody can say. What torch keeps for itself but does not use counts as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
