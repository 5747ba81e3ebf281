"""The peers of benchmarks/rate_quality.py: their arithmetic against the definition, plans against brute force, bytes against counting."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPE = (3, 2, 300, 64)  # layers, kinds, tokens, channels


@pytest.fixture(scope="module")
def peers() -> Iterator[Any]:
    """The modules under test; `benchmarks/` is a folder of scripts, not installed."""
    if not BENCHMARKS.is_dir():
        pytest.skip("no benchmarks beside the tests")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import rate_bars
        import rate_rows
        from peers import base, cachegen, floats, huggingface, integers, kvtc, pca

        yield SimpleNamespace(
            base=base,
            cachegen=cachegen,
            floats=floats,
            huggingface=huggingface,
            integers=integers,
            kvtc=kvtc,
            pca=pca,
            rows=rate_rows,
            bars=rate_bars,
        )
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def kv() -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    scale = np.exp(0.6 * rng.standard_normal((3, 2, 1, 64)))
    mixed = rng.standard_normal((3, 2, 300, 64)) @ (np.eye(64) + 0.3 * rng.standard_normal((64, 64)))
    return (scale * (mixed + 1)).astype(np.float32)


def geometry(peers: Any) -> Any:
    return peers.base.Geometry(3, 2, 32)


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_every_method_counts_its_bytes_and_keeps_most_of_the_values(peers: Any, kv: Any) -> None:
    g = geometry(peers)
    expected = {  # bits a value and how far off the values may be
        peers.floats.Bfloat16(): (16, 0.003),
        peers.integers.Int8(g): (8 + 16 / 32, 0.01),
        peers.integers.Kivi(4): (5 + 0.04, 0.1),  # the last group of tokens is shorter
        peers.integers.Kivi(2): (3 + 0.04, 0.45),
        peers.huggingface.QuantizedCache(g, 4): (4.5, 0.12),
    }
    for method, (bits, off) in expected.items():
        (version,) = method.code(kv, range(300))
        assert version.values.shape == SHAPE and version.values.dtype == np.float32
        assert relative(version.values, kv) < off, method.name
        assert 8 * version.nbytes["all"] / kv.size == pytest.approx(bits, abs=0.03), method.name
    for version in peers.floats.Float8().code(kv, range(300)):
        assert relative(version.values, kv) < 0.03 and version.nbytes["all"] < 1.1 * kv.size


def test_float8_rounds_to_the_nearest_of_its_numbers(peers: Any) -> None:
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(1).standard_normal(4000).astype(np.float32) * np.exp(np.linspace(-9, 6, 4000)).astype(np.float32)
    x = np.clip(x, -448, 448)
    numbers = torch.from_numpy(x).to(torch.float8_e4m3fn)
    assert np.array_equal(peers.base.rounded_to_e4m3(x), numbers.float().numpy())
    codes = peers.kvtc._e4m3_codes(peers.base.rounded_to_e4m3(x))
    assert np.array_equal(codes, numbers.view(torch.uint8).numpy())


def test_bfloat16_rounds_as_torch_does(peers: Any, kv: Any) -> None:
    torch = pytest.importorskip("torch")
    assert np.array_equal(peers.base.rounded_to_bfloat16(kv), torch.from_numpy(kv).bfloat16().float().numpy())


def test_kivi_keeps_what_its_residual_says(peers: Any, kv: Any) -> None:
    (version,) = peers.integers.Kivi(2, residual=True).code(kv, range(300))
    plain = peers.base.rounded_to_bfloat16(kv)
    assert np.array_equal(version.values[:, 0, 256:], plain[:, 0, 256:]) and not np.array_equal(version.values[:, 0, 255], plain[:, 0, 255])
    assert np.array_equal(version.values[:, 1, 172:], plain[:, 1, 172:]) and not np.array_equal(version.values[:, 1, 171], plain[:, 1, 171])


def test_kivi_groups_keys_along_tokens_and_values_along_channels(peers: Any) -> None:
    """A value far out spoils its own group, nothing else."""
    kv = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
    spiked = kv.copy()
    spiked[1, :, 40, 5] = 100.0
    clean, other = (peers.integers.Kivi(4).code(x, range(300))[0].values for x in (kv, spiked))
    layers, tokens, channels = np.nonzero(clean[:, 0] != other[:, 0])
    assert set(layers) == {1} and set(channels) == {5} and set(tokens) <= set(range(32, 64)) and len(tokens) > 16
    layers, tokens, channels = np.nonzero(clean[:, 1] != other[:, 1])
    assert set(layers) == {1} and set(tokens) == {40} and set(channels) <= set(range(32)) and len(channels) > 16


def test_cachegen_counts_what_real_streams_take(peers: Any, kv: Any) -> None:
    """kvstore's codec `cachegen` has LMCache's coder; the benchmark's ideal lengths must agree with it."""
    from kvstore.codecs.cachegen import simulate

    g = geometry(peers)
    (ideal,) = peers.cachegen.CacheGen(g).code(kv, range(300))
    (real,) = peers.cachegen.CacheGen(g, streams=True).code(kv, range(300))
    for way in ("chunk 256", "chunk 2048"):
        assert ideal.nbytes[way] == pytest.approx(real.nbytes[way], rel=0.003)
    exact = peers.base.rounded_to_bfloat16(kv)
    back = simulate(np.ascontiguousarray(exact.swapaxes(0, 1)), "lmcache", 256, dtype="bfloat16").values.swapaxes(0, 1)
    assert np.array_equal(peers.base.rounded_to_bfloat16(peers.cachegen.CacheGen(g).code(exact, range(300))[0].values), back)
    assert ideal.nbytes["chunk 256"] > ideal.nbytes["chunk 2048"] > ideal.nbytes["own entropy"]


