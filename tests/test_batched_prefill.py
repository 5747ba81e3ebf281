"""Several sequences in one pass, what is padded between them, encoding on the values' device, and builds that do all this."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)

import kvstore
from kvstore.codecs.masked import to_bits
from kvstore.codecs.transform_levels import centred, encode, limits_of
from kvstore.codecs.transform_sets import RAW
from kvstore.compiling import AHEAD, BatchLine, batches
from kvstore.device.levels import Analysis, blocks, quantise
from kvstore.encode import Encoder, bits_of, stack_of
from kvstore.errors import IncompatibleError, InputError
from kvstore.families.batch import Folded, batchable, prefill_rows
from kvstore.families.capture import Collector, prefill
from kvstore.identity import Context
from kvstore.manifest import Row
from kvstore.models import ModelSource
from kvstore.pack import Pack
from kvstore.parts import policy_params
from kvstore.plan import Planned, Task
from kvstore.policies import Assignment, parse
from kvstore.prefill import Prefiller
from tests.device_store import CALIBRATION, LAYERS, LAYOUT, encoding_of
from tests.synthetic import replace
from tests.synthetic_calibration import make_values

ROWS = [list(range(10, 50)), list(range(60, 77)), list(range(20, 59)), [7]]
BEFORE = list(range(80, 85))
NAMES = ("llama", "llama-yarn", "qwen3", "phi3", "phi", "gpt_neox", "glm4", "smollm3", "olmo2", "mistral-window", "gemma3", "gpt_oss")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_its_rows_alone_and_padding_stays_out(name: str) -> None:
    model, layout = tiny.measured(name)
    past = prefill(model, layout, BEFORE)[1]
    for context in ({}, {"before": BEFORE}, {"past": past}):
        found, other = (prefill_rows(model, layout, ROWS, pad=pad, **context) for pad in (0, 5))  # type: ignore[arg-type]
        for row, mine, theirs in zip(ROWS, found, other, strict=True):
            alone = prefill(model, layout, row, past if context else None)[0]
            for (k, v), (ok, ov), (k1, v1) in zip(mine, theirs, alone, strict=True):
                assert torch.equal(k, ok) and torch.equal(v, ov)
                assert k.shape == k1.shape and torch.allclose(k, k1, atol=2e-5, rtol=1e-4) and torch.allclose(v, v1, atol=2e-5, rtol=1e-4)
    assert past.get_seq_length() == len(BEFORE)


def test_a_batch_of_one_has_the_bits_of_a_prefill() -> None:
    model, layout = tiny.measured("llama", torch.bfloat16)
    for mine, alone in zip(prefill_rows(model, layout, [ROWS[0]])[0], prefill(model, layout, ROWS[0])[0], strict=True):
        assert torch.equal(mine[0], alone[0]) and torch.equal(mine[1], alone[1])


def test_keys_are_looked_up_in_two_layers_and_again_where_they_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = tiny.measured("llama")
    looked: list[int] = []
    find = Collector._find

    def counting(self: Collector, layer: int, *rest: Any) -> Any:
        looked.append(layer)
        return find(self, layer, *rest)

    monkeypatch.setattr(Collector, "_find", counting)
    expected = prefill_rows(model, layout, ROWS)
    assert looked == [0, 1]
    take = Folded.take

    def confused(self: Folded, layer: int, keys: Any, values: Any, seen: list[Any]) -> None:
        mixed = [torch.zeros_like(keys), *seen] if layer == 0 else [*seen, *([torch.zeros_like(keys)] if layer == 2 else [])]
        take(self, layer, keys, values, mixed)  # a third layer that hands over another tensor last

    monkeypatch.setattr(Folded, "take", confused)
    looked.clear()
    found = prefill_rows(model, layout, ROWS)
    assert looked == [0, 1, 0, 1, 2]
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for p, q in zip(x, y, strict=True) for a, b in zip(p, q, strict=True))


def test_what_cannot_be_batched_goes_one_by_one() -> None:
    assert not batchable(replace(LAYOUT, latent=(24, 8))) and not batchable(replace(LAYOUT, rope_regime="short"))  # type: ignore[arg-type]
    model, layout = tiny.measured("deepseek_v2")
    assert not batchable(layout)
    runner = Prefiller(model, layout)
    chain = (tuple(BEFORE),)
    for mine, row in zip(runner.run_rows(ROWS, chain), ROWS, strict=True):
        assert all(torch.equal(a, b) for p, q in zip(mine, runner.run(row, chain), strict=True) for a, b in zip(p, q, strict=True))


def test_short_chains_are_computed_again_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layout = tiny.measured("llama")
    runner, rows = Prefiller(model, layout), [list(range(30, 110)), list(range(40, 60))]
    for chain in (((1,), (2, 3)), (tuple(BEFORE), (9,))):
        for mine, row in zip(runner.run_rows(rows, chain), rows, strict=True):
            for (k, v), (k1, v1) in zip(mine, runner.run(row, chain), strict=True):
                assert torch.allclose(k, k1, atol=2e-5, rtol=1e-4) and torch.allclose(v, v1, atol=2e-5, rtol=1e-4)
    monkeypatch.setattr(Prefiller, "context", lambda self, chain: pytest.fail("a cache was asked for"))
    runner.run_rows(rows, ((1,), (2, 3)))


def test_empty_rows_and_foreign_ids_are_refused() -> None:
    model, layout = tiny.measured("llama")
    with pytest.raises(InputError, match="no token ids"):
        prefill_rows(model, layout, [[1], []])
    with pytest.raises(InputError, match="beyond the model's 160"):
        Prefiller(model, layout).run_rows([[1], [160]], ())
    with pytest.raises(IncompatibleError, match="none of"):
        prefill_rows(model, tiny.measured("llama-linear")[1], ROWS)


def far(values: np.ndarray) -> np.ndarray:
    """One token far from all others in the first direction of the transform, one where it cannot hold it."""
    changed = values.copy()
    for layer, basis in enumerate(CALIBRATION.bases):
        changed[layer, :, 5] += 4 * CALIBRATION.record.energy[layer] ** 0.5 * basis.synthesis(1)[0].reshape(2, -1)
    changed[:, :, 17] *= 1e5
    return changed


@pytest.mark.parametrize("steps", [None, np.resize(np.array([0, -1, 2], np.int8), 21)])
def test_levels_on_a_device_are_the_cpus(steps: Any) -> None:
    codec = Encoder(encoding_of(CALIBRATION), LAYOUT).codecs["transform"]
    values, changed = far(make_values(21, LAYERS, 2, 8, 1)), 0
    for group, basis in enumerate(CALIBRATION.bases):
        ladder, mine = codec.ladders[group], values[group : group + 1]  # type: ignore[attr-defined]
        limits = limits_of(basis, ladder, CALIBRATION.record.exempt, CALIBRATION.record.energy[group])
        codes, sets = encode(*centred(mine, basis), np.zeros(21, np.int8) if steps is None else steps, basis, ladder, limits)
        found, theirs = quantise(torch.from_numpy(mine), steps, Analysis.of(basis, torch.device("cpu")), ladder, limits)
        assert (found == codes).all() and (codes == RAW).any() and (codes < 0).any()
        for one, other in zip(sets, theirs, strict=True):
            assert one.step_class == other.step_class and (one.tokens == other.tokens).all() and one.levels.shape == other.levels.shape
            difference = np.abs(one.levels.astype(int) - other.levels)
            assert difference.max() <= 1  # ties
            changed += int(difference.sum())
        parts = blocks(found, theirs, 8)
        for number, (some, own) in enumerate(parts):
            assert (some == codes[8 * number : 8 * number + 8]).all()
            assert all((some[s.tokens] == s.step_class).all() and s.levels.flags.c_contiguous for s in own)
    assert changed <= 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_units_encoded_on_a_device_decode_alike(dtype: str) -> None:
    layout: Any = replace(LAYOUT, dtype=dtype)
    encoder, values = Encoder(encoding_of(CALIBRATION), layout), far(make_values(21, LAYERS, 2, 8, 1, draw=3))
    wide = torch.from_numpy(values).to(getattr(torch, dtype))
    assert_alike(encoder, encoder.encode_on_device(wide), encoder.encode(to_bits(wide.float().numpy(), dtype)))


def assert_alike(encoder: Encoder, found: Any, expected: Any) -> None:
    """Every unit of the finest tier decodes to nearly the same."""
    assert found.keys() == expected.keys()
    names, codec = list(expected), encoder.codecs["transform"]
    for group in range(len(expected[names[0]])):
        for block, first in enumerate(expected[names[0]][group]):
            outs = [np.empty((1, 2, codec.peek_tokens(first), 16), np.float32) for _ in range(2)]
            for units, out in zip((found, expected), outs, strict=True):
                codec.decode([units[name][group][block] for name in names[:3]], out)
            assert np.abs(outs[0] - outs[1]).max() < 1.0 and np.mean(outs[0] != outs[1]) < 0.3


def test_what_a_device_cannot_do_is_left_to_the_cpu() -> None:
    """A policy that drops, and values that no lossy codec holds, which the codec itself names."""
    encoding = encoding_of(CALIBRATION)
    plain = Encoder(encoding, LAYOUT)
    values = torch.from_numpy(make_values(9, LAYERS, 2, 8, 1)).bfloat16()
    broken = values.clone()
    broken[2, 1, 4, 3] = float("nan")
    with pytest.raises(InputError, match="V of layer 0 in the unit, token 4, channel 3 is nan"):
        plain.encode_on_device(broken)
    params = policy_params(parse("sink+recent:rest=drop"), "transform")
    dropping = Encoder(replace(encoding, codecs=(replace(encoding.codecs[0], params=params),)), LAYOUT)  # type: ignore[arg-type]
    classes = np.zeros((1, 1, 9), np.int8)
    assigned = Assignment(classes)
    assert dropping.encode_on_device(values, assigned) == dropping.encode(to_bits(values.float().numpy(), "bfloat16"), assigned)
    pair = [(v[0].view(9, 2, 8).transpose(0, 1), v[1].view(9, 2, 8).transpose(0, 1)) for v in values]
    assert torch.equal(stack_of(pair), values) and plain.encode_values(pair) == plain.encode(bits_of(pair))


def task(number: int, tokens: int, chain: tuple[tuple[int, ...], ...] = ((1,),)) -> Task:
    return Task(f"{number:064x}", Context.anchor((1,)), chain, tuple(range(10, 10 + tokens)))


def test_batches_are_of_one_chain_and_like_lengths() -> None:
    tasks = [task(0, 30), task(1, 3), task(2, 29), task(3, 4, ((1,), (2, 3))), task(4, 200), task(5, 2)]
    made = [[t.key[-1] for t in batch] for batch in batches(tasks, 64)]
    assert made == [["4"], ["2", "0"], ["5", "1"], ["3"]]


class Halting:
    """An encoder that waits for leave, and a compiler around it."""

    def __init__(self) -> None:
        self.go, self.running, self.prefilled, self.most = threading.Event(), 0, 0, 0
        self.compiler: Any = self
        self.prefiller, self.encoder = self, self
        self.seconds: dict[str, float] = {}

    def run_rows(self, rows: Sequence[Sequence[int]], chain: Any) -> list[Any]:
        self.prefilled += 1
        if self.prefilled > AHEAD:
            self.go.set()
        return [[(torch.zeros(1, len(r), 2), torch.zeros(1, len(r), 2))] for r in rows]

    def assign(self, ids: Any, chain: Any) -> None:
        return None

    def timed(self, part: str) -> Any:
        return torch.no_grad()

    def encode_values(self, layers: Any, assigned: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        assert self.go.wait(10)
        if layers[0][0].shape[1] == 13:
            raise InputError("thirteen")
        return layers[0][0].shape[1]


def planned(name: str, *tasks: Task) -> Planned:
    row: Any = Row(name, "0" * 64, "0" * 64, "0" * 64, "0" * 64, "whole", "0" * 64, (), "", {})
    return Planned(row, tasks, True)


def test_documents_leave_in_their_order_and_few_batches_wait() -> None:
    """Two batches wait for the encoder at most: the third prefill, which lets it go, would never come."""
    halting, left = Halting(), list[Any]()
    line = BatchLine(
        halting.compiler, lambda t, found: left.append((t.key[-1], found.units)), lambda p: left.append(p.row.source), 16, background=True
    )
    line.put(planned("a", task(1, 15), task(2, 3)))
    line.put(planned("b"))
    line.put(planned("c", task(3, 4)))
    assert left == []
    halting.go.set()
    line.put(planned("d", task(4, 60)))
    line.end()
    assert left == [("1", 15), ("2", 3), "a", "b", ("3", 4), "c", ("4", 60), "d"]
    stuck = Halting()
    line = BatchLine(stuck.compiler, lambda t, found: None, lambda p: None, 16, background=True)
    threading.Timer(0.5, stuck.go.set).start()
    line.put(planned("a", *(task(n, 14) for n in range(6))))
    assert stuck.go.is_set()
    line.close()


def test_the_cpu_encodes_between_its_batches() -> None:
    """Its cores are busy with the prefill: nothing runs beside it."""
    halting, threads = Halting(), list[threading.Thread]()
    halting.encode_values = lambda layers, assigned: threads.append(threading.current_thread())  # type: ignore[method-assign]
    line = BatchLine(halting.compiler, lambda t, found: None, lambda p: None, 16, background=False)
    line.put(planned("a", *(task(n, 14) for n in range(6))))
    line.end()
    assert threads == [threading.main_thread()] * 6


def test_an_encoders_error_reaches_the_build() -> None:
    halting = Halting()
    halting.go.set()
    line = BatchLine(halting.compiler, lambda t, found: None, lambda p: None, 64, background=True)
    line.put(planned("a", task(1, 13)))
    with pytest.raises(InputError, match="thirteen"):
        line.end()
    line.close()


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same documents built one by one and in batches."""
    folder = tmp_path_factory.mktemp("batches")
    source = ModelSource(None, dtype="float32")
    documents = [kvstore.Document(" ".join(f"Number {i} of {n}." for i in range(4 + 9 * (n % 3))), f"{n}.md") for n in range(7)]
    documents.append(kvstore.Document(documents[2].text, "same.md"))
    built = {}
    for name, tokens in (("alone", 0), ("batched", 400)):
        report = kvstore.build(documents, folder / name, source, codec="raw", certify="none", regime="both", batch_tokens=tokens)
        built[name] = (report, kvstore.open(folder / name, source.model, source.tokenizer))
    return built


