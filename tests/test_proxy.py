"""The proxy before real servers: one that echoes and misbehaves, and our own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from threading import Thread
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from draftsieve.core.errors import ConfigError
from draftsieve.integrations.server import Settings
from draftsieve.integrations.server.proxy import create_proxy

from .adapters_fixtures import TEXTS, tiny_compressor, tiny_engine
from .served import served, wait_for

LONG = " ".join(TEXTS * 4)
QUESTION = {"role": "user", "content": "When does the ferry to Holm leave?"}
SEEN: list[dict[str, Any]] = []
ENDED: list[str] = []


async def _echo(request: Request) -> Response:
    body = await request.body()
    SEEN.append({"path": request.url.path, "headers": dict(request.headers), "body": body})
    if request.url.path.endswith("/models"):
        return Response(b'{ "data":[] }', headers={"x-own": "1", "set-cookie": "a=1"})
    if b"please-fail" in body:
        return JSONResponse({"error": {"message": "slow down"}}, 429, {"retry-after": "7"})
    if b"please-wait" in body:
        await asyncio.sleep(5)
    if b'"stream": true' in body:
        return StreamingResponse(_events(b"please-cut" in body), media_type="text/event-stream")
    return JSONResponse({"said": "yes"})


async def _events(cut: bool) -> AsyncIterator[bytes]:
    try:
        for number in range(200):
            yield b'data: {"n": %d}\n\n' % number
            if cut and number == 3:
                raise ConnectionError
            await asyncio.sleep(0.01)
        yield b"data: [DONE]\n\n"
        ENDED.append("whole")
    except asyncio.CancelledError:
        ENDED.append("left")
        raise


@contextmanager
def _running(app: Any) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as place:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = Thread(target=asyncio.run, args=(server.serve([place]),), daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    routes = [Route("/{path:path}", _echo, methods=["GET", "POST", "DELETE"])]
    with _running(Starlette(routes=routes)) as url:
        yield url


@contextmanager
def _proxied(upstream: str, **settings: Any) -> Iterator[httpx.Client]:
    settings = {"method": {"method": "specpc", "ratio": 0.4, "unit": "sentence"}, **settings}
    app = create_proxy(Settings(upstream=upstream, **settings), tiny_compressor())
    with (
        _running(app) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        SEEN.clear()
        ENDED.clear()
        yield client


def _chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **more}


def _turn(question: str, result: str) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": result},
    ]


def test_what_is_not_shortened_passes_byte_for_byte(upstream: str) -> None:
    odd = b'{"messages" : [ {"role":"user","content":"h\\u00e9?"} ],\n"x":1.0, "y":[1e3]}'
    with _proxied(upstream) as client:
        headers = {"authorization": "Bearer upstream-key", "content-type": "application/json"}
        answer = client.post("/v1/chat/completions?a=1&a=2", content=odd, headers=headers)
        assert answer.json() == {"said": "yes"}
        assert SEEN[0]["body"] == odd
        assert SEEN[0]["headers"]["authorization"] == "Bearer upstream-key"
        for body in (b"{", b"[]", b"\xff", b"null"):
            client.post("/v1/chat/completions", content=body)
            assert SEEN[-1]["body"] == body
        listed = client.get("/v1/models")
        assert listed.content == b'{ "data":[] }'
        assert (listed.headers["x-own"], listed.headers["set-cookie"]) == ("1", "a=1")
        assert client.delete("/v1/files/a%20b").status_code == 200
        assert SEEN[-1]["path"] == "/v1/files/a b"


def test_tool_results_and_documents_go_on_shorter(upstream: str) -> None:
    body = _chat(*_turn("When does the ferry leave?", LONG), documents=[LONG], top_k=7)
    with _proxied(upstream) as client:
        answer = client.post("/v1/chat/completions", json=body)
        sent = json.loads(SEEN[0]["body"])
        assert len(sent["messages"][2]["content"]) < len(LONG)
        assert len(sent["documents"][0]) < len(LONG)
        assert (sent["top_k"], sent["messages"][:2]) == (7, body["messages"][:2])
        before, _, after = answer.headers["x-draftsieve-tokens"].partition(" to ")
        assert 0 < int(after) < int(before)
        client.post("/v1/chat/completions", json=body, headers={"x-headroom-bypass": "true"})
        assert json.loads(SEEN[1]["body"]) == body
        assert "x-headroom-bypass" not in SEEN[1]["headers"]
        counted = client.get("/metrics").text
        assert "draftsieve_original_prompt_tokens_total" in counted


def test_later_turns_begin_with_the_bytes_of_earlier_ones(upstream: str) -> None:
    """Also through another proxy: nothing has to be remembered for it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You look things up."}]
    sent: list[list[dict[str, Any]]] = []
    for number in range(20):
        messages += _turn(f"Question {number}: when does the ferry leave?", f"{number}. {LONG}")
        if number in (0, 10):
            context = _proxied(upstream)
            client = context.__enter__()
        client.post("/v1/chat/completions", json=_chat(*messages))
        sent.append(json.loads(SEEN[-1]["body"])["messages"])
        assert len(sent[-1][-1]["content"]) < len(messages[-1]["content"])
        messages.append({"role": "assistant", "content": "At seven."})
        if number in (9, 19):
            context.__exit__(None, None, None)
    for earlier, later in pairwise(sent):
        assert later[: len(earlier)] == earlier


