"""The server, asked over HTTP by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI, OpenAIError
from pydantic import BaseModel

from draftsieve import Engine, Generation, Passage, Prompt, SpecKV, SpecPC

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tokens_read
from .served import Served, served, wait_for

PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}
LONG = [{"role": "user", "content": "word " * 3000}]
SYSTEM, ROBOT = ([{"role": role, "content": "a"}] for role in ("system", "robot"))
ASKED: Any = [{"role": "user", "content": QUESTION}]
METHOD = {"method": "specpc", "preset": "paper", "ratio": 0.5, "unit": "sentence"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "enum": ["Holm", "Sund"]}},
            "required": ["town"],
        },
        "strict": True,
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(tiny_engine(), max_tokens=12, timeout=60) as found:
        yield found


@pytest.fixture
def client(server: Served) -> OpenAI:
    return server.sync()


def asked(documents: list[str | Passage], tokens: int = 12, **options: Any) -> Any:
    """The core's own answer."""
    prompt = Prompt.from_messages(ASKED, documents)
    return tiny_engine().generate(prompt, generation=Generation(max_new_tokens=tokens), **options)


def test_a_chat_is_answered_as_the_engine_answers(client: OpenAI) -> None:
    found = client.chat.completions.create(model="tiny", messages=ASKED)
    answer = asked([])
    assert found.choices[0].message.content == answer.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length"
    assert found.model == "tiny"
    assert found.object == "chat.completion"
    assert found.usage is not None
    assert found.usage.prompt_tokens == answer.usage.prompt_tokens
    assert found.usage.completion_tokens == 12
    assert found.usage.total_tokens == answer.usage.total_tokens


def test_documents_are_compressed_and_their_kept_spans_told(client: OpenAI) -> None:
    documents = [TEXTS[0], {"id": "fares", "text": TEXTS[1]}, {"data": {"snippet": TEXTS[2]}}]
    found: Any = client.chat.completions.create(
        model="tiny", messages=ASKED, extra_body={"documents": documents, "draftsieve": METHOD}
    )
    method = SpecPC(ratio=0.5, unit="sentence")
    answer = asked([TEXTS[0], Passage(TEXTS[1], "fares"), TEXTS[2]], method=method)
    assert found.choices[0].message.content == answer.text
    told = found.draftsieve
    assert told["method"]["name"] == "SpecPC"
    assert [(s["passage"], s["start"], s["end"]) for s in told["spans"]] == [
        (s.passage_id, s.start, s.end) for s in answer.spans
    ]
    assert {s["passage"] for s in told["spans"]} <= {"1", "fares", "3"}
    assert told["original_prompt_tokens"] > told["prompt_tokens"] == found.usage.prompt_tokens
    details = found.usage.prompt_tokens_details
    assert details.original_tokens == answer.usage.original_prompt_tokens
    assert details.compressed_tokens == answer.usage.prompt_tokens
    assert told["fallback"] is None


@pytest.mark.parametrize(
    ("asked_for", "method"),
    [
        (
            {"method": "speckv", "capacity": 60, "lookahead_tokens": 4},
            SpecKV(capacity=60, lookahead_tokens=4),
        ),
        ({"method": "none"}, None),
    ],
)
def test_other_methods(client: OpenAI, asked_for: dict[str, Any], method: Any) -> None:
    found: Any = client.chat.completions.create(
        model="tiny",
        messages=ASKED,
        extra_body={"documents": TEXTS, "draftsieve": asked_for},
    )
    assert found.choices[0].message.content == asked(list(TEXTS), method=method).text
    assert (found.draftsieve["method"] or {}).get("name") == (method and type(method).__name__)


def test_document_blocks_stay_where_they_stand(client: OpenAI) -> None:
    blocks: Any = [
        {"type": "document", "text": TEXTS[0], "id": "ferry", "title": "The ferry"},
        {"type": "text", "text": QUESTION},
    ]
    found: Any = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": blocks}],
        extra_body={"draftsieve": {**METHOD, "ratio": 1.0}},
    )
    assert {span["passage"] for span in found.draftsieve["spans"]} == {"ferry"}


