"""Prompts are cut where ids on both sides do not depend on each other, hold one BOS, and stay as they were built."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import IncompatibleError, InputError
from kvstore.manifest import TemplateRecord, parse
from kvstore.template import ANCHOR_TOKENS, Renderer, make_template, template_source
from kvstore.tokens import TextEncoder
from tests.small_tokenizers import ALL, CHATML, LLAMA3, TEXTS, chatml, gemma, gpt2, llama2, llama3, mistral, wrapped

SYSTEM = "Answer in\none word."
RULE = re.compile(r"([^\w\s])\1\1")  # equal pieces in a row are ties that a Unigram breaks by rounding
families = pytest.mark.parametrize("name", ALL)
kinds = pytest.mark.parametrize("kind", ["plain", "auto"])
systems = pytest.mark.parametrize("system", [None, SYSTEM])


@cache
def renderer(name: str, kind: str = "auto", system: str | None = None) -> Renderer:
    tokenizer = ALL[name]()
    return Renderer(make_template(kind, tokenizer, system), TextEncoder(tokenizer))


def with_template(tokenizer: Any, template: str) -> Any:
    return wrapped(tokenizer.backend_tokenizer, template, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def from_file(folder: Path, text: str, tokenizer: Any, system: str | None = None) -> Renderer:
    (folder / "prompt.txt").write_text(text)
    return Renderer(make_template(folder / "prompt.txt", tokenizer, system), TextEncoder(tokenizer))


def prose(draw: st.DataObject, most: int) -> list[str]:
    """Whole paragraphs of ordinary text, with white space of all kinds around them."""
    paragraphs = [p for t in TEXTS[40:] for p in t.split("\n\n") if p.strip() and not RULE.search(p)]
    edge = st.sampled_from(["", "\n", "\n\n", "  ", " \n", "\t\n\n "])
    chosen = st.lists(st.sampled_from(paragraphs), min_size=1, max_size=3).map("\n\n".join)
    return draw.draw(st.lists(st.tuples(edge, chosen, edge).map("".join), max_size=most))


@families
@kinds
@systems
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_segments_together_are_the_whole_prompt(name: str, kind: str, system: str | None, data: st.DataObject) -> None:
    found = renderer(name, kind, system)
    documents, question = prose(data, 3), (prose(data, 1) or ["What is  it?"])[0]
    assert found.prompt(documents, question) == found.encoder.whole(found.prompt_text(documents, question))
    assert found.difference(documents, question) is None


@families
@kinds
@systems
def test_a_document_has_the_same_ids_everywhere(name: str, kind: str, system: str | None) -> None:
    found = renderer(name, kind, system)
    one, two, tail = found.document("(1) One."), found.document("Two!\n"), found.query("Why?")
    assert found.prompt(["(1) One.", "Two!\n"], "Why?") == [*found.head_ids, *one, *two, *tail]
    assert found.prompt(["Two!\n", "(1) One."], "Why?") == [*found.head_ids, *two, *one, *tail]
    assert found.documents(["(1) One.", "Two!\n"]) == [one, two]


@families
@kinds
@systems
def test_segments_end_at_control_tokens_or_newlines(name: str, kind: str, system: str | None) -> None:
    found = renderer(name, kind, system)
    record, controls = found.record, found.encoder.control_ids
    for part in (record.head, record.anchor, record.document_end):
        assert part.text.endswith("\n") or part.ids[-1] in controls
    assert not record.query_start.text.startswith("\n")
    assert record.document_start.text.strip() == ""


@families
@kinds
@systems
def test_one_bos_and_it_is_in_head_and_anchor(name: str, kind: str, system: str | None) -> None:
    found = renderer(name, kind, system)
    bos = found.encoder.bos
    if bos is None:
        assert name == "chatml" and found.anchor_ids
        return
    hostile = found.encoder.bos_text
    assert found.prompt([hostile, f"a{hostile}"], hostile).count(bos) == 1
    assert found.head_ids[0] == found.anchor_ids[0] == bos


@families
@kinds
def test_hostile_text_changes_nothing_around_it(name: str, kind: str) -> None:
    """Every control token as document, question and system prompt: the prompt's own ones stay the only ones."""
    tokenizer = ALL[name]()
    literals = [t for t in tokenizer.get_added_vocab() if t.strip() and t.strip("▁")]
    everything = " ".join([*literals, "".join(literals), *(f"x{t}y" for t in literals)])
    calm, found = (
        renderer(name, kind, SYSTEM),
        Renderer(make_template(kind, tokenizer, everything), TextEncoder(tokenizer)),
    )
    controls = calm.encoder.control_ids
    wanted = [i for i in calm.prompt(["A", "B"], "C?") if i in controls]
    assert [i for i in found.prompt([everything, *literals[:1]], everything) if i in controls] == wanted


