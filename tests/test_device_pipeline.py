"""The way of units to a device: what waits for what, which memory is used when, and the cache that comes of it. On the CPU, by streams that check."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvstore
from kvstore.artifact import Stored
from kvstore.calibration import registry
from kvstore.decode import Decoder, Piece, allocate
from kvstore.device import pipeline as pipelines
from kvstore.device.layer import WaitingLayer, WaitingWindow, waiting_cache
from kvstore.device.path import DevicePath, together
from kvstore.device.pipeline import Pipeline, angles_of, place_of
from kvstore.device.ready import KV, Pending, Ready
from kvstore.device.staging import Courier
from kvstore.device.streams import InlineStreams
from kvstore.device.wanted import Wanted
from kvstore.errors import IntegrityError, ResourceError
from kvstore.families.assemble import dynamic_cache, share
from kvstore.families.capture import prefill
from kvstore.families.rope import cos_sin, rotate
from kvstore.models import ModelSource
from tests.device_store import LAYERS, LAYOUT, HostCodec, store_of
from tests.synthetic import replace

Clock = dict[str, int]


class Race(AssertionError):
    """Memory is used while something else may still use it."""


class Clocked(InlineStreams):
    """Streams with vector clocks: a use of a buffer must come after the conflicting ones before it, by events and waits alone.

    `deaf`: kinds of waiting that are left out, to see that they are missed. `late`: events have not occurred until the host joins them.
    """

    def __init__(self, deaf: str = "", late: bool = True):
        super().__init__()
        self.deaf, self.late = deaf, late
        self.clocks: dict[str, Clock] = {}
        self.reads: dict[Hashable, list[tuple[str, int]]] = {}
        self.written: dict[Hashable, tuple[str, int]] = {}
        self.lock = threading.RLock()
        self.waits: list[tuple[str, str]] = []

    def clock(self, actor: str) -> Clock:
        return self.clocks.setdefault(actor, {})

    @contextmanager
    def on(self, stream: str | None, *, reads: Sequence[Hashable] = (), writes: Sequence[Hashable] = ()) -> Iterator[None]:
        with self.lock:
            actor = stream or "host"
            if stream:
                self.merge(actor, self.clock("host"))  # nothing runs before it was launched
            self.clock(actor)[actor] = self.clock(actor).get(actor, 0) + 1
            now = (actor, self.clock(actor)[actor])
            for buffer in (*reads, *writes):
                self.after(actor, buffer, [self.written[buffer]] if buffer in self.written else [])
            for buffer in writes:
                self.after(actor, buffer, self.reads.pop(buffer, []))
                self.written[buffer] = now
            for buffer in reads:
                self.reads.setdefault(buffer, []).append(now)
            yield

    def after(self, actor: str, buffer: Hashable, uses: Sequence[tuple[str, int]]) -> None:
        for other, time in uses:
            if self.clock(actor).get(other, 0) < time:
                raise Race(f"{actor} uses {buffer}, {other} may not be done with it")

    def merge(self, actor: str, other: Clock) -> None:
        mine = self.clock(actor)
        for name, time in other.items():
            mine[name] = max(mine.get(name, 0), time)

    def record(self, stream: str) -> tuple[str, Clock]:
        with self.lock:
            return stream, dict(self.clock(stream))

    def wait(self, stream: str, event: Any) -> None:
        with self.lock:
            self.waits.append((stream, event[0]))
            if self.deaf != f"{stream.split()[0]} for {event[0].split()[0]}":
                self.merge(stream, event[1])

    def occurred(self, event: Any) -> bool:
        return not self.late

    def join(self, event: Any) -> None:
        with self.lock:
            if self.deaf != f"host for {event[0]}":
                self.merge("host", event[1])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[Stored]:
    return store_of(tmp_path_factory.mktemp("device"), [20, 13])


def pieces_of(stored: Sequence[Stored], tier: str = "standard") -> list[Piece]:
    """The middle of the one segment, and the other one behind it."""
    return [Piece(stored[0], tier, 15, 2, 3, first=4), Piece(stored[1], tier, 13, 17, 18)]


ROWS = 30


class Bench:
    """A pipeline on a pool, with what a load of two segments needs."""

    def __init__(self, stored: Sequence[Stored], streams: InlineStreams, slots: int = 3):
        self.streams, self.stored, self.on = streams, stored, HostCodec()
        self.pool = ThreadPoolExecutor(2)
        self.pipeline = Pipeline(streams, self.pool, slots)

    def load(self, tier: str = "standard", checks: Sequence[Future[None]] = ()) -> Pending:
        wanted, cache = Wanted(pieces_of(self.stored, tier)), allocate(LAYOUT, ROWS)
        for keys, values in cache:
            keys.zero_(), values.zero_()
        with self.streams.on("current", writes=[place_of(cache, i) for i in range(LAYERS)]):
            pass  # whoever had this memory before
        angles = angles_of(wanted, lambda rope, count: cos_sin(torch.arange(count), rope, torch.bfloat16, "cpu"))
        return Pending(cache, [self.pipeline.load(self.on, wanted, cache, angles, checks)])

    def look(self, pending: Pending, layer: int) -> None:
        """As the model does, on its own stream."""
        with self.streams.on("current", reads=[place_of(pending.tensors, layer)]):
            pass


@pytest.mark.parametrize("tier", ["draft", "standard", "fine"])
@pytest.mark.parametrize("slots", [1, 2, 3, 16])
def test_a_load_gives_the_bits_of_the_cpus(stored: list[Stored], tier: str, slots: int) -> None:
    expected = allocate(LAYOUT, ROWS)
    for keys, values in expected:
        keys.zero_(), values.zero_()
    for piece in pieces_of(stored, tier):
        Decoder().decode(piece, expected)
    found = Bench(stored, InlineStreams(), slots).load(tier)
    for pair, other in zip(found, expected, strict=True):
        assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])


def test_pieces_of_one_tier_and_encoding_go_together(stored: list[Stored]) -> None:
    one, two = pieces_of(stored), pieces_of(stored, "draft")
    assert together([one[0], two[0], one[1]]) == [[one[0], one[1]], [two[0]]]


def test_a_buffer_is_used_again_only_when_its_work_is_done(stored: list[Stored]) -> None:
    """Seven groups through two slots, three loads one after another without a wait between them."""
    bench = Bench(stored, Clocked(), slots=2)
    loads = [bench.load(), bench.load("fine"), bench.load("draft")]
    for pending in loads[:1]:
        for layer in range(LAYERS):
            pending.follow(layer)
    for layer in range(LAYERS):
        loads[2].follow(layer)
        bench.look(loads[2], layer)


@pytest.mark.parametrize("deaf", ["host for copy", "decode for copy", "fill for decode", "fill for current", "copy for fill", "current for fill"])
def test_every_wait_is_needed(stored: list[Stored], deaf: str) -> None:
    bench = Bench(stored, Clocked(deaf), slots=2)

    def load_and_look() -> None:
        pending = bench.load()
        pending.follow(5)
        bench.look(pending, 5)

    with pytest.raises(Race):
        load_and_look()


def test_a_group_waits_for_its_own_event_alone(stored: list[Stored]) -> None:
    bench = Bench(stored, Clocked())
    pending = bench.load()
    joined = len([w for w in bench.streams.waits if w[0] == "current"])  # type: ignore[attr-defined]
    pending.follow(2)  # groups are filled in order, so that the first two are there as well
    bench.look(pending, 2), bench.look(pending, 0)
    with pytest.raises(Race):
        bench.look(pending, 3)
    assert len([w for w in bench.streams.waits if w[0] == "current"]) == joined + 1  # type: ignore[attr-defined]
    assert not pending.readies[0]._joined  # the host went on
    pending.follow(LAYERS - 1)  # before the last group is used the host knows that all of them are sound
    assert pending.readies[0]._finished


def test_the_host_goes_on_where_the_event_has_occurred(stored: list[Stored]) -> None:
    bench = Bench(stored, Clocked(late=False))
    pending = bench.load()
    pending.follow(0)
    assert not [w for w in bench.streams.waits if w[0] == "current"]  # type: ignore[attr-defined]
    bench.look(pending, 0)


def test_damage_is_told_before_the_last_layer_is_used(stored: list[Stored]) -> None:
    bench = Bench(stored, Clocked())
    bench.on.damaged = {(3, 4)}
    pending = bench.load()
    for layer in range(LAYERS - 1):
        pending.follow(layer)
    with pytest.raises(IntegrityError, match=r"segment [0-9a-f]{12}, block 1, group 3"):
        pending.follow(LAYERS - 1)
    assert pending.damaged
    with pytest.raises(IntegrityError, match="group 3"):
        bench.load()[2]  # what is taken outright may be used without another look at its group
    with pytest.raises(IntegrityError, match="group 3"):
        list(bench.load())


def test_bytes_that_do_not_match_their_digest_are_told(stored: list[Stored]) -> None:
    check: Future[None] = Future()
    check.set_exception(IntegrityError("t0 is damaged"))
    pending = Bench(stored, InlineStreams()).load(checks=[check])
    for look in (lambda: pending[0], lambda: tuple(pending), lambda: pending.follow(LAYERS - 1)):
        with pytest.raises(IntegrityError, match="t0 is damaged"):
            look()


def test_an_error_while_staging_leaves_the_pipeline_usable(stored: list[Stored], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(stored, Clocked(), slots=2)
    plan = bench.on.plan

    def failing(words: Any, spans: Any, tokens: Any, group: int) -> Any:
        if group == 4:
            raise IntegrityError("a record too short for its head")
        return plan(words, spans, tokens, group)

    monkeypatch.setattr(bench.on, "plan", failing)
    with pytest.raises(IntegrityError, match="too short"):
        bench.load()
    monkeypatch.setattr(bench.on, "plan", plan)
    tuple(bench.load())


def test_memory_is_checked_before_it_is_taken_and_reported(stored: list[Stored], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(stored, InlineStreams(), slots=3)
    bench.on.work = 1 << 20
    cache = 2 * LAYERS * ROWS * 2 * LAYOUT.channels
    roomy = bench.load().peak_nbytes
    assert 3 << 20 < roomy - cache < (3 << 20) + 40_000
    monkeypatch.setattr(pipelines, "free_memory", lambda device: 2_200_000)
    bench.on = HostCodec(work=1 << 20)
    less = bench.load()
    assert 2 << 20 < less.peak_nbytes - cache < 2_200_000
    tuple(less)
    monkeypatch.setattr(pipelines, "free_memory", lambda device: 1 << 20)
    with pytest.raises(ResourceError, match="decoding groups of layers takes 1 MiB"):
        bench.load()
    assert {what for what, _ in bench.on.order[-1:]} == {"fill"}  # of the load before: nothing was launched


def test_what_a_load_held_is_given_back_when_it_is_done(stored: list[Stored]) -> None:
    bench = Bench(stored, InlineStreams())
    pending = bench.load()
    assert all(slot.held for slot in bench.pipeline._staging.slots)
    tuple(pending)
    assert not any(slot.held for slot in bench.pipeline._staging.slots)


def test_couriers_do_not_overtake_themselves() -> None:
    """The third tensor is put into the first one's buffer, which must have been copied."""
    streams, courier = Clocked(), Courier()
    given = [torch.arange(n, n + 6, dtype=torch.bfloat16).view(2, 3) for n in range(5)]
    with torch.inference_mode():  # buffers made here serve loads elsewhere
        assert all(torch.equal(courier.send(t, streams), t) for t in given[:2])
    assert all(torch.equal(courier.send(t, streams), t) for t in given)
    other, deaf = Courier(), Clocked("host for current")
    with pytest.raises(Race):
        [other.send(t, deaf) for t in given]


