"""The draft alone behind other servers' models: conversations, originals, reranking."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsieve.core.config import DEFAULT_METHOD
from draftsieve.core.errors import OutOfMemoryError, StoreError
from draftsieve.integrations.server.originals import Originals, hash_of

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine
from .served import Served, served
from .test_server import draftless

LONG = " ".join(TEXTS[1:] * 12)
OTHER = " ".join(TEXTS[:2] * 12)
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You know the harbour of Holm. " * 12},
    {"role": "user", "content": "What do you know?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "read", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": LONG, "name": "read", "x-mine": [1]},
    {"role": "assistant", "content": "I know a lot."},
    {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(tiny_engine(), max_tokens=5) as found:
        yield found


def compressed(server: Served, messages: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    body = {"messages": messages, "model": "gpt-9", "config": {"mode": "ccr", **config}}
    answer = server.web.post("/v1/compress", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_tool_result_is_shortened_and_all_else_stays(server: Served) -> None:
    found = compressed(server, TALK, ratio=0.4)
    assert found["fallback"] is None
    assert found["tokens_before"] > found["tokens_after"]
    assert found["tokens_saved"] == found["tokens_before"] - found["tokens_after"]
    assert found["compression_ratio"] == found["tokens_after"] / found["tokens_before"]
    sent = found["messages"]
    assert [m for i, m in enumerate(sent) if i != 3] == [m for i, m in enumerate(TALK) if i != 3]
    assert sent[3] | {"content": LONG} == TALK[3]
    assert len(sent[3]["content"]) < 0.7 * len(LONG)
    # what LiteLLM looks for
    assert re.findall(r"hash=([a-f0-9]{24})", sent[3]["content"]) == found["ccr_hashes"]
    (key,) = found["ccr_hashes"]
    back = server.web.get(f"/v1/retrieve/{key}", params={"query": "tickets"})
    assert back.json() == {"hash": key, "original_content": LONG}
    assert server.web.get("/v1/retrieve/" + "0" * 24).status_code == 404


def test_what_was_sent_once_stays_the_same_bytes(server: Served) -> None:
    first = compressed(server, TALK, ratio=0.4)["messages"]
    more = [
        *TALK,
        {"role": "assistant", "content": "At seven."},
        {"role": "tool", "tool_call_id": "b", "content": OTHER},
        {"role": "user", "content": "And where are tickets sold?"},
    ]
    second = compressed(server, more, ratio=0.4)["messages"]
    assert second[: len(first)] == first
    assert len(second[-2]["content"]) < len(OTHER)


def test_a_long_conversation_only_grows_at_its_end(server: Served) -> None:
    """Also where long texts are the newest at first, and so have to stay whole."""
    talk: list[dict[str, Any]] = [{"role": "assistant", "content": "What do you need?"}]
    sent: list[dict[str, Any]] = []
    for turn in range(8):
        text = f"Turn {turn}. {LONG if turn % 2 else OTHER}"
        if turn % 3 == 2:
            talk += [{"role": "assistant", "content": text}]
        else:
            talk += [{"role": "tool", "tool_call_id": "a", "content": text}]
        talk += [{"role": "user", "content": f"{QUESTION} {turn} {text if turn == 3 else ''}"}]
        found = compressed(server, talk, ratio=0.5)
        assert found["fallback"] is None
        assert found["messages"][: len(sent)] == sent
        sent = found["messages"]
    assert found["tokens_after"] < 0.85 * found["tokens_before"]


def test_what_a_provider_caches_is_not_touched(server: Served) -> None:
    marked = json.loads(json.dumps(TALK))
    marked[3]["content"] = [
        {"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}},
    ]
    marked.insert(4, {"role": "tool", "tool_call_id": "a", "content": OTHER})
    sent = compressed(server, marked, ratio=0.4)["messages"]
    assert sent[:4] == marked[:4]
    assert len(sent[4]["content"]) < len(OTHER)


def test_a_capacity_is_kept_or_refused(server: Served) -> None:
    talk = [{"role": "system", "content": "Another conversation."}, *TALK]
    capacity = round(compressed(server, TALK)["tokens_before"] * 0.8)
    assert compressed(server, talk, capacity=capacity)["tokens_after"] <= capacity
    other = [{"role": "system", "content": "A third one."}, *TALK]
    whole = compressed(server, other, ratio=1.0)
    assert whole["messages"] == other
    assert whole["ccr_hashes"] == []
    body = {"messages": TALK, "config": {"capacity": 5}}
    answer = server.web.post("/v1/compress", json=body)
    assert answer.status_code == 400
    assert "a capacity of" in answer.json()["error"]["message"]


def test_a_gateway_that_holds_back_requests_and_answers(server: Served) -> None:
    """LiteLLM sends only what may be shortened; a request comes once it is not the newest."""
    one, two, three = (
        {"role": "tool", "tool_call_id": "a", "content": f"Result {n}. {text}"}
        for n, text in enumerate((LONG, OTHER, LONG))
    )
    request = {"role": "user", "content": "Read the timetables of the ferry."}
    first = compressed(server, [one])
    assert first["fallback"] is None
    assert first["tokens_after"] < 0.7 * first["tokens_before"]
    assert len(first["ccr_hashes"]) == 1
    later = compressed(server, [request, one, two])["messages"]
    assert later[:2] == [request, first["messages"][0]]
    assert len(later[2]["content"]) < len(two["content"])
    last = compressed(server, [request, one, two, request, three])["messages"]
    assert last[:3] == later
    assert len(last[4]["content"]) < len(three["content"])


def test_what_fails_stays_whole_and_it_is_said(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OutOfMemoryError("There is no memory for the draft.")

    monkeypatch.setattr(type(tiny_engine().compressor), "compress_prompt", fails)
    fresh = [{**TALK[3], "content": f"Once more. {LONG}"}]
    found = compressed(server, fresh, ratio=0.4)
    assert found["messages"] == fresh
    assert found["fallback"].startswith("OutOfMemoryError")
    assert (found["tokens_saved"], found["ccr_hashes"]) == (0, [])


def test_tenants_never_meet(tmp_path: Path) -> None:
    keys = {"north": "n", "south": "s"}
    north, south = ({"Authorization": f"Bearer {key}"} for key in keys.values())
    file = tmp_path / "originals.sqlite"
    with served(tiny_engine(), api_keys=keys, originals=file) as found:
        body = {"messages": TALK, "config": {"ratio": 0.4}}
        web = found.web
        (key,) = web.post("/v1/compress", json=body, headers=north).json()["ccr_hashes"]
        assert web.get(f"/v1/retrieve/{key}", headers=north).status_code == 200
        assert web.get(f"/v1/retrieve/{key}", headers=south).status_code == 404
        assert web.get(f"/v1/retrieve/{key}").status_code == 401
        assert web.post("/v1/compress", json=body, headers=south).json()["ccr_hashes"] == [key]
        assert web.get(f"/v1/retrieve/{key}", headers=south).status_code == 200
    assert file.stat().st_mode & 0o077 == 0
    again = Originals(file)
    assert again.get("north", key) == LONG
    again.close()


def test_originals_leave_when_old_or_too_many(tmp_path: Path) -> None:
    now = [0.0]
    kept = Originals(max_bytes=250, max_seconds=60, clock=lambda: now[0])
    for second in range(3):
        now[0] = float(second)
        kept.put("a", {str(second): "x" * 80})
    assert kept.get("a", "0") is not None  # read: younger than 1 and 2 now
    now[0] = 5.0
    kept.put("b", {"3": "y" * 80})
    assert [kept.get("a", key) is None for key in "012"] == [False, True, False]
    now[0] = 64.9
    assert kept.get("b", "3") == "y" * 80
    now[0] = 200.0
    assert kept.get("b", "3") is None
    kept.close()
    (tmp_path / "text").write_text("this is no database, but a text that is long enough" * 30)
    for wrong in (tmp_path / "text", tmp_path / "no" / "folder"):
        with pytest.raises(StoreError, match="cannot be kept or read"):
            Originals(wrong)


def test_a_store_that_fails_leaves_the_conversation_whole(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Originals, "_shrink", full)
    fresh = [*TALK[:3], {**TALK[3], "content": OTHER + " New."}, *TALK[4:]]
    found = compressed(server, fresh, ratio=0.4)
    assert found["messages"] == fresh
    assert "disk is full" in found["fallback"]
    assert server.web.get(f"/v1/retrieve/{hash_of(OTHER + ' New.')}").status_code == 404


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_reranking(server: Served, path: str) -> None:
    documents = [TEXTS[0], {"text": TEXTS[1]}, {"id": "m", "content": TEXTS[2]}]
    body = {"model": "rerank-v9", "query": QUESTION, "documents": documents}
    found = server.web.post(path, json=body).json()
    context = tiny_engine().compress(QUESTION, TEXTS, DEFAULT_METHOD)
    assert sorted(each["index"] for each in found["results"]) == [0, 1, 2]
    scores = [each["relevance_score"] for each in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    for each in found["results"]:
        assert each["relevance_score"] == context.sizes[each["index"]].score
        assert each["document"] == {"text": TEXTS[each["index"]]}
        assert each["pruned_text"] == context.passages[each["index"]].text
    assert found["model"] == "rerank-v9"
    top = server.web.post(path, json={**body, "top_n": 1, "return_documents": False}).json()
    (best,) = top["results"]
    assert best.keys() == {"index", "relevance_score", "pruned_text"}
    assert best["index"] == found["results"][0]["index"]
    for wrong in ({"documents": []}, {"query": ""}, {"top_n": 0}, {"documents": [{"a": 1}]}):
        assert server.web.post(path, json={**body, **wrong}).status_code == 400


def test_malformed_conversations(server: Served) -> None:
    odd: list[Any] = [None, 5, "", "a", "\ud800", [], {}, [5], [{"type": "text"}], {"role": 5}]
    statuses = set()
    for seed in range(150):
        chance = random.Random(seed)
        talk = json.loads(json.dumps(TALK))
        for _ in range(chance.randint(1, 3)):
            message = chance.choice(talk)
            message[chance.choice(["role", "content", "tool_calls"])] = chance.choice(odd)
        body = {"messages": talk, "config": {"ratio": chance.choice([0.3, 0.5])}}
        head = {"content-type": "application/json"}
        answer = server.web.post("/v1/compress", content=json.dumps(body), headers=head)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400), (seed, answer.text)
    assert statuses == {200, 400}


def test_an_engine_without_a_draft_says_so() -> None:
    with served(draftless()) as found:
        for path, body in (
            ("/v1/compress", {"messages": TALK}),
            ("/v1/rerank", {"query": "a", "documents": ["a"]}),
        ):
            answer = found.web.post(path, json=body)
            assert answer.status_code == 400
            assert "no draft model" in answer.json()["error"]["message"]
