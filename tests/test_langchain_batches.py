"""Batches of ChatDraftSieve are batches of the target; time limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@pytest.fixture
def engine() -> Engine:
    return Engine(
        tiny_model(64, seed=2), tiny_tokenizer(), draft_model=tiny_model(32, seed=1), name="tiny"
    )


@contextmanager
def passes(engine: Engine) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of each pass of the target."""
    seen: list[tuple[int, int]] = []

    def note(_module: object, _args: object, given: dict[str, Any]) -> None:
        seen.append(tuple(given["input_ids"].shape))

    hook = engine.target.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


ASKED = ["one", "two words", QUESTION, "four", "and five"]


async def test_a_batch_of_chats_is_one_batch(engine: Engine) -> None:
    expected = [chat(max_tokens=60).invoke(text).content for text in ASKED]
    model = chat(engine=engine, max_tokens=60)
    for config, most in ((None, 5), ({"max_concurrency": 2}, 2)):
        with passes(engine) as seen:
            assert [message.content for message in model.batch(ASKED, config)] == expected
        assert max(rows for rows, _ in seen) == most
        with passes(engine) as seen:
            assert [message.content for message in await model.abatch(ASKED, config)] == expected
        assert max(rows for rows, _ in seen) == most
    assert model.batch([]) == []


def test_a_batch_passes_options_and_callbacks(engine: Engine) -> None:
    seen: list[str] = []

    class Ends(BaseCallbackHandler):
        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            seen.append(response.generations[0][0].text)

    model = chat(engine=engine).bind(max_tokens=3)
    found = model.batch(ASKED, {"callbacks": [Ends()]}, seed=1)
    assert sorted(seen) == sorted(message.content for message in found)
    assert {message.usage_metadata["output_tokens"] for message in found} == {3}


async def test_one_faulty_input_does_not_spoil_a_batch(engine: Engine) -> None:
    inputs = [*ASKED[:2], [HumanMessage("   ")], " ".join(["word"] * 2000)]
    model = chat(engine=engine)
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


def test_what_a_cache_knows_leaves_the_batch(engine: Engine) -> None:
    model = chat(engine=engine, cache=InMemoryCache())
    model.invoke(ASKED[0])
    with passes(engine) as seen:
        found = model.batch(ASKED)
    assert [message.content for message in found] == [chat().invoke(t).content for t in ASKED]
    assert sum(rows for rows, tokens in seen if tokens > 1) == 4
    with passes(engine) as seen:
        model.batch(ASKED)
    assert seen == []


def test_a_streaming_model_answers_batches_too(engine: Engine) -> None:
    found = chat(engine=engine, streaming=True).batch(ASKED[:2])
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