def test_a_stream_says_the_same(client: OpenAI) -> None:
    options: Any = {"extra_body": {"documents": TEXTS, "draftsieve": METHOD}}
    whole: Any = client.chat.completions.create(model="tiny", messages=ASKED, **options)
    chunks: list[Any] = list(
        client.chat.completions.create(
            model="tiny",
            messages=ASKED,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-2].draftsieve["spans"] == whole.draftsieve["spans"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 8


def test_a_stream_without_usage(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="tiny", messages=ASKED, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_concurrent_clients_are_answered_together(server: Served) -> None:
    client, questions = server.aio(), [f"{QUESTION} {n}" for n in range(6)]
    alone = [
        tiny_engine()
        .generate(
            Prompt.from_messages([{"role": "user", "content": question}]),
            generation=Generation(max_new_tokens=24),
        )
        .text
        for question in questions
    ]

    async def one(question: str) -> str:
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=24,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    with tokens_read(tiny_engine().target) as read:
        assert await asyncio.gather(*map(one, questions)) == alone
        together = read()
    assert together > 0
    await client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(client: OpenAI, stream: bool) -> None:
    options: Any = {
        "model": "tiny",
        "messages": ASKED,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 100,
    }
    if stream:
        with client.chat.completions.stream(**options) as events:
            found: Any = events.get_final_completion()
    else:
        found = client.chat.completions.create(**options)
    (call,) = found.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["town"] in ("Holm", "Sund")
    assert found.choices[0].finish_reason == "tool_calls"
    assert not found.choices[0].message.content
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    said = found.choices[0].message.model_dump()
    again = client.chat.completions.create(
        model="tiny", messages=[*ASKED, said, result], tools=[WEATHER], tool_choice="none"
    )
    assert again.choices[0].message.content


def test_structured_output(client: OpenAI) -> None:
    class Ferry(BaseModel):
        leaves: bool
        days: list[bool]

    schema = Ferry.model_json_schema()
    schema["properties"]["days"] |= {"minItems": 1, "maxItems": 2}
    form: Any = {"type": "json_schema", "json_schema": {"name": "ferry", "schema": schema}}
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, response_format=form, max_tokens=200
    )
    assert found.choices[0].finish_reason == "stop"
    Ferry.model_validate_json(found.choices[0].message.content or "")
    parsed = client.chat.completions.parse(
        model="tiny", messages=ASKED, response_format=Flag, max_tokens=60
    )
    assert isinstance(parsed.choices[0].message.parsed, Flag)


class Flag(BaseModel):
    on: bool


def test_sampling_stop_and_limits(client: OpenAI) -> None:
    def said(**options: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=ASKED, **options).choices[0]

    one, two = (said(temperature=1.0, seed=-5, top_p=0.9) for _ in range(2))
    assert one.message.content == two.message.content
    assert said(temperature=1.0, seed=7).message.content != one.message.content
    plain = said(max_completion_tokens=20).message.content
    assert len(plain) > len(said(max_tokens=5).message.content)
    mark = plain[6:9]
    stopped = said(max_tokens=20, stop=[mark])
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == plain.partition(mark)[0]
    assert said(max_tokens=20, stop=mark).message.content == stopped.message.content
    neutral = said(n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0, user="me")
    assert neutral.message.content == said().message.content


def test_text_completions(client: OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=QUESTION)
    assert found.choices[0].text == asked([]).text
    chunks = client.completions.create(model="tiny", prompt=[QUESTION], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text
    with pytest.raises(BadRequestError, match="2 prompts"):
        client.completions.create(model="tiny", prompt=[QUESTION, QUESTION])


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "draftsieve")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=ASKED)
    assert caught.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="tiny", input="a")


def test_other_names_of_the_model() -> None:
    with served(tiny_engine(), max_tokens=2, model_names=("gpt-9", "*")) as found:
        client = found.sync()
        assert [model.id for model in client.models.list().data] == ["tiny", "gpt-9"]
        answer = client.chat.completions.create(model="anything", messages=ASKED)
        assert answer.model == "anything"


