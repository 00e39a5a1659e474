"""SpecPC in front of an OpenAI-compatible endpoint that runs the bundled target."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from runpy import run_path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import BadRequestError

from draftsieve.core.config import Generation, SpecPC
from draftsieve.core.engine import Engine
from draftsieve.core.prompt.messages import DEFAULT_SYSTEM

from .adapters_fixtures import EXAMPLES
from .openai_server import OpenAIServer, openai_server

QUESTION = "Which badge was issued to Mira Tolen?"
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
]
METHOD = SpecPC(ratio=0.5, unit="sentence")
GREEDY = Generation(max_new_tokens=16)


@cache
def pair() -> Engine:
    return Engine.load("builtin:target", "builtin:draft", progress=False)


@pytest.fixture(scope="module")
def server() -> Iterator[OpenAIServer]:
    with openai_server(pair()) as found:
        yield found


@pytest.fixture(autouse=True)
def environment(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy in between; the examples find the server."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    server.requests.clear()


def user_text() -> str:
    """What the target shall read: the compressed passages and the question."""
    context = pair().compress(QUESTION, TEXTS, METHOD)
    assert context.stats.compressed
    return f"{context.text}\n\nQuestion: {QUESTION}"


def chat(server: OpenAIServer, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=server.base_url, api_key="none", model="target", max_tokens=16, **options
    )


async def test_langchain_gets_what_the_local_target_says(server: OpenAIServer) -> None:
    local = pair().answer(QUESTION, TEXTS, method=METHOD, generation=GREEDY)
    messages = [SystemMessage(DEFAULT_SYSTEM), HumanMessage(user_text())]
    remote = chat(server).invoke(messages)
    assert remote.text == local.text
    assert remote.usage_metadata is not None
    assert remote.usage_metadata["input_tokens"] == local.usage.prompt_tokens
    assert local.usage.prompt_tokens < local.usage.original_prompt_tokens
    assert (await chat(server).ainvoke(messages)).text == local.text
    pieces = list(chat(server, stream_usage=True).stream(messages))
    assert "".join(piece.text for piece in pieces) == local.text
    assert len(pieces) > 2
    assert [m["content"] for m in server.requests[0]["messages"]] == [DEFAULT_SYSTEM, user_text()]


async def test_llama_index_gets_what_the_local_target_says(server: OpenAIServer) -> None:
    local = pair().answer(QUESTION, TEXTS, method=METHOD, generation=GREEDY)
    llm = OpenAILike(
        api_base=server.base_url, api_key="none", model="target", max_tokens=16, is_chat_model=True
    )
    messages = [
        ChatMessage(role="system", content=DEFAULT_SYSTEM),
        ChatMessage(role="user", content=user_text()),
    ]
    assert llm.chat(messages).message.content == local.text
    assert (await llm.achat(messages)).message.content == local.text
    assert [r.message.content for r in llm.stream_chat(messages)][-1] == local.text


def test_a_refused_request_is_an_error(server: OpenAIServer) -> None:
    with pytest.raises(BadRequestError, match="empty"):
        chat(server).invoke([HumanMessage(" ")])


def test_the_langchain_example_runs(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run_path(str(EXAMPLES / "remote_langchain.py"))
    whole, short = capsys.readouterr().out.splitlines()
    assert int(short.split()[0]) < int(whole.split()[0])
    assert [len(r["messages"]) for r in server.requests] == [2, 2]
    assert "AK-731" in server.requests[1]["messages"][1]["content"]


def test_the_llama_index_example_runs(
    server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run_path(str(EXAMPLES / "remote_llama_index.py"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "characters" in line]
    whole, short = (int(line.split()[0]) for line in lines)
    assert short < whole
    assert "AK-731" in server.requests[1]["messages"][-1]["content"]
