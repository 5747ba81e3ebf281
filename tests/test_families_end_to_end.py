"""The kinds of models beyond plain attention through the front door: built, opened, asked, moved, batched, verified, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_models import one_thread  # noqa: F401  (a fixture for every test here)

import kvstore
from kvstore.calibration import learn
from kvstore.decode import Decoder, Piece, allocate
from kvstore.errors import IncompatibleError, InputError
from kvstore.export import export
from kvstore.models import ModelSource
from kvstore.pack import Pack
from kvstore.relogits import relogits
from tests.small_tokenizers import gpt2

NAMES = ("mistral-window", "deepseek_v2", "phi3-longrope")
WORDS = "river stone letter harbour index copper winter ledger needle garden".split()


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (3 + seed)) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return gpt2()


def made(name: str, tokenizer: Any) -> Any:
    """A tiny model whose vocabulary is the tokenizer's."""
    kind, fields = tiny.FAMILIES[name]
    size = {"vocab_size": len(tokenizer), "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    layered = {"vocab_size_per_layer_input": len(tokenizer)} if "vocab_size_per_layer_input" in fields else {}
    return tiny.make(kind, {**fields, **size, **layered})


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> kvstore.OpenStore:
    model, path = made(request.param, tokenizer), tmp_path_factory.mktemp("families") / "kv.zarr"
    documents = [kvstore.Document(text(i, 12 + 3 * i), f"{i}.md") for i in range(3)]
    kvstore.build(documents, path, model, tokenizer, codec="raw", regime="both", reserve=16, certify="none")
    return kvstore.open(path, model, tokenizer)


def generated(model: Any, inputs: dict[str, Any]) -> list[list[int]]:
    found = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return found[:, -5:].tolist()


def plainly(model: Any, prompt: Any) -> list[list[int]]:
    return generated(model, {"input_ids": prompt.input_ids, "attention_mask": torch.ones_like(prompt.input_ids)})


def test_answers_are_those_of_a_full_prefill(opened: kvstore.OpenStore) -> None:
    """Documents longer than the window, and a question after them; generation goes past the window's end too."""
    prompts = [opened.compose(documents=[f"{i}.md"], query=text(5, 2 + 3 * i)) for i in range(2)]
    expected = [plainly(opened.model, p) for p in prompts]
    for prompt, wanted in zip(prompts, expected, strict=True):
        assert prompt.receipt.documents[1].action == "reused" and prompt.receipt.cached_tokens > tiny.WINDOW
        assert generated(opened.model, prompt.inputs) == wanted
        assert generated(opened.model, prompt.static(max_new_tokens=5)) == wanted
    assert [[row] for row in generated(opened.model, kvstore.collate(prompts))] == expected


def test_a_document_alone_moves_to_its_place(opened: kvstore.OpenStore) -> None:
    two = opened.compose(documents=["0.md", "2.md"], query="which letter", reuse="blocks")
    assert [d.action for d in two.receipt.documents[1:]] == ["reused", "moved"]
    assert len(generated(opened.model, two.inputs)[0]) == 5


def test_what_is_stored_is_what_the_model_computes(opened: kvstore.OpenStore) -> None:
    report = relogits(opened, segments=1)
    assert report.problems == [] and len(report.checks) == 1
    rounded = opened.model.config.model_type == "deepseek_v2"  # products of complex numbers round otherwise, in float32
    assert all(c.kl < 1e-6 and (c.equal or rounded) for c in report.checks)


def test_an_exported_file_holds_the_models_own_shapes(opened: kvstore.OpenStore, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    layout = opened["1.md"].layout
    tensors = load_file(export(opened, "1.md", tmp_path / "x.safetensors").path)
    tokens = len(tensors["token_ids"])
    assert len(tensors) == 2 * layout.layers + 1
    assert {t.shape for n, t in tensors.items() if n.endswith(".keys")} == {(1, layout.kv_heads, tokens, layout.widths[0])}
    assert {t.shape for n, t in tensors.items() if n.endswith(".values")} == {(1, layout.kv_heads, tokens, layout.widths[1])}


def test_prompts_beyond_the_regime_are_refused_by_name(opened: kvstore.OpenStore) -> None:
    stored = opened["2.md"].stored[0]
    limit = stored.pack.layout.rope_limit
    assert limit == (128 if opened.model.config.model_type == "phi3" else None)
    if limit is None:
        return
    assert ModelSource(opened.model, opened.source.tokenizer).context_tokens == limit
    with pytest.raises(InputError, match=r"takes \d+ tokens, and what is stored in the RoPE regime 'short' holds below .* frequencies at 128"):
        opened.compose(documents=[f"{i}.md" for i in range(3)], query=text(1, 90))
    with pytest.raises(IncompatibleError, match="those stored hold for prompts of up to 128 tokens"):
        Decoder().decode(Piece(stored, "raw", 10, 0, 119), allocate(stored.pack.layout, 10))


def test_keys_of_the_regime_are_not_those_of_another(opened: kvstore.OpenStore) -> None:
    """The regime enters the segment keys: what a later version stores of other frequencies is never taken for these."""
    from kvstore.identity import Context, segment_key
    from kvstore.manifest import Layout

    model, layout = opened.source.identity, opened["0.md"].layout
    fields = {f: getattr(layout, f) for f in layout.__struct_fields__ if f not in ("rope_regime", "rope_limit")}
    static, own = (segment_key(model, x, Context.root(), [1, 2]) for x in (Layout(**fields), layout))
    assert (static == own) == (layout.rope_regime == "static")


@pytest.mark.parametrize(("name", "why"), [("mistral-window", "uses sliding_window"), ("deepseek_v2", "cannot be observed head by head")])
def test_policies_that_look_at_attention_are_refused_by_name(name: str, why: str, tokenizer: Any, tmp_path: Path) -> None:
    documents = [kvstore.Document(text(1, 60), "1.md")]
    with pytest.raises(IncompatibleError, match=why):
        kvstore.build(
            documents, tmp_path / "kv.zarr", made(name, tokenizer), tokenizer, codec="scalar", policy="h2o:rest=drop", reserve=16, certify="none"
        )


def test_latents_are_calibrated_and_coded(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transform codec over folded latents: gradients reach them through the rotation, and finer tiers are nearer."""
    monkeypatch.setattr(learn, "LEAST", 256)
    monkeypatch.setattr(learn, "PER_DIMENSION", 2)
    model = made("deepseek_v3", tokenizer)
    documents = [kvstore.Document(text(i, 90), f"{i}.md") for i in range(4)]
    choices: dict[str, Any] = {"target_kl": 2e-3, "lossless": True}
    kvstore.build(documents, tmp_path / "kv.zarr", model, tokenizer, reserve=16, certify="none", **choices)
    opened = kvstore.open(tmp_path / "kv.zarr", model, tokenizer)
    (record,) = opened.models()
    assert record.layout.latent == (24, 8)
    checks = {c.tier: c for c in relogits(opened, segments=1).checks}
    assert list(checks) == ["draft", "standard", "fine", "lossless"]
    assert checks["draft"].kl > checks["fine"].kl > checks["lossless"].kl == 0.0 and checks["lossless"].equal
    assert isinstance(opened["1.md"].stored[0].pack, Pack)
