"""Placing decoded values: the compiled pass gives the bits of the torch path; parts of segments; forks."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch

import kvstore
from kvstore import decode
from kvstore.decode import Decoder, Piece, allocate
from kvstore.errors import InputError, ResourceError
from kvstore.families.rope import cos_sin, rotate
from kvstore.manifest import RopeRecord
from kvstore.placing import place, widen

HEADS, TOKENS, WIDTH = 3, 37, 16


def record(layout: Any, arithmetic: Any, start: int, dim: int) -> RopeRecord:
    inv_freq = (1.0 / 10000 ** (np.arange(0, dim, 2) / dim)).astype("<f4")
    return RopeRecord(start, dim, layout, inv_freq.tobytes().hex(), 1.25, arithmetic, "default")


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("arithmetic", ["model", "float32", "rounded"])
@pytest.mark.parametrize(("start", "dim"), [(0, 16), (0, 8), (6, 10)])
def test_the_compiled_pass_gives_the_bits_of_the_torch_path(layout: str, arithmetic: str, start: int, dim: int) -> None:
    rope, positions = record(layout, arithmetic, start, dim), torch.arange(500, 500 + TOKENS)
    values = torch.randn(TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(1)) * 4
    keys = values.to(torch.bfloat16).view(TOKENS, HEADS, WIDTH).transpose(0, 1)
    angles = cos_sin(positions, rope, torch.bfloat16, "cpu")
    out = np.zeros((HEADS, TOKENS, WIDTH), np.uint16)
    place(values.numpy(), angles.cos.float().numpy(), angles.sin.float().numpy(), start, layout == "interleaved", arithmetic != "model", out)
    assert torch.equal(torch.from_numpy(out.view(np.int16)).view(torch.bfloat16), rotate(keys, positions, rope))


def test_values_pass_bit_for_bit_even_infinities_and_nans() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(4096, 16)
    none, out = np.empty((4096, 0), np.float32), np.zeros((1, 4096, 16), np.uint16)
    place(widen(bits, np.empty(bits.shape, np.uint32)), none, none, 0, False, False, out)
    assert np.array_equal(out[0], bits)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, bundled_model: Any, bundled_tokenizer: Any) -> kvstore.OpenStore:
    path = tmp_path_factory.mktemp("decode") / "kv.zarr"
    text = " ".join(f"The number of the old library is {n}." for n in range(120))
    kvstore.build([kvstore.Document(text, "a.md")], path, bundled_model, bundled_tokenizer, codec="scalar", lossless=True)
    return kvstore.open(path, bundled_model, bundled_tokenizer)


@pytest.mark.parametrize("tier", ["standard", "fine", "lossless"])
def test_a_part_of_a_segment_equals_that_part_of_the_whole(stored: kvstore.OpenStore, tier: str) -> None:
    artifact = stored["a.md"].stored[0]
    tokens, layout = artifact.segment.tokens, artifact.pack.layout
    assert tokens > 600  # more than one block
    whole, part = allocate(layout, tokens), allocate(layout, 200)
    Decoder().decode(Piece(artifact, tier, tokens, 0, 0), whole)
    Decoder().decode(Piece(artifact, tier, 150, 30, 450, first=450), part)
    for (k, v), (pk, pv) in zip(whole, part, strict=True):
        assert torch.equal(k[:, :, 450:600], pk[:, :, 30:180]) and torch.equal(v[:, :, 450:600], pv[:, :, 30:180])


def test_memory_is_checked_before_it_is_taken(stored: kvstore.OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match="1,000,000 tokens"):
        allocate(stored["a.md"].layout, 1_000_000)
    with pytest.raises(InputError, match="bogus"):
        allocate(stored["a.md"].layout, 1, "bogus")


def test_a_forked_child_loads(stored: kvstore.OpenStore) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this platform")
    stored.read("a.md", tier="standard")  # the parent has its pool and its index
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        torch.set_num_threads(1)
        queue.put(len(stored.read("a.md", tier="standard")[0]))

    process = context.Process(target=child)
    process.start()
    found = queue.get(timeout=60)
    process.join(timeout=60)
    assert found == stored["a.md"].tokens
