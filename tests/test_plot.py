"""Pictures of a store: their numbers are those of `stats` and of the quality reports, and no name in a store can break a page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from contracts.codec import DTYPES, sample
from synthetic import BLOCK, ENCODING, LAYOUT, MODEL, RECORD, TEMPLATE, Document, build, make_encoding, make_store, new_writer, replace

from kvstore.certificates import ArtifactScore, TierScore, add_report, make_report
from kvstore.codecs import default_params, get_codec
from kvstore.codecs.base import Codec
from kvstore.errors import InputError, IntegrityError, NotFoundError
from kvstore.inventory import stats
from kvstore.manifest import CodecSpec, Encoding, Tier
from kvstore.plotting import data as data_module
from kvstore.plotting.axes import Axis
from kvstore.plotting.data import EncodingPlot, collect, kind_totals
from kvstore.plotting.files import write
from kvstore.plotting.page import page
from kvstore.plotting.svg import frame_of
from kvstore.records import add_model, add_template, create
from kvstore.store import Store

SVG = "{http://www.w3.org/1999/xhtml}svg"
HOSTILE = "</td><script>alert(1)</script>&\"'\x1b[2J\u202e.md"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = make_store(tmp_path / "s")
    build(made, [Document(f"d{i:02}.md", lengths=(5 + 3 * i, 9)) for i in range(14)])
    return made


def only(store: Store) -> EncodingPlot:
    (plot,) = collect(store).encodings
    return plot


def codec(name: str) -> Codec:
    return get_codec(name, *default_params(name, head_dim=64))


def report(store: Store, encoding: Encoding = ENCODING, model: str = MODEL.key, tier: str = "draft", kl: float = 0.02) -> None:
    scores = [ArtifactScore(f"{i:064x}", f"{i:064x}", 100, 1e-6, (TierScore(tier, kl * (i + 1) / 2, 0.1, 0.5, 0.9, 0.0),)) for i in range(3)]
    add_report(store.storage, make_report(model, encoding.id, scores, {tier: 0.1}, {}))


def real_store(folder: Path, blocks: int = 2) -> Store:
    """One segment in scalar and lossless tiers, its last block short, so that keys and values can be told apart."""
    tiers = (
        Tier("base", "t0", "scalar", 0, (), False),
        Tier("fine", "t1", "scalar", 1, ("base",), False),
        Tier("all", "t2", "lossless", 0, (), True),
    )
    specs = [CodecSpec(name, *default_params(name, head_dim=LAYOUT.head_dim)) for name in ("scalar", "lossless")]
    encoding, store, ids = Encoding(tuple(specs), tiers, BLOCK, 2), make_store(folder), tuple(range(10, 10 + BLOCK * blocks - 3))
    (task,) = Document("x.md", lengths=(len(ids),)).tasks()[1:]
    writer, bits = new_writer(store.storage, encoding), sample((LAYOUT.layers, 2, len(ids), LAYOUT.channels), LAYOUT.dtype)
    cells = [[bits[g : g + 2, :, t : t + BLOCK] for t in range(0, len(ids), BLOCK)] for g in (0, 2)]
    coded = {c: [[codec(c).encode(np.ascontiguousarray(cell), LAYOUT.dtype) for cell in row] for row in cells] for c in ("scalar", "lossless")}
    writer.add(task.key, task.context, ids, {t.array: [[unit[t.level] for unit in row] for row in coded[t.codec]] for t in tiers})
    writer.close()
    store.refresh()
    return store


def test_sums_are_those_of_stats(store: Store) -> None:
    plot, (total,) = only(store), stats(store).encodings
    assert [(t.name, t.nbytes, t.load_nbytes, t.raw_ratio) for t in plot.tiers] == [
        (t.name, t.nbytes, t.load_nbytes, t.raw_ratio) for t in total.tiers
    ]
    assert (plot.artifacts, plot.tokens, plot.nbytes) == (total.artifacts, total.tokens, total.nbytes)
    for tier in plot.tiers:
        assert sum(g.nbytes[tier.name] for g in plot.layers) == tier.nbytes
        assert tier.bits == pytest.approx(8 * tier.load_nbytes / (total.tokens * LAYOUT.values_per_token))
        assert tier.bytes_per_token == pytest.approx(tier.load_nbytes / total.tokens)
    assert [(g.first, g.last) for g in plot.layers] == [(0, 1), (2, 2)]
    short = plot.layers[1]
    assert short.bits["draft"] == pytest.approx(8 * short.nbytes["draft"] / (total.tokens * 2 * LAYOUT.channels))


def test_largest_documents(store: Store) -> None:
    plot = only(store)
    sizes = {s: store[s].nbytes() for s in store.sources()}
    assert [d.source for d in plot.largest] == sorted(sizes, key=lambda s: (-sizes[s], s))[:10] and plot.documents == 14
    assert [d.nbytes for d in plot.largest] == [sizes[d.source] for d in plot.largest]


def test_an_unmeasured_tier_has_no_number(store: Store, tmp_path: Path) -> None:
    assert all(t.kl is None and t.measured is None for t in only(store).tiers)
    drawn = page(collect(store))
    assert drawn.count("draft: not measured") == 1 and "<circle" not in drawn and "No tier of this encoding has a quality report" in drawn
    write(collect(store), tmp_path / "out")


def test_measured_tiers_come_from_the_reports_of_their_model(store: Store) -> None:
    report(store, kl=0.02)
    report(store, model="9" * 64, tier="fine")
    draft, fine = only(store).tiers
    assert draft.measured is not None and draft.kl == pytest.approx(0.02) and draft.measured.documents == 3 and draft.measured.tokens == 300
    assert draft.measured.upper is not None and draft.measured.upper > draft.kl
    assert (fine.kl, fine.measured) == (None, None)
    drawn = page(collect(store))
    assert "draft: 0.02" in drawn and "fine: not measured" in drawn and drawn.count("<circle") == 1


def test_an_exact_tier_has_a_kl_of_zero(tmp_path: Path) -> None:
    plot = only(real_store(tmp_path / "s"))
    assert [t.kl for t in plot.tiers] == [None, None, 0.0] and "all: 0 (exact)" in page(collect(Store(tmp_path / "s", cache=tmp_path / "cache")))


@pytest.mark.parametrize("name", ["raw", "lossless", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 2, 7, 33), (2, 2, 130, 257), (1, 2, 512, 128)])
def test_keys_and_values_of_a_record(name: str, dtype: str, shape: tuple[int, int, int, int]) -> None:
    """All but the header and padding; and a plane that is swapped with its partner moves its bytes to the other kind."""
    bits = sample(shape, dtype)
    bits[:, 1] = 0
    made, other = (codec(name).encode(np.ascontiguousarray(b), dtype) for b in (bits, bits[:, ::-1]))
    for record, swapped in zip(made, other, strict=True):
        keys, values = sizes(name, record, dtype)
        assert 12 <= len(record) - keys - values < 20
        if name == "lossless":
            assert (values, keys) == sizes(name, swapped, dtype)
        if name != "raw" and shape[2] > 100:
            assert keys > 2 * values
            assert sizes(name, swapped, dtype)[1] > 2 * sizes(name, swapped, dtype)[0]


def sizes(name: str, record: bytes, dtype: str) -> tuple[int, int]:
    found = codec(name).kind_nbytes(record, codec(name).params, dtype)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["raw", "lossless", "scalar"])
def test_sizes_of_a_damaged_record(name: str) -> None:
    for record in codec(name).encode(sample((2, 2, 30, 33), "bfloat16"), "bfloat16"):
        for broken in (record[:-4], record + bytes(4), record[:12]):
            with pytest.raises(IntegrityError):
                sizes(name, broken, "bfloat16")


def test_kinds_add_up_to_the_stored_bytes(tmp_path: Path) -> None:
    plot = only(real_store(tmp_path / "s"))
    for tier, kinds in kind_totals(plot).items():
        assert kinds is not None and kinds.units == kinds.of == 4
        assert kinds.keys + kinds.values + kinds.shared == next(t.nbytes for t in plot.tiers if t.name == tier)
        assert 0 < kinds.shared <= 4 * 23  # header, padding, crc32c
    assert "values faded" in page(collect(Store(tmp_path / "s", cache=tmp_path / "cache")))


def test_many_units_are_sampled_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = real_store(tmp_path / "s", blocks=9)
    monkeypatch.setattr(data_module, "UNITS", 24)
    kinds = kind_totals(only(store))["base"]
    assert kinds is not None and (kinds.units, kinds.of) == (8, 18) and "8 of 18 units" in page(collect(store))


def test_a_codec_without_kinds_says_so(store: Store) -> None:
    assert kind_totals(only(store)) == {"draft": None, "fine": None} and "K and V coded together" in page(collect(store))


def test_page_is_well_formed_and_needs_nothing_else(store: Store) -> None:
    build(store, [Document(HOSTILE, lengths=(900,))])
    report(store)
    drawn = page(collect(store))
    root = ElementTree.fromstring(drawn)
    assert len(root.findall(f".//{SVG}")) == 2
    names = {e.tag.split("}")[1] for e in root.iter()}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "a", "image", "use", "form", "foreignObject"}
    assert not {k for e in root.iter() for k in e.attrib if k.startswith("on") or k in ("href", "src", "style")}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/1999/xhtml)", drawn)
    assert "\x1b" not in drawn and "\u202e" not in drawn and "&lt;script&gt;alert(1)" in drawn and "\\x1b[2J\\u202e" in drawn


def test_hostile_names_of_models_and_tiers(tmp_path: Path) -> None:
    """Names as a foreign store might have them: markup for a page, formulas and hidden labels for matplotlib."""
    name = "_$\\frac{" + HOSTILE * 3
    create(tmp_path / "s")
    store = Store(tmp_path / "s", cache=tmp_path / "cache")
    add_model(store.storage, replace(RECORD, model=replace(MODEL, name=name)), np.zeros((LAYOUT.layers, 2, 4, 2), np.float32))  # type: ignore[arg-type]
    add_template(store.storage, TEMPLATE)
    tiers = tuple(replace(t, name=f"{name}{i}", requires=()) for i, t in enumerate(ENCODING.tiers))
    encoding = replace(ENCODING, tiers=tiers)
    assert isinstance(encoding, Encoding)
    build(store, [Document("a.md")], encoding=encoding)
    report(store, encoding, tier=f"{name}0")
    ElementTree.fromstring(page(collect(store)))
    assert [p.name for p in write(collect(store), tmp_path / "out")] == ["index.html", "curve.png", "layers.png"]


def test_several_encodings_and_models_and_choosing_one(store: Store) -> None:
    other = make_encoding("other")
    build(store, [Document("d00.md"), Document("new.md")], encoding=other)
    found = collect(store)
    assert {e.id for e in found.encodings} == {ENCODING.id, other.id} and page(found).count("<h2>") == 2
    assert [e.id for e in collect(store, encoding=other.id[:10]).encodings] == [other.id]
    assert {d.source for d in collect(store, encoding=other.id).encodings[0].largest} == {"d00.md", "new.md"}
    with pytest.raises(NotFoundError, match=f"encoding {ENCODING.id[:12]}|encoding {other.id[:12]}"):
        collect(store, model="nosuch")


def test_an_empty_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="kvstore build"):
        collect(make_store(tmp_path / "s"))


def test_files(store: Store, tmp_path: Path) -> None:
    data = collect(store)
    paths = write(data, tmp_path / "deep" / "out")
    first = {p.name: p.read_bytes() for p in paths}
    assert set(first) == {"index.html", "curve.png", "layers.png"} and sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == sorted(first)
    assert all(first[n].startswith(b"\x89PNG\r\n") for n in ("curve.png", "layers.png"))
    write(data, tmp_path / "deep" / "out")
    assert {p.name: p.read_bytes() for p in paths} == first  # the same store, the same bytes
    assert [write(data, tmp_path / n)[0].name for n in ("a.html", "b.png")] == ["a.html", "b.png"]
    assert (tmp_path / "a.html").read_bytes() == first["index.html"] and (tmp_path / "b.png").read_bytes() == first["curve.png"]


def test_files_of_others_stay(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "curve.png").write_bytes(b"a holiday")
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "link.html").symlink_to("nowhere")
    for out in ("out", "plain", "link.html"):
        with pytest.raises(InputError):
            write(collect(store), tmp_path / out)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["curve.png"] and (tmp_path / "out" / "curve.png").read_bytes() == b"a holiday"
    for inside in (store.path, store.path / "packs" / "x", store.path / "x.html"):
        with pytest.raises(InputError, match="in the store"):
            write(collect(store), inside)


def test_without_matplotlib_there_is_the_page(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write(collect(store), tmp_path / "p.html") == [tmp_path / "p.html"]
    with pytest.raises(InputError, match=r"pip install 'kvstore-compiler\[plot\]'"):
        write(collect(store), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.html"]


def test_the_page_imports_nothing_heavy(tmp_path: Path) -> None:
    """Neither torch, nor compiled code (which would be needed to decode), nor matplotlib; and the store may be read-only."""
    real_store(tmp_path / "s")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    before = sorted(p.relative_to(tmp_path / "s").as_posix() for p in (tmp_path / "s").rglob("*"))
    code = (
        "import sys; from pathlib import Path; from kvstore.store import Store; from kvstore.plotting.data import collect; "
        "from kvstore.plotting.files import write; write(collect(Store(sys.argv[1], cache=Path(sys.argv[2]))), sys.argv[3]); "
        "heavy = {'torch', 'transformers', 'numba', 'zarr', 'matplotlib'} & sys.modules.keys(); sys.exit(str(heavy) if heavy else 0)"
    )
    words = [tmp_path / "s", tmp_path / "cache", tmp_path / "p.html"]
    ran = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert sorted(p.relative_to(tmp_path / "s").as_posix() for p in (tmp_path / "s").rglob("*")) == before


def test_axes() -> None:
    bits = Axis.around([1.6, 16], 2)
    assert bits.ticks == [1, 2, 4, 8, 16] and (bits.place(1), bits.place(4), bits.place(16)) == (0, 0.5, 1)
    assert Axis.around([4.0, 4.0], 2).ticks == [4, 8] and len(Axis.around([1e-30, 1.0], 10).ticks) <= 9
    assert Axis.around([0.001, 0.1], 10) == Axis(10, -3, -1)


def test_points_stand_where_their_numbers_are(store: Store) -> None:
    report(store, kl=0.01)
    plot = only(store)
    frame, draft = frame_of(plot), plot.tiers[0]
    assert frame.x(draft.bits) < frame.x(plot.tiers[1].bits) <= frame.x(plot.raw_bits) or draft.bits > plot.raw_bits
    assert frame.y(0.0) > frame.y(1e-2) > frame.y(2e-2)
    assert f'cx="{frame.x(draft.bits):.1f}" cy="{frame.y(draft.kl or 0):.1f}"' in page(collect(store))