class Slow:
    """A load of one group a layer that the host hears of only when it asks."""

    def __init__(self, tensors: Sequence[KV]):
        self.streams, self.seen = Clocked(), list[int]()
        self.ready = Ready(self.streams, range(len(tensors)))
        for layer in range(len(tensors)):
            with self.streams.on("fill", writes=[layer]):
                self.ready.add(self.streams.record("fill"), lambda layer=layer: self.seen.append(layer))
        self.pending = Pending(tensors, [self.ready])


def rotated(name: str, ids: list[int]) -> tuple[Any, list[KV]]:
    model, layout = tiny.measured(name)
    at, made = torch.arange(len(ids)), []
    for (k, v), rope in zip(prefill(model, layout, ids)[0], layout.rope_of, strict=True):
        made.append(((k if rope is None else rotate(k, at, layout.ropes[rope]))[None], v[None]))
    return model, made


@pytest.mark.parametrize("name", ["llama", "smollm3", "mistral-window", "gemma3"])
def test_a_waiting_cache_generates_what_a_cache_does(name: str) -> None:
    ids = list(range(10, 40))
    model, tensors = rotated(name, ids)
    slow = Slow(tensors)
    more: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
    prompt = torch.tensor([[*ids, 50, 51, 52]])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=dynamic_cache(model.config, tensors), **more)
    cache = waiting_cache(model.config, slow.pending)
    kinds = {DynamicLayer: WaitingLayer, DynamicSlidingWindowLayer: WaitingWindow}
    assert [type(x) for x in cache.layers] == [kinds[type(x)] for x in dynamic_cache(model.config, tensors).layers]
    assert not slow.seen and not slow.streams.waits
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **more)
    assert torch.equal(found, expected)
    assert sorted(slow.seen) == list(range(len(tensors)))  # the last layer had the host look at all
    assert {type(x) for x in cache.layers} <= set(kinds)  # plain layers again


