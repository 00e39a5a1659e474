"""DraftSieveLLM: prompts, batches, streams."""

from __future__ import annotations

from .adapters_fixtures import (
    QUESTION,
    counted,
    tiny_engine,
)
from .langchain_fixtures import METHOD, chat, documents, llm


def test_many_prompts_are_one_batch() -> None:
    prompts = ["one", "two words", QUESTION]
    with counted(tiny_engine()) as calls:
        result = llm().generate(prompts)
    assert calls == ["generate_many"]
    texts = [generations[0].text for generations in result.generations]
    assert texts == [llm().invoke(prompt) for prompt in prompts]
    info = result.generations[0][0].generation_info
    assert info is not None
    assert info["model_name"] == "tiny"
    assert info["usage"]["output_tokens"] == 6
    with counted(tiny_engine()) as calls:
        assert llm().batch(prompts) == texts
    assert calls == ["generate_many"]


def test_a_prompt_is_one_user_message() -> None:
    assert llm().invoke(QUESTION) == chat().invoke(QUESTION).content
    with_documents = llm(method=METHOD).invoke(QUESTION, documents=documents())
    assert with_documents == chat(method=METHOD).invoke(QUESTION, documents=documents()).content


async def test_llm_streams_add_up_to_the_text() -> None:
    expected = llm().invoke(QUESTION)
    with counted(tiny_engine()) as calls:
        assert "".join(llm().stream(QUESTION)) == expected
        assert "".join([piece async for piece in llm().astream(QUESTION)]) == expected
        assert await llm().ainvoke(QUESTION) == expected
    assert calls == ["stream_prompt", "astream_prompt", "agenerate_many"]


def test_llm_stops_at_stop_strings() -> None:
    full = llm(max_tokens=20).invoke(QUESTION)
    stop = full[5:7]
    assert llm(max_tokens=20).invoke(QUESTION, stop=[stop]) == full[: full.index(stop)]
    assert "".join(llm(max_tokens=20).stream(QUESTION, stop=[stop])) == full[: full.index(stop)]
