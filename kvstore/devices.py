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


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, None where nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