def test_layers_wait_in_their_turn_and_copies_wait_for_themselves() -> None:
    model, tensors = rotated("llama", list(range(10, 20)))
    slow = Slow(tensors)
    cache = waiting_cache(model.config, slow.pending)
    twin, deep = copy.copy(cache.layers[1]), copy.deepcopy(cache.layers[0])
    assert [w[0] for w in slow.streams.waits] == ["current"] and type(twin) is WaitingLayer
    assert torch.equal(deep.keys, tensors[0][0]) and deep.keys is not tensors[0][0]
    assert twin.keys is tensors[1][0] and type(cache.layers[1]) is WaitingLayer
    with slow.streams.on("current", reads=[1]):
        pass
    with pytest.raises(Race), slow.streams.on("current", reads=[2]):
        pass
    assert cache.get_seq_length() == 10 and not slow.seen
    cache.update(torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), 1)
    assert cache.layers[1].keys.shape[2] == 11 and tensors[1][0].shape[2] == 10


def test_a_cache_that_waits_can_be_shared() -> None:
    model, tensors = rotated("llama", list(range(10, 20)))
    slow = Slow(tensors)
    cache = share(waiting_cache(model.config, slow.pending))
    assert not slow.streams.waits
    assert all(torch.equal(layer.values, v) for layer, (_, v) in zip(cache.layers, tensors, strict=True))


