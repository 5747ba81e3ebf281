"""The entropy coder against constriction, both ways; the built-in tables; and what happens to streams nobody wrote."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import constriction
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import ans, make_tables, table_data
from kvstore.codecs.base import Reader
from kvstore.codecs.tables import CLASSES, PER_THREE, UNIT_CLASS, class_bounds, model, tables, thirds_model
from kvstore.errors import IntegrityError

I64 = npt.NDArray[np.int64]
AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical
many = settings(max_examples=60, deadline=None)


def oracle_model(weights: I64) -> Any:
    """constriction's model with exactly these 12-bit weights, shifted to 24 bits."""
    return Categorical((weights * 4096 - 1).astype(np.float64), perfect=False)


class Case(NamedTuple):
    """Symbols are indices into the models' alphabets."""

    symbols: npt.NDArray[np.uint8]
    runs: ans.Runs
    table_of_run: npt.NDArray[np.uint8]
    weights: list[I64]

    def encode_tables(self) -> npt.NDArray[np.uint32]:
        return np.stack([ans.encode_table(w, np.arange(len(w))) for w in self.weights])

    def decode_tables(self) -> npt.NDArray[np.uint32]:
        return np.stack([ans.decode_table(w, np.arange(len(w))) for w in self.weights])

    def encode(self) -> ans.Coded:
        return ans.encode(self.symbols, self.runs, self.table_of_run, self.encode_tables())

    def decode(self, coded: ans.Coded) -> npt.NDArray[np.uint8]:
        return ans.decode(coded, self.runs, self.table_of_run, self.decode_tables())

    def pieces(self, stream: int) -> list[tuple[npt.NDArray[np.int32], Any]]:
        """The runs of a stream: symbols and constriction's model."""
        first, size = stream * self.runs.per, self.runs.run
        rows = [(self.symbols[r * size : (r + 1) * size].astype(np.int32), r) for r in range(first, first + self.runs.per)]
        return [(part, oracle_model(self.weights[self.table_of_run[r]])) for part, r in rows if len(part)]


def random_weights(rng: np.random.Generator, size: int) -> I64:
    """12-bit weights, each at least 1, of a skewed model."""
    shares = rng.dirichlet(np.full(size, rng.choice([0.05, 0.5, 5.0]))) * (4096 - size)
    weights = 1 + shares.astype(np.int64)
    weights[rng.integers(size)] += 4096 - weights.sum()
    return weights


