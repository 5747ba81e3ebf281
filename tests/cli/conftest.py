"""Command lines run in this process, over small stores that are built once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_run import run_main

from kvstore import bundled

NAMES = ("hidden-garden.md", "silver-tower.md", "stone-bridge.md")


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Threads that wait for each other lose on a busy machine, and bits are compared: all of it runs on one."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents of the bundled corpus. Read only."""
    folder = tmp_path_factory.mktemp("sample") / "corpus"
    folder.mkdir()
    for name in NAMES:
        shutil.copy(bundled.corpus_path() / "places" / name, folder)
    return folder


@pytest.fixture(scope="session")
def built(sample: Path) -> Path:
    """A store of `sample` in both regimes with all tiers. Read only: `store` is a copy to change."""
    path = sample.parent / "kv.zarr"
    with one_thread():  # fixtures of a session come before those of a module
        ran = run_main("build", sample, "--store", path, "--regime", "both", "--lossless", "--codec", "scalar", "--model", "bundled")
    assert ran.status == 0, ran.err
    return path


@pytest.fixture
def corpus(sample: Path, tmp_path: Path) -> Path:
    """A copy of `sample` to change."""
    return Path(shutil.copytree(sample, tmp_path / "corpus"))


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` to change. Its rows still have the root of `sample`."""
    return Path(shutil.copytree(built, tmp_path / "kv.zarr"))