TRITON = """
import sys, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from kvstore.decode import Decoder, Piece, allocate
from kvstore.device.path import DevicePath
from kvstore.device.ready import Pending
from kvstore.device.streams import InlineStreams
from kvstore.families.rope import cos_sin
from kvstore.manifest import Layout
from tests.device_store import ROPE, make_calibration, store_of
torch.set_num_threads(1)
layout = Layout(2, 1, 8, "bfloat16", "hooked", (0, None), (ROPE,))
stored = store_of(Path(sys.argv[1]), [11], layout, make_calibration(2, 1, 8, group_layers=1))[0]
piece = Piece(stored, "standard", 9, 1, 5, first=2)
path = DevicePath(InlineStreams("cpu"), ThreadPoolExecutor(2), lambda rope, dtype, count: cos_sin(torch.arange(count), rope, dtype, "cpu"))
assert path.takes(piece), path.why_not
cache, expected = allocate(layout, 10), allocate(layout, 10)
Decoder().decode(piece, expected)
for (k, v), (ek, ev) in zip(Pending(cache, [path.load([piece], cache, [])]), expected, strict=True):
    for a, b in ((k, ek), (v, ev)):
        error = (a[:, :, 1:].float() - b[:, :, 1:].float()).norm() / b[:, :, 1:].float().norm()
        assert error < 4e-3, error
print("same")
"""