@pytest.mark.parametrize(
    ("options", "param", "code", "message"),
    [
        ({"n": 2}, "n", "unsupported_parameter", "does not support n"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter", "does not support logprobs"),
        ({"top_logprobs": 3}, "top_logprobs", "unsupported_parameter", "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "presence"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter", "logit_bias"),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options",
            "unsupported_parameter",
            "belong to a stream",
        ),
        ({"temprature": 1}, "temprature", "unknown_parameter", "no request field 'temprature'"),
        ({"temperature": -1}, "temperature", "invalid_value", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "greater than or equal to 1"),
        (
            {"draftsieve": {"ratio": 2}},
            "draftsieve.ratio",
            "invalid_value",
            "less than or equal to 1",
        ),
        ({"draftsieve": {"raito": 0.2}}, None, None, "Did you mean ratio"),
        ({"draftsieve": {"ratio": 0.5, "capacity": 5}}, None, None, "exclude each other"),
        ({"draftsieve": {"embedder": "/etc"}}, None, None, "may name no file or model"),
        ({"draftsieve": {"head_weights": "/etc/passwd"}}, None, None, "may name no file or model"),
        ({"documents": [{"title": "no text"}]}, None, None, "has no text"),
        ({"response_format": {"type": "xml"}}, None, None, "not understood"),
        ({"tools": [WEATHER], "tool_choice": "hammer"}, None, None, "hammer"),
        ({"stop": [""]}, None, None, "at least 1 character"),
        ({"documents": ["a"], "messages": SYSTEM}, None, None, "no user message"),
        ({"messages": ROBOT}, "messages.0.role", "invalid_value", "'system'"),
        ({"messages": []}, "messages", "invalid_value", "at least 1 item"),
        ({"messages": [PICTURE]}, None, None, "not 'image_url'"),
        ({"messages": LONG}, None, "context_length_exceeded", "reads at most 1024"),
    ],
)
def test_what_cannot_be_done_is_refused(
    server: Served, options: dict[str, Any], param: str | None, code: str | None, message: str
) -> None:
    body = {"model": "tiny", "messages": ASKED, **options}
    for stream in ({}, {"stream": True}):
        if "stream_options" in options and stream:
            continue
        found = server.web.post("/v1/chat/completions", json={**body, **stream})
        assert found.status_code == 400, found.text
        error = found.json()["error"]
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            param,
            code,
        )
        assert message in error["message"]


def test_health_readiness_and_counters(server: Served, client: OpenAI) -> None:
    web = server.web
    assert web.get("/health").json() == {"status": "ok"}
    assert web.get("/ready").json() == {"status": "ready", "model": "tiny"}
    names = ("original_prompt_tokens", "prompt_tokens", "completion_tokens")
    before = [server.counted(f"draftsieve_{name}_total") for name in names]
    found: Any = client.chat.completions.create(
        model="tiny", messages=ASKED, extra_body={"documents": TEXTS, "draftsieve": METHOD}
    )
    after = [server.counted(f"draftsieve_{name}_total") for name in names]
    sizes = found.draftsieve["original_prompt_tokens"], found.usage.prompt_tokens, 12
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == sizes
    assert server.counted("draftsieve_requests_running") == 0
    assert server.counted("draftsieve_requests_waiting") == 0
    text = web.get("/metrics").text
    assert 'draftsieve_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'draftsieve_stage_seconds_count{stage="' in text
    missing = web.get("/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "not_found_error"


def test_the_log_tells_of_requests_and_holds_no_text(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        found = server.web.post(
            "/v1/chat/completions",
            json={"messages": ASKED, "documents": TEXTS, "max_tokens": 3},
        )
        wait_for(lambda: any(record.name == "draftsieve.server" for record in caplog.records))
    (record,) = [each for each in caplog.records if each.name == "draftsieve.server"]
    fields = record.fields  # type: ignore[attr-defined]
    assert fields["id"] == found.headers["x-request-id"]
    assert (fields["status"], fields["completion_tokens"]) == (200, 3)
    assert fields["tenant"] == "default"
    written = "".join(str(vars(each)) for each in caplog.records)
    assert "Holm" not in written


def test_large_bodies_and_many_documents_are_refused() -> None:
    with served(tiny_engine(), max_body_bytes=2000, max_documents=2, max_tokens=2) as found:
        web = found.web

        def status(content: Any) -> int:
            head = {"content-type": "application/json"}
            answer = web.post("/v1/chat/completions", content=content, headers=head)
            return answer.status_code

        large = json.dumps({"messages": [{"role": "user", "content": "a" * 3000}]}).encode()
        assert status(large) == 413
        assert status(iter([large])) == 413  # chunked: no length is stated
        assert status(json.dumps({"messages": ASKED, "documents": ["a", "b"]})) == 200
        assert status(json.dumps({"messages": ASKED, "documents": ["a"] * 3})) == 413


def test_every_error_is_the_clients(client: OpenAI) -> None:
    with pytest.raises(OpenAIError):
        client.chat.completions.create(model="tiny", messages=ASKED, n=3)


@cache
def draftless() -> Engine:
    engine = tiny_engine()
    return Engine(engine.target, engine.tokenizer, name="alone")


def test_an_engine_without_a_draft_reads_documents_whole() -> None:
    with served(draftless(), max_tokens=3) as found:
        client = found.sync()
        answer: Any = client.chat.completions.create(
            model="alone", messages=ASKED, extra_body={"documents": TEXTS}
        )
        assert answer.draftsieve["method"] is None
        with pytest.raises(BadRequestError, match="no draft model"):
            client.chat.completions.create(
                model="alone",
                messages=ASKED,
                extra_body={"documents": TEXTS, "draftsieve": {**METHOD, "on_error": "raise"}},
            )
