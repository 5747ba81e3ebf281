"""What a build may and may not do to what is stored: names, roots, interrupts, odd models and inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore
from kvstore import Document
from kvstore.build_report import Limits
from kvstore.errors import IncompatibleError, InputError, NotFoundError
from kvstore.pack_writer import PackWriter

TEXT = "The keeper of the old lantern is Mercer. He lights it when the fog comes in. "


@pytest.fixture
def build(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any) -> Any:
    def run(documents: Any, **options: Any) -> kvstore.BuildReport:
        return kvstore.build(documents, tmp_path / "kv.zarr", bundled_model, bundled_tokenizer, codec="raw", **options)

    return run


def write(folder: Path, **texts: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return folder


def sources(tmp_path: Path) -> list[str]:
    return kvstore.open(tmp_path / "kv.zarr").sources()


def test_equal_names_from_two_folders_are_refused(tmp_path: Path, build: Any) -> None:
    build(write(tmp_path / "a", readme=TEXT))
    with pytest.raises(InputError, match="two files"):
        build(write(tmp_path / "b", readme=TEXT + "More."))
    (tmp_path / "a" / "readme.md").unlink()  # moved, not doubled
    assert build(tmp_path / "b").compiled == 1


def test_a_file_named_alone_stays_under_its_folder(tmp_path: Path, build: Any) -> None:
    folder = write(tmp_path / "a", one=TEXT, two=TEXT + "Two.")
    build(folder)
    (folder / "one.md").write_text(TEXT + "Changed.")
    assert build(folder / "one.md").compiled == 1
    (folder / "one.md").unlink()
    assert build(folder).removed == 1
    assert sources(tmp_path) == ["two.md"]


def test_a_folder_that_became_empty_is_synced_beside_another(tmp_path: Path, build: Any) -> None:
    a, b = write(tmp_path / "a", one=TEXT), write(tmp_path / "b", two=TEXT + "Two.")
    build([a, b])
    (a / "one.md").unlink()
    assert build([a, b]).removed == 1
    (b / "two.md").unlink()
    with pytest.raises(InputError, match="no document"):  # nothing at all to read is more likely a wrong path
        build([a, b])
    assert sources(tmp_path) == ["two.md"]


def test_a_document_that_was_emptied_leaves_and_an_undecodable_one_stays(tmp_path: Path, build: Any) -> None:
    folder = write(tmp_path / "a", one=TEXT, two=TEXT + "Two.", three=TEXT + "Three.")
    build(folder)
    (folder / "one.md").write_text("  \n")
    (folder / "two.md").write_bytes(b"\xff\xfe\x00")
    report = build(folder)
    assert {s.source for s in report.skipped} == {"one.md", "two.md"}
    assert sources(tmp_path) == ["three.md", "two.md"]


def test_an_interrupt_while_publishing_commits_no_row_without_its_kv(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, calls = PackWriter._publish, []

    def interrupted(self: PackWriter, folder: Path) -> str:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return publish(self, folder)

    monkeypatch.setattr(PackWriter, "_publish", interrupted)
    report = build([Document(f"{TEXT} Number {n}.", f"{n}.md") for n in range(6)], limits=Limits(segments=2))
    assert report.interrupted
    store = kvstore.open(tmp_path / "kv.zarr")
    assert store.sources() and not store.verify().problems
    kept = store.sources()
    assert all(store.read(name)[0] for name in kept)
    monkeypatch.undo()
    again = build([Document(f"{TEXT} Number {n}.", f"{n}.md") for n in range(6)])
    assert again.compiled == 6 - len(kept) and len(sources(tmp_path)) == 6


def test_generation_configs_without_cache_do_not_matter(tmp_path: Path, build: Any, bundled_model: Any, bundled_tokenizer: Any) -> None:
    build([Document(TEXT, "a.md")])
    store = kvstore.open(tmp_path / "kv.zarr", bundled_model, bundled_tokenizer)
    prompt = store.compose("a.md", "Who is the keeper of the old lantern?")
    expected = bundled_model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False)
    bundled_model.generation_config.use_cache = False
    try:
        assert torch.equal(bundled_model.generate(**prompt.inputs, max_new_tokens=5, do_sample=False), expected)
    finally:
        bundled_model.generation_config.use_cache = True


def test_a_model_changed_after_opening_is_refused(tmp_path: Path, build: Any, bundled_model: Any, bundled_tokenizer: Any) -> None:
    build([Document(TEXT, "a.md")])
    store = kvstore.open(tmp_path / "kv.zarr", bundled_model, bundled_tokenizer)
    store.compose("a.md", "Who?")
    weight = bundled_model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        before = weight.clone()
        weight.mul_(3)
        with pytest.raises(IncompatibleError, match="changed"):
            store.compose("a.md", "Who?")
        weight.copy_(before)
    kvstore.open(tmp_path / "kv.zarr", bundled_model, bundled_tokenizer).compose("a.md", "Who?")


def test_unmerged_adapters_are_refused(tmp_path: Path, bundled_model: Any, bundled_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled_model, "peft_config", {"a": object()}, raising=False)
    with pytest.raises(IncompatibleError, match="adapters"):
        kvstore.build([TEXT], tmp_path / "s", bundled_model, bundled_tokenizer)


def test_a_document_stored_alone_only_is_not_loaded_as_a_prefix(tmp_path: Path, build: Any, bundled_model: Any, bundled_tokenizer: Any) -> None:
    build([Document(TEXT, "a.md")], regime="isolated", system="Answer from the text.")
    store = kvstore.open(tmp_path / "kv.zarr", bundled_model, bundled_tokenizer)
    with pytest.raises(NotFoundError, match="alone"):
        store.load("a.md")
    assert store.compose("a.md", "Who?", reuse="blocks").receipt.documents[1].action == "moved"


def test_a_store_is_found_again_after_the_process_changes_its_folder(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build([Document(TEXT, "a.md")])
    monkeypatch.chdir(tmp_path)
    store = kvstore.open("kv.zarr")
    monkeypatch.chdir("/")
    assert store.read("a.md")[0]


@pytest.mark.parametrize("options", [{"reserve": -1}, {"long": "chop"}, {"regime": "none"}, {"passage_tokens": 3}, {"dtype": "float32"}])
def test_odd_options_are_refused(build: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        build([Document(TEXT, "a.md")], **options)


@pytest.mark.parametrize("documents", [42, b"text", Path("a.md")])
def test_odd_documents_are_refused(tmp_path: Path, build: Any, bundled_model: Any, bundled_tokenizer: Any, documents: Any) -> None:
    build([Document(TEXT, "a.md")])
    store = kvstore.open(tmp_path / "kv.zarr", bundled_model, bundled_tokenizer)
    with pytest.raises(InputError, match="not a document"):
        store.compose(documents, "Who?")
    with pytest.raises(InputError, match="query"):
        store.compose("a.md", None)  # type: ignore[arg-type]
    assert store.compose(Document(TEXT, "b.md"), "Who?").receipt.documents[1].action == "reused"
    assert store.compose({"text": TEXT}, "Who?").receipt.documents[1].action == "reused"


def test_names_are_found_in_either_unicode_form(tmp_path: Path, build: Any) -> None:
    build([Document(TEXT, "Caf\u00e9.md")])
    store = kvstore.open(tmp_path / "kv.zarr")
    assert "Cafe\u0301.md" in store and store.read("Cafe\u0301.md")[0]
    assert "Caf\u00e9.md#7" not in store and "a.md#\u00b2" not in store
    with pytest.raises(InputError, match="Unicode"):
        store.read("\ud800")