def test_a_build_in_batches_stores_the_same_up_to_rounding(stores: Any) -> None:
    (report, alone), (other, batched) = stores["alone"], stores["batched"]
    assert other.segments == report.segments and other.nbytes == report.nbytes and other.documents == report.documents == 8
    assert any("in batches of up to 400 tokens" in note for note in other.notes) and not report.notes
    keys = [[pack.segment(row).key for pack in packs for row in range(len(pack.rows))] for packs in (packs_of(alone), packs_of(batched))]
    assert keys[0] == keys[1]  # in the same order
    differs = 0
    for name in alone.sources():
        (ids, mine, _), (ids1, theirs, _) = alone.read(name), batched.read(name)
        assert ids == ids1
        for pair, pair1 in zip(mine, theirs, strict=True):
            for a, b in zip(pair, pair1, strict=True):
                assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)
                differs += not torch.equal(a, b)
    assert differs  # else nothing was batched


def packs_of(store: Any) -> list[Any]:
    names = sorted(p.name for p in (store.path / "packs").iterdir() if p.is_dir())
    return [Pack(store.storage, name) for name in names]


def test_an_interrupted_batch_leaves_what_was_done(tmp_path: Path) -> None:
    """The fourth document interrupts: those whose batch was done are stored, the others are not, and the next build makes up for it."""
    source = ModelSource(None, dtype="float32")
    documents = [kvstore.Document(" ".join(f"Number {i} of {n}." for i in range(12)), f"{n}.md") for n in range(6)]

    def some(stop: int) -> Any:
        for n, document in enumerate(documents):
            if n == stop:
                raise KeyboardInterrupt
            yield document

    options: dict[str, Any] = {"codec": "raw", "certify": "none", "batch_tokens": 80}
    report = kvstore.build(some(5), tmp_path / "kv.zarr", source, **options)
    assert report.interrupted
    kept = len(kvstore.open(tmp_path / "kv.zarr"))
    assert report.documents == kept < 5
    again = kvstore.build(some(9), tmp_path / "kv.zarr", source, **options)
    assert (again.documents, again.unchanged, again.compiled) == (6, kept, 6 - kept)


def test_a_negative_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batches of -1 tokens"):
        kvstore.build(["text"], tmp_path / "kv.zarr", batch_tokens=-1)