def make_case(seed: int, symbols: int, run: int, alphabets: list[int]) -> Case:
    rng = np.random.default_rng(seed)
    weights = [random_weights(rng, size) for size in alphabets]
    symbols = min(symbols, 600 * run)  # constriction takes a call a run
    runs = ans.cut(symbols, run)
    table_of_run = rng.integers(0, len(weights), -(-symbols // run)).astype(np.uint8)
    drawn = [rng.choice(len(weights[t]), run, p=weights[t] / 4096) for t in table_of_run]
    return Case(np.concatenate(drawn)[:symbols].astype(np.uint8), runs, table_of_run, weights)


cases = st.builds(
    make_case,
    st.integers(0, 2**32),
    st.one_of(st.integers(1, 200), st.integers(4000, 40_000)),
    st.sampled_from([1, 5, 64, 100, 128, 1000, 4096, 5000]),
    st.lists(st.sampled_from([2, 3, 15, 64, 255, 256]), min_size=1, max_size=5),
)


@many
@given(case=cases)
def test_streams_are_constrictions_own_and_both_decode_them(case: Case) -> None:
    coded = case.encode()
    assert len(coded.ends) == case.runs.streams + 1
    np.testing.assert_array_equal(case.decode(coded), case.symbols)
    for stream in range(case.runs.streams):
        pieces, oracle = case.pieces(stream), AnsCoder()
        for symbols, categorical in reversed(pieces):
            oracle.encode_reverse(symbols, categorical)
        words = coded.words[1 + coded.ends[stream] : 1 + coded.ends[stream + 1]]
        np.testing.assert_array_equal(words, oracle.get_compressed())
        decoder = AnsCoder(words.copy())
        for symbols, categorical in pieces:
            np.testing.assert_array_equal(decoder.decode(categorical, len(symbols)), symbols)
        assert decoder.is_empty()


@many
@given(seed=st.integers(0, 2**32), size=st.one_of(st.integers(1, 300), st.integers(4000, 20_000)), run=st.sampled_from([7, 64, 128, 4096]))
def test_refinements_are_constrictions_own_in_two_contexts(seed: int, size: int, run: int) -> None:
    rng, built = np.random.default_rng(seed), tables()
    runs = ans.cut(size, run)
    classes = rng.integers(0, CLASSES, -(-size // run)).astype(np.uint8)
    base = np.rint(rng.normal(size=size) * rng.choice([0.3, 1, 60])).clip(-127, 127).astype(np.int8)
    thirds = np.array([rng.choice(3, p=thirds_model(classes[i // run])[int(base[i] != 0)] / 4096) for i in range(size)])
    coded = ans.encode((thirds + 3 * (base != 0)).astype(np.uint8), runs, classes, built.refine)
    found = ans.decode_ternary(coded, runs, classes, built.thirds, base)
    np.testing.assert_array_equal(found, (thirds - 1) * np.where(base < 0, -1, 1))
    last, oracle = min(size, runs.run * runs.per), AnsCoder()
    for i in range(last - 1, -1, -1):
        oracle.encode_reverse(thirds[i : i + 1].astype(np.int32), oracle_model(thirds_model(classes[i // run])[int(base[i] != 0)]))
    np.testing.assert_array_equal(coded.words[1 : 1 + coded.ends[1]], oracle.get_compressed())


@pytest.mark.parametrize(("symbols", "run"), [(1, 1), (4096, 4096), (4097, 4096), (16_384, 128), (12_800, 100), (40_000, 64), (9, 4), (5000, 5000)])
def test_streams_are_short_and_nearly_equal(symbols: int, run: int) -> None:
    runs = ans.cut(symbols, run)
    assert runs.run * runs.per <= max(ans.STREAM, run)
    assert (runs.streams - 1) * runs.run * runs.per < symbols <= runs.streams * runs.run * runs.per


def test_a_stream_costs_its_entropy() -> None:
    case = make_case(1, 1 << 16, 4096, [16])
    chances = case.weights[0] / 4096
    ideal = -np.log2(chances[case.symbols]).sum() / 32
    assert ideal <= case.encode().ends[-1] <= ideal + 1.5 * case.runs.streams


def damaged_somewhere(coded: ans.Coded, seed: int) -> ans.Coded:
    rng, words, ends = np.random.default_rng(seed), coded.words.copy(), coded.ends.copy()
    for _ in range(rng.integers(1, 4)):
        words[1 + rng.integers(max(1, ends[-1]))] = rng.choice([0, 1, 2**32 - 1, int(rng.integers(2**32))])
    if rng.random() < 0.5 and len(ends) > 2:
        ends[1:-1] = np.sort(rng.integers(0, ends[-1] + 1, len(ends) - 2))
    return ans.Coded(words, ends)


@many
@given(case=cases, seed=st.integers(0, 2**32))
def test_damage_is_found_or_gives_wrong_symbols(case: Case, seed: int) -> None:
    try:
        out = case.decode(damaged_somewhere(case.encode(), seed))
    except IntegrityError:
        return
    assert out.shape == case.symbols.shape and (out < 256).all()


@pytest.mark.parametrize("size", [3, 16, 255])
def test_changed_bits_are_mostly_found(size: int) -> None:
    """The state must come back to zero having used every word. A decoder may fall into step again: checksums find those."""
    case = make_case(3, 3000, 64, [size])
    coded, missed = case.encode(), 0
    for at in range(1, int(coded.ends[-1]) + 1):
        words = coded.words.copy()
        words[at] ^= 1 << (at % 32)
        try:
            case.decode(ans.Coded(words, coded.ends))
            missed += 1
        except IntegrityError:
            pass
    assert missed <= 0.2 * coded.ends[-1]


def test_ends_that_do_not_fit_are_damage() -> None:
    case = make_case(4, 9000, 64, [8])
    coded = case.encode()
    for ends in (coded.ends[:-1], np.append(coded.ends, coded.ends[-1]), coded.ends + len(coded.words), coded.ends - 1):
        with pytest.raises(IntegrityError):
            case.decode(ans.Coded(coded.words[: coded.ends[-1] + 1], ends))


def test_taking_rows_from_a_record_checks_their_lengths() -> None:
    case = make_case(5, 9000, 64, [8])
    coded = case.encode()
    lengths = coded.lengths() + bytes(-len(coded.lengths()) % 4)
    words = np.frombuffer(bytes(4) + lengths + coded.content(), np.uint32)
    (row,) = ans.take(Reader(words, 1), [case.runs.streams])
    np.testing.assert_array_equal(case.decode(row), case.symbols)
    with pytest.raises(IntegrityError):
        ans.take(Reader(words[:-1], 1), [case.runs.streams])
    with pytest.raises(IntegrityError):
        ans.take(Reader(words, 1), [10**9])


# the built-in tables


def test_tables_are_complete_models() -> None:
    built = tables()
    for c in range(CLASSES):
        weights, values = model(c)
        assert weights.sum() == 4096 and weights.min() >= 1 and (weights == weights[::-1]).all()
        half = weights[len(weights) // 2 :]
        assert (np.diff(half) <= 0).all(), "likelier values are nearer to zero"
        assert len(values) <= 255 and built.largest[c] == values[-1]
        for thirds in thirds_model(c):
            assert thirds.sum() == 4096 and thirds.min() >= 1
        zero, other = thirds_model(c)
        assert zero[0] == zero[2] and (np.diff(other) <= 0).all()
    assert len(table_data.MEANS) == CLASSES + 2 * PER_THREE
    for refinements in range(3):
        assert (np.diff(class_bounds(refinements)[9:]) > 0).all()


def test_wider_classes_have_wider_models() -> None:
    spreads = [float((w * v**2).sum() / 4096) ** 0.5 for w, v in map(model, range(UNIT_CLASS - 8, CLASSES))]
    assert (np.diff(spreads) > 0).all()
    for c, spread in enumerate(spreads[8:], UNIT_CLASS):
        assert spread == pytest.approx(3 ** ((c - UNIT_CLASS) / PER_THREE), rel=0.12)


def test_the_committed_tables_are_these() -> None:
    """Records depend on every number. Never mend this digest: a new table is a new version of each codec that uses it."""
    text = repr((table_data.BASE, table_data.THIRDS, table_data.MEANS))
    assert hashlib.sha256(text.encode()).hexdigest() == "26d969afa2ac4df41333e191068d59a96e703e3fbcf6ec3f233b84b8ace68a20"


def test_the_script_still_makes_the_committed_tables() -> None:
    """To the last unit or so: mathematical libraries differ in the last bit."""
    grid = make_tables.tail_grid()
    for c in range(CLASSES):
        made, kept = make_tables.base_weights(grid, c), table_data.BASE[c]
        assert abs(len(made) - len(kept)) <= 1
        assert all(abs(a - b) <= 4 for a, b in zip(made, kept, strict=False))
        assert all(abs(a - b) <= 1 for a, b in zip(make_tables.thirds(grid, c), table_data.THIRDS[c], strict=True))
    compile(make_tables.source(), "table_data.py", "exec")
