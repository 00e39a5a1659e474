"""Batches of ChatDraftSieve are batches of the target; time limits."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import (
    HumanMessage,
)

from draftsieve.core.engine import Engine
from draftsieve.core.errors import PromptError, RequestTimeoutError

from .adapters_fixtures import (
    QUESTION,
    tiny_model,
    tiny_tokenizer,
)
from .langchain_fixtures import METHOD, chat, document_messages, llm, text_of


class Batches(Engine):
    """A real engine that notes the sizes of its batches."""

    sizes: ClassVar[list[int]] = []

    def _steps(self, prompts: Any, *args: Any, **options: Any) -> Any:
        self.sizes.append(len(prompts))
        return super()._steps(prompts, *args, **options)


@pytest.fixture
def batches() -> Batches:
    Batches.sizes = []
    return Batches(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=1), name="tiny"
    )


ASKED = ["one", "two words", QUESTION, "four", "and five"]


async def test_a_batch_of_chats_is_one_batch(batches: Batches) -> None:
    expected = [chat().invoke(text).content for text in ASKED]
    model = chat(engine=batches)
    assert [message.content for message in model.batch(ASKED)] == expected
    assert batches.sizes == [5]
    assert [message.content for message in await model.abatch(ASKED)] == expected
    assert batches.sizes == [5, 5]
    few = {"max_concurrency": 2}
    assert [message.content for message in model.batch(ASKED, few)] == expected
    assert [message.content for message in await model.abatch(ASKED, few)] == expected
    assert batches.sizes[2:] == [2, 2, 1] * 2
    assert model.batch([]) == []


def test_a_batch_passes_options_and_callbacks(batches: Batches) -> None:
    seen: list[str] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            seen.append(response.generations[0][0].text)

    model = chat(engine=batches).bind(max_tokens=3)
    found = model.batch(ASKED, {"callbacks": [Ends()]}, seed=1)
    assert batches.sizes == [5]
    assert sorted(seen) == sorted(message.content for message in found)
    assert {message.usage_metadata["output_tokens"] for message in found} == {3}


async def test_one_faulty_input_does_not_spoil_a_batch(batches: Batches) -> None:
    inputs = [*ASKED[:2], [HumanMessage("   ")], " ".join(["word"] * 2000)]
    model = chat(engine=batches)
    for found in (
        model.batch(inputs, return_exceptions=True),
        await model.abatch(inputs, return_exceptions=True),
    ):
        assert [text_of(message) for message in found[:2]] == [
            chat().invoke(text).content for text in ASKED[:2]
        ]
        assert [type(error) for error in found[2:]] == [PromptError, PromptError]
    with pytest.raises(PromptError):
        model.batch(inputs)


def test_what_a_cache_knows_leaves_the_batch(batches: Batches) -> None:
    model = chat(engine=batches, cache=InMemoryCache())
    model.invoke(ASKED[0])
    found = model.batch(ASKED)
    assert [message.content for message in found] == [chat().invoke(t).content for t in ASKED]
    assert batches.sizes == [1, 4]
    model.batch(ASKED)
    assert batches.sizes == [1, 4]


def test_a_streaming_model_answers_batches_too(batches: Batches) -> None:
    found = chat(engine=batches, streaming=True).batch(ASKED[:2])
    assert [message.content for message in found] == [chat().invoke(t).content for t in ASKED[:2]]


async def test_a_request_out_of_time_fails_and_leaves_the_engine_usable() -> None:
    late = chat(timeout=1e-6)
    with pytest.raises(RequestTimeoutError):
        late.invoke(QUESTION)
    with pytest.raises(RequestTimeoutError):
        await late.ainvoke(QUESTION)
    with pytest.raises(RequestTimeoutError):
        list(late.stream(QUESTION))
    with pytest.raises(TimeoutError):
        llm(timeout=1e-6).invoke(QUESTION)
    with pytest.raises(RequestTimeoutError):
        late.batch(ASKED)
    with pytest.raises(RequestTimeoutError):
        chat(method=METHOD, timeout=1e-6).invoke(document_messages())
    assert late.invoke(QUESTION, timeout=60).content == chat().invoke(QUESTION).content
