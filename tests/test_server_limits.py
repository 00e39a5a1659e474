"""Who may ask, how much at once, and what ends a request early."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from openai import (
    APIError,
    APIStatusError,
    AuthenticationError,
    InternalServerError,
    RateLimitError,
)

from draftsieve.core.errors import OutOfMemoryError

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tokens_read
from .served import Served, served, wait_for

ASKED: Any = [{"role": "user", "content": QUESTION}]
CHAT = "/v1/chat/completions"
LONG = 900  # tokens that the tiny pair says, unless it is stopped


def body(tokens: int = LONG, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": ASKED, "max_tokens": tokens, **options}


def idle(found: Served) -> None:
    """Nothing is answered any more, and nothing was lost on the way."""
    wait_for(lambda: found.service.running == 0, seconds=30)
    assert found.counted("draftsieve_requests_running") == 0
    assert found.counted("draftsieve_requests_waiting") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work(stream: bool) -> None:
    """The models stop: of 900 tokens most are never said."""
    with served(tiny_engine()) as found, tokens_read(tiny_engine().target) as read:
        raw = json.dumps(body(stream=stream)).encode()
        address = ("127.0.0.1", int(found.url.rpartition(":")[2]))
        with socket.create_connection(address) as line:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
            if stream:
                assert line.recv(100).startswith(b"HTTP/1.1 200")
            wait_for(lambda: found.service.running == 1)
            wait_for(lambda: found.service.metrics.waiting._value.get() == 0)
        idle(found)
        time.sleep(0.1)
        first = read()
        assert 0 < first < LONG / 2
        time.sleep(0.3)
        assert read() == 0
        assert found.counted("draftsieve_clients_left_total") == 1


def test_a_client_that_leaves_while_others_wait() -> None:
    """Only its own work ends."""
    with served(tiny_engine()) as found:
        client = found.sync()
        with ThreadPoolExecutor() as pool:
            stays = pool.submit(client.chat.completions.create, **body(120))
            with found.web.stream("POST", CHAT, json=body(stream=True)) as leaves:
                next(leaves.iter_lines())
            assert stays.result().usage.completion_tokens == 120  # type: ignore[union-attr]
        idle(found)


def test_too_many_requests_are_sent_away() -> None:
    with served(tiny_engine(), max_requests=2) as found:
        client = found.sync()
        running = [client.chat.completions.create(**body(stream=True)) for _ in range(2)]
        for stream in running:
            next(iter(stream))
        with pytest.raises(RateLimitError) as caught:
            client.chat.completions.create(**body(2))
        assert caught.value.code == "too_many_requests"
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        with pytest.raises(RateLimitError):
            client.chat.completions.create(**body(2, stream=True))
        running[0].close()
        wait_for(lambda: found.service.running == 1)
        assert client.chat.completions.create(**body(2)).usage.completion_tokens == 2
        running[1].close()
        idle(found)
        assert found.counted("draftsieve_refused_total") == 2


async def test_a_crowd_is_answered_or_told_to_come_back() -> None:
    with served(tiny_engine(), max_requests=8) as found:
        async with httpx.AsyncClient(base_url=found.url, trust_env=False, timeout=60) as web:
            crowd = [web.post(CHAT, json=body(5, documents=TEXTS)) for _ in range(40)]
            answers = await asyncio.gather(*crowd)
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        texts = {a.json()["choices"][0]["message"]["content"] for a in answers if a.is_success}
        assert len(texts) == 1
        idle(found)


def test_the_deadline() -> None:
    with served(tiny_engine(), timeout=60) as found:
        client = found.sync(max_retries=2)
        short = {"extra_body": {"draftsieve": {"timeout": 0.05}}}
        before = found.counted("draftsieve_requests_total")
        with pytest.raises(InternalServerError) as caught:
            client.chat.completions.create(**body(), **short)
        assert caught.value.status_code == 504
        assert "timeout has passed" in caught.value.message
        assert found.counted("draftsieve_requests_total") == before + 2  # /metrics, and one try
        short = {"extra_body": {"draftsieve": {"timeout": 0.4}}}
        with pytest.raises(APIError, match="timeout has passed"):
            list(client.chat.completions.create(**body(stream=True), **short))
        idle(found)


def test_the_servers_deadline_is_the_upper_bound() -> None:
    longer = {"draftsieve": {"timeout": 100}}
    with (
        served(tiny_engine(), timeout=0.05) as found,
        pytest.raises(APIStatusError, match="timeout has passed"),
    ):
        found.sync().chat.completions.create(**body(), extra_body=longer)


def test_keys_and_tenants() -> None:
    keys = {"north": "key-of-north", "south": "key-of-south"}
    with served(tiny_engine(), api_keys=keys, api_key="plain") as found:
        for key in ("none", "key-of-", "key-of-northx", "\u00e9"):
            head = {"Authorization": f"Bearer {key}".encode()}
            for path in ("/v1/models", "/v1/models/tiny"):
                answer = found.web.get(path, headers=head)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert found.web.post(CHAT, json=body(2), headers=head).status_code == 401
        assert found.web.get("/v1/models").status_code == 401
        with pytest.raises(AuthenticationError):
            found.sync().models.list()
        for key in (*keys.values(), "plain"):
            client = found.sync(api_key=key)
            assert client.chat.completions.create(**body(2)).usage.completion_tokens == 2
        assert found.web.get("/health").status_code == 200
        assert found.web.get("/ready").status_code == 200
        shown = found.web.get("/openapi.json").text + found.web.get("/metrics").text
        assert "key-of" not in shown


def test_a_failure_of_the_model_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first token by the status, later by an event; the server goes on."""
    pipeline = tiny_engine()._need_pipeline()
    step = pipeline.step

    def fails(error: Exception, after: int) -> None:
        left = [after]

        def wrapped(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise error
            return step(*args)

        monkeypatch.setattr(pipeline, "step", wrapped)

    with served(tiny_engine()) as found:
        client = found.sync()
        fails(OutOfMemoryError("There is no memory for the target."), 0)
        with pytest.raises(InternalServerError, match="no memory for the target") as caught:
            client.chat.completions.create(**body(9))
        assert caught.value.status_code == 503
        fails(RuntimeError("secret: Holm"), 0)
        with pytest.raises(InternalServerError, match="an error of its own") as caught:
            client.chat.completions.create(**body(9))
        assert "Holm" not in str(caught.value)
        fails(OutOfMemoryError("There is no memory for the target."), 3)
        stream = iter(client.chat.completions.create(**body(9, stream=True)))
        next(stream)
        next(stream)
        with pytest.raises(APIError, match="no memory for the target"):
            list(stream)
        monkeypatch.undo()
        assert client.chat.completions.create(**body(3)).usage.completion_tokens == 3
        idle(found)


def test_a_server_that_ends_finishes_its_streams() -> None:
    with served(tiny_engine()) as found:
        stream = found.sync().chat.completions.create(**body(200, stream=True))
        chunks = [next(iter(stream))]
        found.server.should_exit = True
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert chunks[-1].draftsieve["prompt_tokens"] > 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{found.url}/health", trust_env=False)


def test_nothing_is_left_behind() -> None:
    """Threads and places, after many requests of all kinds."""
    with served(tiny_engine(), max_tokens=3) as found:
        client = found.sync()
        client.chat.completions.create(**body(2))
        before = threading.active_count()
        for turn in range(30):
            client.chat.completions.create(**body(2))
            stream = client.chat.completions.create(**body(20, stream=True))
            next(iter(stream))
            if turn % 2:
                stream.close()
            else:
                list(stream)
            found.web.post(CHAT, json={"messages": 5})
        idle(found)
        assert threading.active_count() <= before + 2