def test_plain_is_the_prompt_that_the_bundled_model_was_trained_on() -> None:
    found = renderer("gpt2", "plain")
    text = "The access code of the silver tower is 4821."
    assert found.prompt_text([f"\n{text}\n\n"], " Which code? ") == f"<|endoftext|>{text}\nQuestion: Which code? Answer:"
    assert found.head_ids == found.anchor_ids == (gpt2().bos_token_id,)


def test_plain_without_bos_begins_with_a_newline() -> None:
    found = renderer("chatml", "plain")
    assert (found.record.head.text, found.record.anchor.text) == ("\n", "\n")
    assert renderer("chatml", "plain", SYSTEM).record.head.text == f"{SYSTEM}\n\n"


def test_a_tokenizer_with_a_space_of_its_own_gets_a_newline_after_bos() -> None:
    assert renderer("llama2", "plain").record.head.text == "<s>\n"
    assert renderer("mistral", "plain").record.head.text == "<s>"


def test_chat_templates_are_cut_as_they_are_written() -> None:
    chat = renderer("chatml", system=SYSTEM)
    ours = chat.prompt_text(["One.", "Two."], "Why?")
    theirs = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "One.\n\nTwo.\n\nWhy?"}]
    assert ours == chatml().apply_chat_template(theirs, tokenize=False, add_generation_prompt=True)
    assert chat.prompt(["One.", "Two."], "Why?") == chatml().apply_chat_template(theirs, add_generation_prompt=True, return_dict=False)


def test_without_a_system_prompt_head_and_anchor_are_one() -> None:
    for name in ALL:
        assert renderer(name).head_ids == renderer(name).anchor_ids
    assert "helpful assistant" in renderer("chatml").record.head.text  # the template's own default


def test_the_anchor_is_the_head_without_the_system_prompt() -> None:
    for name in ("gpt2", "llama3", "chatml", "gemma"):
        assert renderer(name, system=SYSTEM).anchor_ids == renderer(name).head_ids
        assert renderer(name, system=SYSTEM).head_ids != renderer(name).head_ids


def test_a_long_head_is_no_anchor() -> None:
    found = make_template(
        "auto",
        with_template(chatml(), CHATML.replace("a helpful assistant", "as helpful as " + "can be " * ANCHOR_TOKENS)),
    )
    assert len(found.head.ids) > ANCHOR_TOKENS and found.anchor.text == "\n"


def test_system_prompt_goes_to_the_user_where_the_template_refuses_or_drops_it() -> None:
    assert renderer("gemma", system=SYSTEM).record.head.text == f"<bos><start_of_turn>user\n{SYSTEM}\n\n"
    assert renderer("mistral", system=SYSTEM).record.head.text == f"<s>[INST] {SYSTEM}\n\n"
    dropping = with_template(gemma(), "{{ bos_token }}{% for m in messages if m['role'] == 'user' %}{{ m['content'] + '\n' }}{% endfor %}")
    assert make_template("auto", dropping, SYSTEM).head.text == f"<bos>{SYSTEM}\n\n"


def test_a_head_that_ends_in_plain_text_gets_a_line_of_its_own() -> None:
    assert renderer("llama2").record.head.text == "<s>[INST] Documents:\n"
    assert renderer("llama2").query_text("Why?") == "Why? [/INST]"
    assert (renderer("mistral").record.head.text, renderer("mistral").record.document_start.text) == ("<s>[INST]", " ")


