"""What every test shares: no network, few threads, the bundled model loaded once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# For helper modules (`tests.tiny_models`). Last in the path: the kvstore under test is the one that is installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))
# Before anything imports huggingface_hub: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before anything imports triton: where there is no GPU, its interpreter runs the kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Small models gain nothing from many threads, and workers side by side lose."""
    import torch

    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session", autouse=True)
def own_cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indexes and digests go to a fresh folder, never to the cache directory of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("KVSTORE_STORE", raising=False)
        yield folder


@pytest.fixture(scope="session")
def bundled_model() -> Any:
    """The bundled model in bf16 on the CPU, in evaluation mode. Shared: tests must not change it."""
    import torch
    from transformers import AutoModelForCausalLM

    import kvstore.bundled

    return AutoModelForCausalLM.from_pretrained(kvstore.bundled.model_path(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="session")
def bundled_tokenizer() -> Any:
    from transformers import AutoTokenizer

    import kvstore.bundled

    return AutoTokenizer.from_pretrained(kvstore.bundled.model_path())
