"""What made an artifact: never part of its identity."""

from __future__ import annotations

import platform

from kvstore import __version__


def provenance() -> dict[str, str]:
    """Versions of what computes, and the machine."""
    import torch
    import transformers

    return {
        "kvstore": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