def test_cachegen_tables_of_calibration_are_free_but_not_better_than_its_own(peers: Any, kv: Any) -> None:
    g = geometry(peers)
    bare = peers.cachegen.CacheGen(g)
    learnt = peers.cachegen.histogram(peers.cachegen.symbols_of(kv[:, :, :150], bare.largest)[0], bare.bins)
    (version,) = peers.cachegen.CacheGen(g, learnt=learnt).code(kv, range(300))
    assert version.nbytes["own entropy"] < version.nbytes["tables free"] < version.nbytes["chunk 2048"]


def test_components_reconstruct_exactly(peers: Any, kv: Any) -> None:
    for together in (False, True):
        components = peers.pca.fit([kv], together, skip=0)
        back = components.synthesise(components.analyse(kv), kv.shape)
        assert np.abs(back - kv).max() < 1e-3


def test_pca_with_a_finer_step_is_closer_and_larger(peers: Any, kv: Any) -> None:
    components = peers.pca.fit([kv], False, skip=0)
    coarse, fine = (peers.pca.Pca(components, step).code(kv, range(300))[0] for step in (1.0, 0.25))
    assert relative(fine.values, kv) < relative(coarse.values, kv) / 2
    assert fine.nbytes["all"] > coarse.nbytes["all"]
    entropy = 0.0  # of the levels themselves, coefficient by coefficient: what no static code beats by much
    for c in components.analyse(kv):
        for column in np.rint(c / 0.25).T:
            p = np.unique(column, return_counts=True)[1] / len(column)
            entropy -= 300 * (p * np.log2(p)).sum() / 8
    assert fine.nbytes["all"] > 0.9 * entropy


def test_kvtc_plan_is_the_best_of_all(peers: Any) -> None:
    """Against every way of cutting six components into blocks and giving them widths."""
    sizes, widths, r = (1, 2, 4), (0, 2, 4), 6
    c = (np.random.default_rng(3).standard_normal((20, r)) * np.linspace(3, 1, r)).astype(np.float32)
    errors = peers.kvtc.block_errors(c, np.array(sizes), np.array(widths))
    seen = set()
    for budget in (0, 40, 80, 110, 150):
        blocks = peers.kvtc.plan(errors, budget, sizes, widths)
        assert sum(32 + bits * (stop - first) for first, stop, bits in blocks) <= budget
        left_out = set(range(r)).difference(*(range(first, stop) for first, stop, _ in blocks))
        found = sum(errors[i, 0, 0] for i in left_out)
        for first, stop, bits in blocks:
            size = next(s for s, n in enumerate(sizes) if min(first + n, r) == stop)
            found += errors[first, size, widths.index(bits)]
        assert found == pytest.approx(min(_every_error(errors, budget, sizes, widths)))
        seen.add(blocks)
    assert len(seen) > 3  # the budgets did ask for different plans