@pytest.mark.slow
def test_the_kernels_fill_a_cache_through_the_pipeline(tmp_path: Path) -> None:
    """By Triton's interpreter, which must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", TRITON, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> kvstore.OpenStore:
    source, path = ModelSource(None), tmp_path_factory.mktemp("compose") / "kv.zarr"
    texts = [" ".join(f"The number of the {kind} library is {n}." for n in range(20)) for kind in ("old", "new")]
    kvstore.build([kvstore.Document(text, f"{n}.md") for n, text in enumerate(texts)], path, source, regime="both", certify="none")
    return kvstore.open(path, source.model, source.tokenizer)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> list[HostCodec]:
    """As if the model lay on a GPU: stores decode through the device path, by the CPU's codec. The decoders that were made."""
    made: list[HostCodec] = []
    paths: dict[Decoder, DevicePath] = {}

    def decoder_for(self: DevicePath, wanted: Wanted) -> HostCodec:
        made.append(HostCodec(registry.find(wanted.encoding.codecs[0].calibration or "")))
        made[-1].damaged = {(0, 1)} if damaging else set()
        return made[-1]

    damaging: list[bool] = []
    monkeypatch.setattr(DevicePath, "_decoder_for", decoder_for)
    monkeypatch.setattr(DevicePath, "why_not", None)
    monkeypatch.setattr(Decoder, "_path", lambda self, device: paths.setdefault(self, self._new_path(Clocked())))
    monkeypatch.setattr(HostCodec, "damaging", damaging, raising=False)
    return made


def test_prompts_come_through_the_device(opened: kvstore.OpenStore, on_device: list[HostCodec]) -> None:
    prompt = opened.compose(["0.md", "1.md"], "Which number?", reuse="blocks", tier="standard")
    assert isinstance(prompt.layers, Pending) and len(prompt.layers.readies) == 1  # one load for all pieces
    assert on_device
    assert prompt.receipt.peak_nbytes > sum(k.nbytes + v.nbytes for k, v in prompt.layers.tensors)
    found = opened.model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False)
    batch = kvstore.collate([prompt, opened.compose(["1.md"], "Which number?", tier="standard")])
    assert batch["input_ids"].shape[0] == 2
    assert torch.equal(prompt.static(4)["past_key_values"].layers[0].keys[:, :, :5], prompt.layers[0][0][:, :, :5])
    read, expected = opened.read("0.md", tier="draft")[1], None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_path", lambda self, device: None)
        plain = opened.compose(["0.md", "1.md"], "Which number?", reuse="blocks", tier="standard")
        expected = opened.read("0.md", tier="draft")[1]
    assert plain.receipt.peak_nbytes == 0 and isinstance(plain.layers, tuple)
    assert torch.equal(opened.model.generate(**plain.inputs, max_new_tokens=3, do_sample=False), found)
    for mine, theirs in ((prompt.layers, plain.layers), (read, expected)):
        assert all(torch.equal(a, b) for p, q in zip(mine, theirs, strict=True) for a, b in zip(p, q, strict=True))


def test_a_damaged_unit_stops_the_forward_pass(opened: kvstore.OpenStore, on_device: list[HostCodec]) -> None:
    HostCodec.damaging.append(True)  # type: ignore[attr-defined]
    prompt = opened.compose(["0.md"], "Which number?", tier="fine")
    with pytest.raises(IntegrityError, match="block 0, group 0"):
        opened.model.generate(**prompt.inputs, max_new_tokens=1)
    with pytest.raises(IntegrityError, match="block 0, group 0"):
        opened.load("0.md", tier="fine").base.static(1)


def test_what_the_device_cannot_decode_the_cpu_does(opened: kvstore.OpenStore, stored: list[Stored], on_device: list[HostCodec]) -> None:
    path = DevicePath(InlineStreams(), ThreadPoolExecutor(1), lambda rope, dtype, count: pytest.fail("nothing is turned"))
    piece = pieces_of(stored)[0]
    assert path.takes(piece)
    other = {"latent": replace(LAYOUT, latent=(12, 4)), "values": replace(LAYOUT, rotated="values")}
    for layout in other.values():
        manifest = replace(stored[0].pack.manifest, layout=layout)
        pack = copy.copy(stored[0].pack)
        pack.manifest = manifest  # type: ignore[assignment]
        assert not path.takes(Piece(Stored(pack, stored[0].segment), "standard", 15, 2, 3))
