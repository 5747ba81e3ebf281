"""What every integration of a framework must do. Its test subclasses `IntegrationContract` and says how the framework is called."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import kvstore
from kvstore.answering import live_answer
from kvstore.errors import InputError
from kvstore.receipt import Receipt

# `tower` comes in two chunks of one file, as a splitter makes them; every text is stored alone and after the head.
TEXTS = [
    ("The silver tower stands at the end of the harbour road. The access code of the silver tower is 4821. Nobody lives there.", "tower.md"),
    ("An old lantern hangs by the door of the inn. The keeper of the old lantern is Mercer. He lights it when the fog comes in.", "lantern.md"),
    ("Behind the tower lies a garden with a wall of grey stone. The colour of the quiet garden is crimson in the autumn.", "tower.md"),
]
TOWER, LANTERN = "What is the access code of the silver tower?", "Who is the keeper of the old lantern?"
LENGTH: dict[str, Any] = {"max_new_tokens": 6}
Asked = tuple[str, Receipt]


class IntegrationContract:
    """`made` is the object that answers; the `ask` methods give text and receipt. The fixture `store` holds TEXTS with the tier `lossless`."""

    def document(self, text: str, file: str) -> Any:
        """As the framework's retrievers give it."""
        raise NotImplementedError

    def made(self, store: kvstore.OpenStore, **options: Any) -> Any:
        raise NotImplementedError

    def ask(self, made: Any, documents: Sequence[Any], query: str, **options: Any) -> Asked:
        raise NotImplementedError

    async def aask(self, made: Any, documents: Sequence[Any], query: str) -> Asked:
        raise NotImplementedError

    def stream(self, made: Any, documents: Sequence[Any], query: str) -> tuple[Receipt, Iterator[str]]:
        """The receipt is there before anything of the text is asked for."""
        raise NotImplementedError

    async def astream(self, made: Any, documents: Sequence[Any], query: str) -> tuple[Receipt, AsyncIterator[str]]:
        raise NotImplementedError

    def given(self, *numbers: int) -> list[Any]:
        return [self.document(*TEXTS[n]) for n in numbers]

    @pytest.mark.parametrize(("numbers", "query"), [((0,), TOWER), ((1,), LANTERN), ((1, 0), TOWER), ((2, 0, 1), TOWER)])
    def test_stored_answers_are_the_live_ones(self, store: kvstore.OpenStore, numbers: tuple[int, ...], query: str) -> None:
        text, receipt = self.ask(self.made(store, **LENGTH), self.given(*numbers), query)
        prompt = store.compose(self.given(*numbers), query)
        assert text == live_answer(store, prompt, **LENGTH)
        assert receipt.exact
        assert receipt.documents == prompt.receipt.documents
        assert [d.action for d in receipt.documents] == ["reused", "reused", "prefilled", "prefilled"][: len(numbers) + 1]

    def test_options_reach_the_store(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, reuse="blocks", tier="fine", **LENGTH)
        text, receipt = self.ask(made, self.given(0, 1), TOWER)
        assert text.startswith(" 4821.")
        assert [(d.action, d.fidelity) for d in receipt.documents[1:]] == [("reused", "fine"), ("moved", "fine")]
        assert not receipt.exact

    def test_options_of_a_call_go_first(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, tier="fine", max_new_tokens=1)
        text, receipt = self.ask(made, self.given(0), TOWER, tier="lossless", max_new_tokens=8)
        assert text.startswith(" 4821.")
        assert receipt.documents[1].fidelity == "lossless"
        assert self.ask(made, self.given(0), TOWER)[1].documents[1].fidelity == "fine"

    def test_a_chunk_is_found_by_its_text_and_called_after_its_file(self, store: kvstore.OpenStore) -> None:
        _, receipt = self.ask(self.made(store, reuse="blocks", **LENGTH), self.given(0, 2), TOWER)
        _, first, second = receipt.documents
        assert (first.source, first.action) == ("tower.md", "reused")
        assert second.action == "moved"
        assert second.source in store.sources()
        assert second.source.startswith("tower.md/text-")

    def test_a_changed_text_is_a_miss_that_is_said(self, store: kvstore.OpenStore) -> None:
        changed = self.document(TEXTS[0][0].replace("4821", "7350"), "tower.md")
        text, receipt = self.ask(self.made(store, **LENGTH), [changed], TOWER)
        assert text.startswith(" 7350.")
        assert (receipt.documents[1].action, receipt.documents[1].why) == ("prefilled", "changed since build")

    def test_an_answer_ends_before_a_stop_string(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, stop=["21."], max_new_tokens=40)
        assert self.ask(made, self.given(0), TOWER)[0] == " 48"
        assert "".join(self.stream(made, self.given(0), TOWER)[1]) == " 48"

    def test_beams_are_those_of_a_live_prompt(self, store: kvstore.OpenStore) -> None:
        prompt, tokenizer = store.compose(self.given(0), TOWER), store.source.tokenizer
        live = store.model.generate(prompt.input_ids, num_beams=3, do_sample=False, pad_token_id=tokenizer.pad_token_id, **LENGTH)
        text, _ = self.ask(self.made(store, num_beams=3, **LENGTH), self.given(0), TOWER)
        assert text == tokenizer.decode(live[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)

    def test_a_stream_gives_the_same_in_pieces(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, **LENGTH)
        receipt, pieces = self.stream(made, self.given(0), TOWER)
        said = list(pieces)
        text, whole = self.ask(made, self.given(0), TOWER)
        assert len(said) > 1
        assert "".join(said) == text
        assert receipt.documents == whole.documents

    def test_asynchronous_calls_give_the_same(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, **LENGTH)

        async def streamed(query: str) -> Asked:
            receipt, pieces = await self.astream(made, self.given(0), query)
            return "".join([p async for p in pieces]), receipt

        async def both(*calls: Coroutine[Any, Any, Asked]) -> list[Asked]:
            return await asyncio.gather(*calls)

        text, receipt = self.ask(made, self.given(0), TOWER)
        for found, its in asyncio.run(both(self.aask(made, self.given(0), TOWER), streamed(TOWER))):
            assert (found, its.documents) == (text, receipt.documents)

    def test_many_may_ask_at_once(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, **LENGTH)
        questions = [((0,), TOWER), ((1,), LANTERN), ((1, 0), TOWER), ((0, 1), LANTERN)]
        alone = [self.ask(made, self.given(*n), q)[0] for n, q in questions]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda asked: self.ask(made, self.given(*asked[0]), asked[1])[0], questions))
        assert together == alone

    def test_a_stream_that_nobody_reads_any_more_ends(self, store: kvstore.OpenStore) -> None:
        made = self.made(store, max_new_tokens=2000)
        _, pieces = self.stream(made, self.given(0), TOWER)
        assert next(pieces)
        assert any(t.name.startswith("kvstore-stream") for t in threading.enumerate())
        pieces.close()  # type: ignore[attr-defined]
        assert not any(t.name.startswith("kvstore-stream") for t in threading.enumerate())

    def test_what_fails_while_streaming_is_raised(self, store: kvstore.OpenStore) -> None:
        """transformers streams no beams; a reader must not wait for ever."""
        with pytest.raises(ValueError, match="streamer"):
            list(self.stream(self.made(store, num_beams=2), self.given(0), TOWER)[1])

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"tiers": "fine"}, "unknown option tiers"),
            ({"num_return_sequences": 2}, "num_return_sequences: set by kvstore"),
            ({"past_key_values": None}, "past_key_values: set by kvstore"),
            ({"stop": [".", ""]}, "a stop string is empty"),
        ],
    )
    def test_options_that_cannot_be_are_refused_at_once(self, store: kvstore.OpenStore, options: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            self.made(store, **options)

    def test_what_is_no_store_is_refused(self) -> None:
        with pytest.raises(InputError, match="str is not an open store"):
            self.made("kv.zarr")  # type: ignore[arg-type]
