"""Chat requests in a proxy's hands: what is shortened, and what stays as it came."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest

from draftsieve import SpecPC
from draftsieve.core.conversation.once import OnceCompressor
from draftsieve.core.conversation.turns import ShortTurn
from draftsieve.core.errors import PromptError
from draftsieve.integrations.server.chat_bodies import shorten_chat

from .adapters_fixtures import TEXTS, tiny_compressor

LONG = " ".join(TEXTS * 4)
SENTENCES = SpecPC(ratio=0.4, unit="sentence")


def _once(**options: Any) -> OnceCompressor:
    return OnceCompressor(tiny_compressor(), SENTENCES, **options)


def _called(question: str, *results: Any) -> list[dict[str, Any]]:
    """A user's question, the tools that the assistant calls, and their results."""
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        for n in range(len(results))
    ]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": f"c{n}", "content": r} for n, r in enumerate(results)),
    ]


def test_tool_results_are_shortened_and_nothing_else() -> None:
    body = {
        "model": "anything",
        "messages": [{"role": "system", "content": LONG}, *_called("When does it leave?", LONG)],
        "tools": [{"type": "function", "function": {"name": "look", "description": LONG}}],
        "stream": True,
        "unknown_field": {"of": [1.5, None]},
    }
    before = deepcopy(body)
    found = shorten_chat(body, _once().shorten)
    assert body == before
    assert found.changed
    assert 0 < found.tokens < found.original_tokens
    result = found.body["messages"][-1]
    assert len(result["content"]) < len(LONG)
    assert result["tool_call_id"] == "c0"
    assert found.texts == ((LONG, result["content"]),)
    expected = deepcopy(before)
    expected["messages"][-1]["content"] = result["content"]  # type: ignore[index]
    assert found.body == expected


def test_a_result_becomes_the_same_in_every_later_turn() -> None:
    """Also after a restart: nothing but the text and its turn's request decides."""
    messages = _called("When does the ferry leave?", LONG, TEXTS[0] * 9)
    first = shorten_chat({"messages": messages}, _once().shorten)
    assert len(first.texts) == 2
    later = [*messages, {"role": "assistant", "content": "At seven."}]
    later += _called("And what do tickets cost?", LONG)
    second = shorten_chat({"messages": later}, _once().shorten)
    assert second.body["messages"][:4] == first.body["messages"]
    assert second.body["messages"][-1]["content"] != first.body["messages"][2]["content"]


def test_up_to_the_last_cache_mark_nothing_changes() -> None:
    messages = _called("When does the ferry leave?", LONG)
    marked = deepcopy(messages)
    marked[2]["content"] = [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}]
    assert not shorten_chat({"messages": marked}, _once().shorten).changed
    more = [*marked, {"role": "assistant", "content": "At seven."}, *_called("And?", LONG)]
    found = shorten_chat({"messages": more}, _once().shorten)
    assert found.body["messages"][:4] == more[:4]
    assert len(found.texts) == 1


def test_documents_in_any_form_are_shortened_together() -> None:
    documents = [LONG, {"title": "a", "text": LONG}, {"data": LONG, "id": 7}, {"snippet": LONG}, 3]
    body = {
        "messages": [{"role": "user", "content": "When does it leave?"}],
        "documents": documents,
    }
    found = shorten_chat(body, _once().shorten).body["documents"]
    assert len(found[0]) < len(LONG)
    assert (found[1]["title"], found[2]["id"]) == ("a", 7)
    assert len(found[1]["text"]) + len(found[2]["data"]) < 2 * len(LONG)
    assert found[3:] == documents[3:]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "text"},
        {"messages": [None, 3, {"role": "tool", "content": LONG}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"messages": [{"role": "user", "content": "  "}, {"role": "tool", "content": LONG}]},
        {"messages": [{"role": "user", "content": "When?"}, {"role": "tool", "content": "short"}]},
        {"messages": [{"role": "user", "content": "When?"}], "documents": {"text": LONG}},
    ],
)
def test_what_cannot_be_shortened_goes_on_as_it_is(body: dict[str, Any]) -> None:
    found = shorten_chat(body, _once().shorten)
    assert not found.changed
    assert json.dumps(found.body) == json.dumps(body)


def test_texts_are_read_once() -> None:
    once, asked = _once(remember=2), []
    inner = once.compressor

    class Counting:
        count_tokens = staticmethod(inner.count_tokens)

        def compress(self, question: str, texts: Sequence[str], *rest: Any, **more: Any) -> Any:
            asked.append(question)
            return inner.compress(question, texts, *rest, **more)

    once.compressor = Counting()  # type: ignore[assignment]
    first = once.shorten("When?", [LONG])
    assert once.shorten("When?", [LONG]) is first
    assert asked == ["When?"]
    once.shorten("What?", [LONG])
    once.shorten("Who?", [LONG])
    assert once.shorten("When?", [LONG]) == first  # forgotten, and the same again
    assert asked == ["When?", "What?", "Who?", "When?"]
    assert isinstance(first[0], ShortTurn)
    assert first[0].text
    with pytest.raises(PromptError, match="question is empty"):
        once.shorten(" ", [LONG])
