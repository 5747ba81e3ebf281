"""Dialogues over stored documents: later turns, hot documents, streams, threads and forks."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import DynamicCache

import kvstore
from kvstore import Document, answering
from kvstore.errors import IncompatibleError, InputError
from kvstore.hot import Recent
from kvstore.snapshot import Change
from kvstore.store import Store
from kvstore.template import Renderer, make_template
from kvstore.tokens import TextEncoder
from kvstore.turns import Turns
from tests.small_tokenizers import chatml, gemma, llama2, llama3, mistral, wrapped

TEXTS = {
    "tower.md": "The silver tower stands at the end of the harbour road. The access code of the silver tower is 4821. Nobody lives there.",
    "lantern.md": "An old lantern hangs by the door of the inn. The keeper of the old lantern is Mercer. He lights it when the fog comes in.",
}
QUERY, NEXT = "What is the access code of the silver tower?", "And who is the keeper of the old lantern?"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    from kvstore.models import ModelSource

    return ModelSource(None, dtype="float32").model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any, bundled_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("turns") / "kv.zarr"
    documents = [Document(text, name) for name, text in TEXTS.items()]
    kvstore.build(documents, path, model, bundled_tokenizer, regime="both", codec="scalar", lossless=True)
    return path


@pytest.fixture(scope="module")
def store(folder: Path, model: Any, bundled_tokenizer: Any) -> kvstore.OpenStore:
    return kvstore.open(folder, model, bundled_tokenizer)


def logits(model: Any, prompt: kvstore.Prompt) -> torch.Tensor:
    inputs, cached = prompt.inputs, prompt.receipt.cached_tokens
    with torch.inference_mode():
        return model(inputs["input_ids"][:, cached:], past_key_values=inputs["past_key_values"], use_cache=True).logits[0, -1]


def live_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits[0, -1]


def test_messages_are_the_dialogue_that_the_chat_template_writes() -> None:
    for make in (chatml, llama3, llama2, mistral, gemma):
        tokenizer = make()
        renderer = Renderer(make_template("auto", tokenizer), TextEncoder(tokenizer))
        said = [("user", "Why?"), ("assistant", "Because\nof it."), ("user", "Since  when?")]
        tail = Turns(renderer).tail([{"role": r, "content": c} for r, c in said])
        first = [{"role": "user", "content": renderer.document_text("One.").removeprefix(renderer.record.document_start.text) + "Why?"}]
        text = tokenizer.apply_chat_template([*first, *({"role": r, "content": c} for r, c in said[1:])], tokenize=False, add_generation_prompt=True)
        whole = renderer.encoder.whole(text)
        assert whole[-len(tail) :] == tail, make.__name__


def test_single_messages_are_questions(store: kvstore.OpenStore) -> None:
    asked = store.compose(["tower.md"], QUERY)
    said = store.compose(["tower.md"], messages=[{"role": "user", "content": f" {QUERY}\n"}])
    assert torch.equal(asked.input_ids, said.input_ids)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "Yes."}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": " \n"}],
        [{"role": "user"}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "tool", "content": "a"}],
        ["a"],
        [{"role": "system", "content": "Another one."}, {"role": "user", "content": "a"}],
    ],
)
def test_other_messages_are_refused(store: kvstore.OpenStore, messages: list[Any]) -> None:
    with pytest.raises(InputError):
        store.compose(["tower.md"], messages=messages)


def test_a_query_and_messages_are_one_too_many(store: kvstore.OpenStore) -> None:
    with pytest.raises(InputError, match="both"):
        store.compose(["tower.md"], QUERY, messages=[{"role": "user", "content": QUERY}])


def test_control_tokens_in_an_answer_stay_text() -> None:
    tokenizer = chatml()
    renderer = Renderer(make_template("auto", tokenizer), TextEncoder(tokenizer))

    def said(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}, {"role": "user", "content": "c"}]

    plain = Turns(renderer).tail(said("b"))
    spelt = Turns(renderer).tail(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>"}, {"role": "user", "content": "c"}]
    )
    controls = renderer.encoder.control_ids
    assert [i for i in plain if i in controls] == [i for i in spelt if i in controls]


def test_templates_without_turns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("{document}\n{query}")
    tokenizer = chatml()
    filed = Turns(Renderer(make_template(tmp_path / "prompt.txt", tokenizer), TextEncoder(tokenizer)))
    assert filed.tail([{"role": "user", "content": "a"}])
    with pytest.raises(InputError, match="second turn"):
        filed.next([], "b")
    chat = Renderer(make_template("auto", tokenizer), TextEncoder(wrapped(tokenizer.backend_tokenizer, CHAT, eos_token=tokenizer.eos_token)))
    with pytest.raises(IncompatibleError, match="chat template"):
        Turns(chat).next([], "b")


@pytest.mark.parametrize("whole", [True, False])
def test_a_following_turn_equals_the_whole_dialogue(store: kvstore.OpenStore, model: Any, whole: bool) -> None:
    first = store.compose(["tower.md"], QUERY)
    output = model.generate(**first.inputs, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=whole)
    second = first.follow(output, NEXT)
    ids = (output.sequences if whole else output)[0]
    assert second.input_ids[0, : first.input_ids.shape[1]].tolist() == first.input_ids[0].tolist()
    answer, tail = Turns(store.view.renderer).next(ids[first.input_ids.shape[1] :].tolist(), NEXT)
    assert second.input_ids[0, first.input_ids.shape[1] :].tolist() == answer + tail
    held = second.receipt.cached_tokens
    assert held > first.input_ids.shape[1] if whole else held == first.receipt.cached_tokens
    torch.testing.assert_close(logits(model, second), live_logits(model, second.input_ids), rtol=1e-3, atol=1e-3)
    third = second.follow(model.generate(**second.inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=whole), QUERY)
    torch.testing.assert_close(logits(model, third), live_logits(model, third.input_ids), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model, first), live_logits(model, first.input_ids), rtol=1e-3, atol=1e-3)  # untouched by what followed


def test_the_output_of_another_prompt_is_refused(store: kvstore.OpenStore, model: Any) -> None:
    first, other = store.compose(["tower.md"], QUERY), store.compose(["lantern.md"], NEXT)
    for output in (other.input_ids, first.input_ids[:, :-1], first.input_ids.expand(2, -1), None):
        with pytest.raises(InputError):
            first.follow(output, NEXT)
    with pytest.raises(InputError):
        first.follow(first.input_ids, " ")
    with pytest.raises(InputError, match="takes"):
        first.follow(first.input_ids, "and then " * 3000)


def test_assisted_decoding_is_refused(store: kvstore.OpenStore, model: Any) -> None:
    """transformers would feed all ids again although the cache holds them, and the answer would be another."""
    prompt = store.compose(["tower.md"], QUERY)
    with pytest.raises(InputError, match="assisted"):
        model.generate(**prompt.inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=2)


def test_a_cache_of_more_rows_than_tokens_is_not_taken_over(store: kvstore.OpenStore, model: Any) -> None:
    first = store.compose(["tower.md"], QUERY)
    output = model.generate(**first.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    output.past_key_values.layers[0].keys = torch.cat([output.past_key_values.layers[0].keys] * 2, 2)
    second = first.follow(output, NEXT)
    assert second.receipt.cached_tokens == first.receipt.cached_tokens
    torch.testing.assert_close(logits(model, second), live_logits(model, second.input_ids), rtol=1e-3, atol=1e-3)


def test_threads_may_refresh_while_others_compose(folder: Path, model: Any, bundled_tokenizer: Any, tmp_path: Path) -> None:
    """They share one connection to the index: without turns a reader sees a table that another one is filling."""
    path = tmp_path / "kv.zarr"
    shutil.copytree(folder, path)
    shared, other, done = kvstore.open(path, model, bundled_tokenizer), Store(path), threading.Event()

    def commit() -> None:
        (row, *_) = other.rows()
        for number in range(30):
            other.commit(Change((msgspec.structs.replace(row, metadata={"n": number}),)), "test")
        done.set()

    def refresh() -> None:
        while not done.is_set():
            shared.refresh()

    def look() -> int:
        found = 0
        while not done.is_set():
            found += len(shared.rows("tower.md")) == 1 and "lantern.md" in shared
        return found

    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(work) for work in (refresh, refresh, look, look, commit)]
        assert all(r.exception() is None for r in running) and min(running[2].result(), running[3].result()) > 0
    assert shared.number == other.number


def test_an_answer_in_a_stream_is_the_answer(store: kvstore.OpenStore) -> None:
    prompt = store.compose(["tower.md"], QUERY)
    assert "".join(answering.stream(store, prompt, 12)) == answering.answer(store, prompt, 12)
    pieces = answering.stream(store, prompt, 2000)
    next(pieces)
    pieces.close()  # the model stops instead of writing 2,000 tokens
    with pytest.raises(ValueError):
        list(answering.stream(store, prompt, 4, num_beams=3))


def test_hot_documents_give_the_same_bits(folder: Path, model: Any, bundled_tokenizer: Any, store: kvstore.OpenStore) -> None:
    hot = kvstore.open(folder, model, bundled_tokenizer, host_cache=64 << 20, device_cache=64 << 20)
    for documents, reuse in (["tower.md"], "prefix"), (["tower.md", "lantern.md"], "blocks"), (["lantern.md", "tower.md"], "blocks"):
        for tier in ("standard", "lossless"):
            cold = store.compose(documents, QUERY, reuse=reuse, tier=tier)
            for _ in range(2):
                again = hot.compose(documents, QUERY, reuse=reuse, tier=tier)
                assert all(torch.equal(a, b) for x, y in zip(cold.layers, again.layers, strict=True) for a, b in zip(x, y, strict=True))
    first, second = (hot.compose(["tower.md"], q, tier="lossless") for q in (QUERY, NEXT))
    assert first.layers[0][0].data_ptr() == second.layers[0][0].data_ptr()  # shared, not copied
    model.generate(**first.inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(logits(model, second), live_logits(model, second.input_ids), rtol=1e-3, atol=1e-3)


def test_the_oldest_goes_first() -> None:
    kept: Recent[bytes] = Recent(10, len)
    for name in "abc":
        kept.put(name, bytes(4))
    assert kept.get("a") is None and kept.get("b") == bytes(4) and kept.nbytes == 8
    kept.put("d", bytes(4))
    assert kept.get("c") is None and kept.get("b") is not None
    kept.put("e", bytes(11))
    assert kept.get("e") is None and len(kept) == 2
    kept.put("b", bytes(1))
    assert kept.nbytes == 5
    with pytest.raises(InputError):
        Recent(-1, len)


def test_many_threads_compose_the_same(folder: Path, model: Any, bundled_tokenizer: Any, store: kvstore.OpenStore) -> None:
    hot = kvstore.open(folder, model, bundled_tokenizer, host_cache=40_000, device_cache=100_000)  # too small for all: things come and go
    jobs = [([a], tier) for a in TEXTS for tier in ("standard", "fine", "lossless")] * 4
    wanted = {(a[0], tier): logits(model, store.compose(a, QUERY, tier=tier)) for a, tier in jobs[:6]}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: logits(model, hot.compose(job[0], QUERY, tier=job[1])), jobs))
    assert all(torch.equal(f, wanted[a[0], tier]) for f, (a, tier) in zip(found, jobs, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_composes_too(store: kvstore.OpenStore) -> None:
    """Threads do not survive a fork: the child makes its own."""
    wanted = store.compose(["tower.md"], QUERY).layers[0][0].sum().item()
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            os.write(sending, repr(store.compose(["tower.md"], QUERY).layers[0][0].sum().item()).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving) as answer:
        assert float(answer.read()) == pytest.approx(wanted, rel=1e-5)
    os.waitpid(child, 0)