def _every_error(errors: Any, budget: int, sizes: Any, widths: Any, at: int = 0) -> Iterator[float]:
    if at == len(errors):
        yield 0.0
        return
    for (s, size), (w, bits) in itertools.product(enumerate(sizes), enumerate(widths)):
        stop = min(at + size, len(errors))
        cost = 32 + bits * (stop - at) if bits else 0
        if cost <= budget:
            yield from (errors[at, s, w] + rest for rest in _every_error(errors, budget - cost, sizes, widths, stop))


def test_kvtc_errors_are_those_of_its_blocks(peers: Any) -> None:
    c = (np.random.default_rng(4).standard_normal((20, 24)) * np.linspace(3, 0.3, 24)).astype(np.float32)
    errors = peers.kvtc.block_errors(c, np.array([1, 16]), np.array([0, 2, 4, 8]))
    for first, stop, bits, w in ((0, 16, 2, 1), (4, 20, 4, 2), (16, 24, 8, 3)):
        back, _ = peers.kvtc.apply(((first, stop, bits),), c)
        found = float(((c - back)[:, first:stop] ** 2).sum())
        assert errors[first, 1, w] == pytest.approx(found, rel=0.05)
    assert errors[2, 1, 0] == pytest.approx(float((c[:, 2:18] ** 2).sum()))


def test_kvtc_keeps_to_its_budget_and_deflate_gains_about_a_fifth(peers: Any) -> None:
    """A long decaying spectrum, as wide models have: there the tails of blocks are compressible (1.23 in the paper)."""
    rng = np.random.default_rng(5)
    r, tokens = 1024, 500
    samples = tuple((rng.standard_normal((tokens, r)) * 10 * np.arange(1, r + 1) ** -0.6).astype(np.float32) for _ in range(2))
    components = peers.pca.Components((np.zeros(r, np.float32),) * 2, (np.eye(r, dtype=np.float32),) * 2, samples, False)
    coded = peers.kvtc.Kvtc.at(peers.kvtc.train(components, tokens=16), 16)
    kv = np.stack(samples)[None]
    version = coded.code(kv, range(tokens))[2]
    assert version.nbytes["packed"] <= kv.size * 2 / 16
    assert 1.05 < version.nbytes["packed"] / version.nbytes["all"] < 1.4


def test_kvtc_exempts_sinks_and_recent_tokens(peers: Any, kv: Any) -> None:
    trained = peers.kvtc.train(peers.pca.fit([kv], False), tokens=40)
    published, sinks, bare = peers.kvtc.Kvtc.at(trained, 16).code(kv, range(300))
    plain = peers.base.rounded_to_bfloat16(kv)
    assert np.array_equal(published.values[:, :, 172:], plain[:, :, 172:]) and not np.array_equal(published.values[:, :, 171], plain[:, :, 171])
    assert np.array_equal(sinks.values[:, :, :4], peers.base.rounded_to_e4m3(kv[:, :, :4]))
    assert published.nbytes["all"] > sinks.nbytes["all"] > bare.nbytes["all"]


def test_equal_kl_is_interpolated_in_logarithms(peers: Any) -> None:
    points = [(1e-4, 400.0), (1e-2, 100.0)]
    assert peers.rows.bytes_at(points, 1e-3) == (pytest.approx(200.0), True)
    assert peers.rows.bytes_at(points, 1e-5)[1] is False
    assert peers.rows.bytes_at(points[:1], 1e-3) is None


def test_bars_say_what_is_met(peers: Any) -> None:
    def row(method: str, setting: str, way: str, kl: float, size: float) -> dict[str, Any]:
        return {"stage": "s", "values": 100, "method": method, "setting": setting, "way": way, "kl": kl, "bytes": size, "kl_half": 0.0}

    rows = [row("ours", t, "all", kl, b) for t, kl, b in (("draft", 1e-2, 10.0), ("standard", 1e-3, 20.0), ("fine", 1e-4, 40.0))]
    rows += [row("CacheGen", "bins x1", "chunk 256", 1e-4, 400.0), row("CacheGen", "bins x1", "chunk 2048", 1e-4, 100.0)]
    text = peers.bars.bars({"s": rows})
    assert "chunk 256 | 0.143 | 0.100 | yes" in text and "chunk 2048 | 0.2 | 0.400 | NO" in text and "KL of fine | 0.0008 | 1.00e-04 | yes" in text
