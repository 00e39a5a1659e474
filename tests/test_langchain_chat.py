"""ChatDraftSieve: answers, documents, streams, asynchronous twins; one core call each."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import (
    HumanMessage,
)

from draftsieve.core.config import Generation
from draftsieve.core.engine import Engine
from draftsieve.core.prompt.messages import Prompt
from draftsieve.core.types import Chunk, Passage
from draftsieve.integrations.langchain import ChatDraftSieve, DraftSieveLLM

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    counted,
    tiny_engine,
    tiny_model,
    tiny_tokenizer,
)
from .langchain_fixtures import METHOD, add, chat, document_messages


def test_a_chat_answer_is_the_engines_answer() -> None:
    model = chat(method=METHOD)
    with counted(tiny_engine()) as calls:
        message = model.invoke(document_messages())
    assert calls == ["generate"]
    prompt = Prompt.from_messages(
        [
            {"role": "system", "content": "Answer from the documents."},
            {"role": "user", "content": QUESTION},
        ],
        documents=[Passage(text, f"d{n}") for n, text in enumerate(TEXTS)],
    )
    answer = tiny_engine().generate(prompt, method=METHOD, generation=Generation(max_new_tokens=6))
    assert message.content == answer.text
    usage = answer.usage
    assert usage.prompt_tokens < usage.original_prompt_tokens
    assert message.usage_metadata == {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "input_token_details": {
            "original": usage.original_prompt_tokens,
            "compressed": usage.prompt_tokens,
        },
    }
    metadata = message.response_metadata
    assert metadata["model_name"] == "tiny"
    assert metadata["finish_reason"] == "length"
    assert metadata["method"] == {"name": "SpecPC", **METHOD.model_dump()}
    assert metadata["fallback"] is None
    assert set(metadata["timings"]) >= {"draft", "prefill", "decode"}
    assert metadata["spans"] == [
        {
            "passage": s.passage_id,
            "index": s.passage_index,
            "start": s.start,
            "end": s.end,
            "score": s.score,
        }
        for s in answer.spans
    ]
    assert json.loads(json.dumps(metadata)) == metadata


@pytest.mark.parametrize(
    "given", [TEXTS, [Passage(t) for t in TEXTS], [Document(page_content=t) for t in TEXTS]]
)
def test_documents_of_a_call_stand_before_the_question(given: list[Any]) -> None:
    whole = chat().invoke(QUESTION, documents=given)
    blocks = [{"type": "text-plain", "text": text} for text in TEXTS]
    same = chat().invoke([HumanMessage([*blocks, {"type": "text", "text": QUESTION}])])
    assert whole.content == same.content
    assert whole.usage_metadata == same.usage_metadata
    shorter = chat().invoke(QUESTION, documents=given, method=METHOD)
    assert shorter.usage_metadata is not None
    assert whole.usage_metadata is not None
    assert shorter.usage_metadata["input_tokens"] < whole.usage_metadata["input_tokens"]


def test_a_stream_adds_up_to_the_answer() -> None:
    model = chat(method=METHOD)
    with counted(tiny_engine()) as calls:
        chunks = list(model.stream(document_messages()))
    assert calls == ["stream_prompt"]
    assert len(chunks) > 2
    assert [c.usage_metadata is not None for c in chunks].count(True) == 1
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].usage_metadata is not None
    whole = add(chunks)
    answer = model.invoke(document_messages())
    assert whole.content == answer.content
    assert whole.usage_metadata == answer.usage_metadata
    assert (
        whole.response_metadata.pop("timings").keys()
        == answer.response_metadata.pop("timings").keys()
    )
    assert whole.response_metadata == answer.response_metadata


def test_streaming_reports_tokens_in_invoke_too() -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.seen.append(token)

    tokens = Tokens()
    message = chat(streaming=True, callbacks=[tokens]).invoke(QUESTION)
    assert len(tokens.seen) > 2
    assert "".join(tokens.seen) == message.content == chat().invoke(QUESTION).content


async def test_async_chat_equals_sync() -> None:
    model = chat(method=METHOD)
    expected = model.invoke(document_messages()).content
    with counted(tiny_engine()) as calls:
        assert (await model.ainvoke(document_messages())).content == expected
        chunks = [chunk async for chunk in model.astream(document_messages())]
    assert calls == ["agenerate", "astream_prompt"]
    assert add(chunks).content == expected
    assert add(chunks).usage_metadata == model.invoke(document_messages()).usage_metadata


class Watched(Engine):
    """An engine that notes when a stream of its ends."""

    ended: int = 0

    def stream_prompt(self, *args: Any, **options: Any) -> Iterator[Chunk]:
        try:
            yield from super().stream_prompt(*args, **options)
        finally:
            self.ended += 1

    async def astream_prompt(self, *args: Any, **options: Any) -> AsyncIterator[Chunk]:
        stream = super().astream_prompt(*args, **options)
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()  # type: ignore[attr-defined]
            self.ended += 1


async def test_an_abandoned_stream_ends_in_the_core() -> None:
    engine = Watched(tiny_model(32, seed=1), tiny_tokenizer())
    for make, number in ((ChatDraftSieve, 1), (DraftSieveLLM, 3)):
        model = make(engine=engine, max_tokens=500)
        for _ in model.stream(QUESTION):
            break
        gc.collect()
        assert engine.ended == number
        pieces = model.astream(QUESTION)
        await anext(pieces)
        await pieces.aclose()
        gc.collect()
        async with asyncio.timeout(10):
            while engine.ended == number:  # the event loop closes what LangChain leaves behind
                await asyncio.sleep(0.01)
        assert engine.ended == number + 1
