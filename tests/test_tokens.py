"""Text never yields a control token, and a text has the same ids wherever it stands in a prompt."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvstore.errors import InputError
from kvstore.tokens import TextEncoder
from tests.small_tokenizers import ALL, TEXTS, gpt2, llama2, unigram

families = pytest.mark.parametrize("name", ALL)


@cache
def encoder(name: str) -> TextEncoder:
    return TextEncoder(ALL[name]())


def literals(tokenizer: Any) -> list[str]:
    """Every added token that is not white space."""
    return [t for t in tokenizer.get_added_vocab() if t.strip() and t.strip("▁")]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@families
def test_no_control_token_from_text(name: str) -> None:
    tokenizer = ALL[name]()
    forbidden = {tokenizer.convert_tokens_to_ids(t) for t in literals(tokenizer)} - {tokenizer.unk_token_id}
    assert len(forbidden) >= 2 and forbidden <= encoder(name).control_ids
    for literal in literals(tokenizer):
        forms = [
            literal,
            literal * 3,
            f"a{literal}b",
            f" {literal} ",
            f"word {literal}\n",
            f"\n\n{literal}",
            f"{literal[:-1]}{literal}{literal[-1]}",
        ]
        for ids, form in zip(encoder(name).texts(forms), forms, strict=True):
            assert not forbidden & set(ids), form
            assert encoder(name).text(form) == ids
            if tokenizer.unk_token_id not in ids or literal == tokenizer.unk_token:
                assert decoded(tokenizer, ids).strip() == form.strip()


@families
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_control_token_from_any_mixture(name: str, data: st.DataObject) -> None:
    parts = st.sampled_from([*literals(ALL[name]()), "<", "|", ">", "s", " ", "\n", "▁", "im_start", "[", "INST]", "é", "word"]) | st.text(max_size=4)
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    assert encoder(name).control_ids.isdisjoint(encoder(name).text(text))


@families
def test_ordinary_text_has_the_tokenizers_own_ids(name: str) -> None:
    """In the middle of a prompt: after a newline, where SentencePiece adds no space of its own."""
    lead = encoder(name).whole("x\n")
    for text in TEXTS[60:70]:
        prose = text.replace("*", "")  # equal pieces in a row are ties that a Unigram breaks by rounding
        assert lead + encoder(name).text(prose) == encoder(name).whole("x\n" + prose)


@families
def test_markup_equals_the_full_tokenizer(name: str) -> None:
    tokenizer = ALL[name]()
    controls = [c for c in literals(tokenizer) if c != tokenizer.unk_token]
    for text in (
        "".join(controls),
        "\n".join(controls),
        f"{controls[0]}system\nBe brief. {controls[1]} \n{controls[0]}user\n",
    ):
        assert encoder(name).markup(text, start=True) == tokenizer.encode(text, add_special_tokens=False)


@families
def test_digest_is_of_what_decides_ids(name: str, tmp_path: Path) -> None:
    tokenizer = ALL[name]()
    tokenizer.save_pretrained(tmp_path / "a")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert encoder(name).digest == TextEncoder(loaded).digest == TextEncoder(again).digest
    again.backend_tokenizer.enable_truncation(5)
    again.backend_tokenizer.enable_padding(length=9)
    again.backend_tokenizer.encode_special_tokens = True
    changed = TextEncoder(again)
    assert changed.digest == encoder(name).digest
    assert changed.text(TEXTS[0]) == encoder(name).text(TEXTS[0])
    again.add_tokens(["<another>"])
    assert TextEncoder(again).digest != encoder(name).digest


def test_digests_differ_between_tokenizers() -> None:
    assert len({encoder(name).digest for name in ALL}) == len(ALL)


def test_added_white_space_keeps_its_id() -> None:
    tokenizer = ALL["chatml"]()
    spaces = tokenizer.convert_tokens_to_ids("        ")
    assert spaces in encoder("chatml").text("a        b") and spaces > len(tokenizer) - 3


def test_a_control_token_that_the_vocabulary_itself_spells_is_broken_apart() -> None:
    bos = unigram().convert_tokens_to_ids("<s>")
    assert bos in [t.id for t in unigram().backend_tokenizer.model.tokenize("a<s>b")]
    assert bos not in encoder("unigram").text("<s>") and len(encoder("unigram").text("<s>")) > 1


def test_merges_that_lead_to_a_control_token_are_not_taken() -> None:
    state = json.loads(llama2().backend_tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    vocab["<q"], vocab["<q>"], vocab["<q>x"] = (len(vocab) + n for n in range(3))
    merges += [["<", "q"], ["<q", ">"], ["<q>", "x"]]
    state["added_tokens"].append({**state["added_tokens"][-1], "id": vocab["<q>"], "content": "<q>"})
    found = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))))
    assert found.text("<q>x") == [vocab["<q"], vocab[">"], vocab["x"]]
    assert found.markup("<q>") == [vocab["<q>"]]


def test_unknown_characters_are_no_control_tokens_and_padding_with_a_letter_is_none() -> None:
    assert encoder("unigram").text("☃") and unigram().unk_token_id in encoder("unigram").text("☃")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2().backend_tokenizer, bos_token="<|endoftext|>", pad_token="!")
    assert TextEncoder(tokenizer).text("Stop!") == encoder("gpt2").text("Stop!")


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="tokenizer refuses"):
        encoder("gpt2").text("\ud800")


class SlowTokenizer:
    """Written in Python: characters, with a space of its own in front as SentencePiece puts it."""

    bos_token_id, eos_token_id, unk_token_id, bos_token = 1, 2, 0, "<s>"
    added_tokens_decoder: ClassVar = {0: "<unk>", 1: "<s>", 2: "</s>"}

    def get_vocab(self) -> dict[str, int]:
        return {t: i for i, t in self.added_tokens_decoder.items()} | {chr(c): c for c in range(9, 400)}

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in " " + text] if split_special_tokens else [1]


def test_slow_tokenizers() -> None:
    found = TextEncoder(SlowTokenizer())
    assert found.text("<s>ab") == list(map(ord, "<s>ab"))
    assert found.markup("<s>ab", start=True) == [1, *map(ord, " ab")]
    assert len(found.digest) == 64 and not found.separates