def test_a_stream_passes_as_it_comes_and_ends_when_the_client_leaves(upstream: str) -> None:
    with _proxied(upstream) as client:
        body = json.dumps(_chat(QUESTION, stream=True))
        with client.stream("POST", "/v1/chat/completions", content=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            pieces = list(answer.iter_raw())
        assert len(pieces) > 10  # not in one piece
        assert b"".join(pieces).endswith(b'data: {"n": 199}\n\ndata: [DONE]\n\n')
        assert ENDED == ["whole"]
        with client.stream("POST", "/v1/chat/completions", content=body) as answer:
            next(answer.iter_raw())
        wait_for(lambda: ENDED == ["whole", "left"])


def test_faults_of_the_upstream_are_told(upstream: str) -> None:
    with _proxied(upstream, timeout=1.0) as client:
        failed = client.post("/v1/chat/completions", json=_chat("please-fail"))
        assert (failed.status_code, failed.headers["retry-after"]) == (429, "7")
        assert failed.json() == {"error": {"message": "slow down"}}
        slow = client.post("/v1/chat/completions", json=_chat("please-wait"))
        assert (slow.status_code, slow.json()["error"]["code"]) == (504, "timeout")
        cut = json.dumps(_chat("please-cut", stream=True))
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/chat/completions", content=cut) as answer,
        ):
            list(answer.iter_raw())
        assert client.get("/health").json() == {"status": "ok"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with _proxied(nobody) as client:
        dead = client.post("/v1/chat/completions", json=_chat(QUESTION))
        assert (dead.status_code, dead.json()["error"]["code"]) == (502, "upstream_unreachable")


def test_where_shortening_fails_the_original_goes_on(upstream: str) -> None:
    """A question beyond the draft's window cannot be read."""
    body = _chat(*_turn("When does the ferry leave? " * 300, LONG))
    with _proxied(upstream) as client:
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert "PromptError" in answer.headers["x-draftsieve-fallback"]
        assert json.loads(SEEN[0]["body"]) == body
    with _proxied(upstream, upstream_tokens=500) as client:
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert SEEN == []


def test_keys_of_ours_stay_here_and_tenants_share_nothing(upstream: str) -> None:
    keys = {"a": "key-of-a", "b": "key-of-b"}
    with _proxied(upstream, api_keys=keys) as client:
        refused = client.get("/v1/models", headers={"authorization": "Bearer key-of-a"})
        assert refused.status_code == 401
        assert SEEN == []
        for key in keys.values():
            client.get("/v1/models", headers={"x-draftsieve-key": key, "authorization": "up"})
            assert SEEN[-1]["headers"]["authorization"] == "up"
            assert "x-draftsieve-key" not in SEEN[-1]["headers"]
        assert client.get("/health").status_code == 200


def test_our_own_server_behind_it(upstream: str) -> None:
    with served(tiny_engine()) as ours, _proxied(ours.url) as client:
        web = httpx.Client(trust_env=False)
        sdk = OpenAI(
            base_url=f"{str(client.base_url).rstrip(chr(47))}/v1", api_key="none", http_client=web
        )
        name = sdk.models.list().data[0].id
        messages: Any = _turn("When does the ferry leave?", LONG)
        said = sdk.chat.completions.create(model=name, messages=messages, max_tokens=5)
        assert said.choices[0].message.content
        streamed = sdk.chat.completions.create(
            model=name, messages=messages, max_tokens=5, stream=True
        )
        text = "".join(piece.choices[0].delta.content or "" for piece in streamed if piece.choices)
        assert text == said.choices[0].message.content
        whole = ours.sync().chat.completions.create(model=name, messages=messages, max_tokens=5)
        assert said.usage is not None
        assert whole.usage is not None
        assert said.usage.prompt_tokens < whole.usage.prompt_tokens


def test_settings_that_make_no_proxy_are_refused() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        Settings(upstream="localhost:8080")
    with pytest.raises(ConfigError, match="there can be no target"):
        Settings(upstream="http://localhost:8080", target="builtin:target")
    with pytest.raises(ConfigError, match="its method is specpc"):
        create_proxy(Settings(upstream="http://localhost:8080", method={"method": "speckv"}))