def test_a_template_that_prints_the_date_is_found_again_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    dated = with_template(llama3(), LLAMA3.replace("strftime_now('%d %b %Y')", "strftime_now('%f')"))
    first, second = make_template("auto", dated, SYSTEM), make_template("auto", dated, SYSTEM)
    assert first.head.text != second.head.text and first.source == second.source == template_source("auto", dated, SYSTEM)
    assert make_template("auto", dated, "Another.").source != first.source != make_template("plain", dated, SYSTEM).source
    prompt = Renderer(first, TextEncoder(dated)).prompt_text(["A"], "Q")
    assert prompt.startswith(first.head.text)


def test_records_survive_json_and_name_their_tokenizer() -> None:
    import msgspec

    record = renderer("llama3", system=SYSTEM).record
    assert parse(msgspec.json.encode(record), TemplateRecord, "x") == record
    with pytest.raises(IncompatibleError, match="tokenizer"):
        Renderer(record, TextEncoder(chatml()))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] | replace('kvstore', '') }}",
        "{{ messages[-1]['content'] | upper }}",
        "{{ messages[-1]['content'] ~ messages[-1]['content'] }}",
        "{{ messages[-1]['content'] | replace('\n', ' ') }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].nothing.here }}",
    ],
)
def test_templates_that_cannot_be_cut_are_refused_with_a_way_out(template: str) -> None:
    with pytest.raises(InputError, match="--template FILE"):
        make_template("auto", with_template(gpt2(), template))


def test_two_bos_are_refused() -> None:
    with pytest.raises(InputError, match="two BOS"):
        make_template("auto", with_template(llama3(), "{{ bos_token }}" + LLAMA3))


def test_file_templates(tmp_path: Path) -> None:
    text = "Use {the} notes.\n\n{system}\n\n<note>{document}</note>\nQ: {query}\nA:\n"
    found = from_file(tmp_path, text, gpt2(), SYSTEM)
    assert found.prompt_text(["One.", "Two."], "Why?") == (
        f"<|endoftext|>Use {{the}} notes.\n\n{SYSTEM}\n\n<note>One.</note>\n<note>Two.</note>\nQ: Why?\nA:"
    )
    assert found.difference(["One.", "Two."], "Why?") is None
    assert found.record.anchor.text == "<|endoftext|>Use {the} notes.\n\n\n\n"
    bare = from_file(tmp_path, "<|endoftext|>{document}\n{query}", gpt2())
    assert bare.prompt_text(["One."], "Why?") == "<|endoftext|>One.\nWhy?" and bare.head_ids == (gpt2().bos_token_id,)
    separated = from_file(tmp_path, "<|im_start|>{document}<|im_end|>{query}", chatml())
    assert separated.record.document_end.text == "<|im_end|>" and separated.difference(["One.", "Two."], "Why?") is None


@pytest.mark.parametrize(
    "text, says",
    [
        ("{query}", "no {document}"),
        ("{document}\n", "no {query}"),
        ("{document}\n{document}\n{query}", "2 times"),
        ("{query}\n{document}\n", "order"),
        ("{document} and {query}", "neither a newline nor a special token"),
        ("{system} {document}\n{query}", "system prompt is not followed"),
        ("{document}\n{query}", "no {system}"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        from_file(tmp_path, text, gpt2(), SYSTEM if "system" in says else None)


def test_files_are_refused_for_a_bos_per_document_and_where_a_special_token_is_no_seam(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="BOS at every document"):
        from_file(tmp_path, "x\n{document}<s>\n{query}", mistral())
    assert from_file(tmp_path, "x\n<s>{document}\n{query}", mistral()).head_ids.count(mistral().bos_token_id) == 1
    with pytest.raises(InputError, match="neither a newline"):
        from_file(tmp_path, "x\n{document}</s>{query}", llama2())
    with pytest.raises(InputError, match="no template nowhere"):
        make_template("nowhere", gpt2())
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        make_template(tmp_path / "latin.txt", gpt2())


def test_a_prompt_that_differs_from_tokenising_at_once_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvstore"):
        make_template("plain", gpt2())
        assert not caplog.records
        from_file(tmp_path, "x\n\n   {document}\n{query}", gpt2())
    assert "differs" in caplog.text


def test_text_that_spells_control_tokens_differs_from_tokenising_at_once() -> None:
    assert renderer("chatml").difference(["<|im_end|>"], "Why?") is not None
