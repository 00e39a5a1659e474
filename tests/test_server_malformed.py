"""Bodies that nobody should send: each is answered, or refused in OpenAI's form."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine
from .served import Served, served, wait_for

ODD: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), 2**70, "", "a", "\ud800", "\x00", "x" * 500, [], {},
    [[]], [None], {"a": 1}, [{"type": "text"}], {"type": "text", "text": 5}, "<|im_start|>system",
]  # fmt: skip
NAMED = {"type": "object", "properties": {"a": {"type": "boolean"}}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = [{"type": "document", "text": TEXTS[0]}, {"type": "text", "text": QUESTION}]
WHOLE: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a", "content": "Rain."},
        {"role": "user", "content": ASKED},
    ],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "stop": ["zzz"],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": NAMED}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": NAMED}},
    "documents": [TEXTS[1], {"id": "3", "text": TEXTS[2]}],
    "draftsieve": {"method": "specpc", "ratio": 0.5, "unit": "sentence"},
    "stream": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(tiny_engine(), max_tokens=2, timeout=20) as found:
        yield found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a body."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


def spoilt(seed: int) -> dict[str, Any]:
    """The whole body with one to three places spoilt, dropped or doubled."""
    chance = random.Random(seed)
    body = json.loads(json.dumps(WHOLE))
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(list(places(body)))
        holder = body
        for key in path[:-1]:
            holder = holder[key]
        what = chance.random()
        if what < 0.15:
            del holder[path[-1]]
        elif what < 0.25 and isinstance(holder, dict):
            holder[chance.choice(["extra", "type", "text", "$ref", "content"])] = deepcopy(
                holder[path[-1]]
            )
        else:
            holder[path[-1]] = deepcopy(chance.choice(ODD))
    return body


def post(server: Served, content: bytes, path: str = "/v1/chat/completions") -> Any:
    head = {"content-type": "application/json"}
    return server.web.post(path, content=content, headers=head)


def check(answer: Any) -> int:
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        return 200
    found = answer.json()
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, (answer.status_code, found)
        assert found["error"].keys() == {"message", "type", "param", "code"}
        assert found["error"]["message"]
    else:
        assert found["choices"]
    return int(answer.status_code)


def test_the_body_that_is_spoilt_is_a_good_one(server: Served) -> None:
    assert check(post(server, json.dumps(WHOLE).encode())) == 200


def test_hundreds_of_spoilt_bodies(server: Served) -> None:
    statuses = []
    for seed in range(300):
        answer = post(server, json.dumps(spoilt(seed)).encode())
        try:
            statuses.append(check(answer))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {json.dumps(spoilt(seed))}") from error
    assert statuses.count(400) > 75
    assert statuses.count(200) > 20
    wait_for(lambda: server.service.running == 0)
    assert check(post(server, json.dumps(WHOLE).encode())) == 200


def test_bytes_that_are_no_json(server: Served) -> None:
    good = json.dumps(WHOLE).encode()
    chance = random.Random(0)
    for _ in range(200):
        raw = bytearray(good[: chance.randint(0, len(good))])
        for _ in range(chance.randint(0, 4)):
            if raw:
                raw[chance.randrange(len(raw))] = chance.randrange(256)
        check(post(server, bytes(raw)))
    for raw in (b"", b"null", b"[]", b"5", b'"a"', b"[" * 100_000, b"\xff\xfe", b'{"a":1}' * 2):
        assert check(post(server, raw)) == 400
    answer = server.web.post("/v1/chat/completions", content=good)  # as a form would send it
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/nothing"])
def test_other_routes(server: Served, path: str) -> None:
    for value in ODD:
        for body in ({"prompt": value}, value, {"prompt": QUESTION, "max_tokens": value}):
            check(post(server, json.dumps(body).encode(), path))
    assert check(server.web.get(path)) in (404, 405)
