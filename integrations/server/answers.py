"""Answers of the core in OpenAI's form, whole and as the events of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from ...core.config import Method
from ...core.types import Answer, Chunk, ToolCall, Usage
from .._shared.report import report
from .._shared.tools import new_call_id

Kind = Literal["chat.completion", "text_completion"]
DONE = "data: [DONE]\n\n"


@dataclass(slots=True)
class Reply:
    """One response: its id, its kind, and how its parts are written.

    Args:
        kind: Whether it is of a chat or of a text completion.
        model: What the response calls the model.
        method: The method that was asked for.
        usage: Whether a stream ends with the usage.
    """

    kind: Kind
    model: str
    method: Method | None
    usage: bool = False
    called: int = 0  # tool calls told so far
    id: str = field(default_factory=lambda: uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The response without a stream."""
        choice = {"index": 0, "finish_reason": _reason(answer), "logprobs": None}
        if self.kind == "chat.completion":
            calls = self._calls(answer.tool_calls)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": answer.text or (None if calls else ""),
                "refusal": None,
            }
            choice["message"] = {**message, **({"tool_calls": calls} if calls else {})}
        else:
            choice["text"] = answer.text
        return {
            **self._head(self.kind),
            "choices": [choice],
            "usage": usage_of(answer.usage),
            "draftsieve": self._report(answer),
        }

    def first(self) -> list[str]:
        """Events before all text."""
        if self.kind != "chat.completion":
            return []
        return [self._event(_delta({"role": "assistant", "content": ""}))]

    def events(self, chunk: Chunk) -> list[str]:
        """Events of a piece; the last one carries the answer."""
        told = []
        if chunk.text:
            chat = self.kind == "chat.completion"
            told.append(_delta({"content": chunk.text}) if chat else _text(chunk.text))
        if chunk.tool_calls:
            calls = self._calls(chunk.tool_calls, self.called)
            self.called += len(calls)
            told.append(_delta({"tool_calls": calls}))
        events = [self._event(choice) for choice in told]
        return events if chunk.answer is None else [*events, *self._end(chunk.answer)]

    def _end(self, answer: Answer) -> list[str]:
        reason = _reason(answer)
        last = _delta({}, reason) if self.kind == "chat.completion" else _text("", reason)
        events = [self._event(last, draftsieve=self._report(answer))]
        if self.usage:
            events.append(
                _sse({**self._chunk_head(), "choices": [], "usage": usage_of(answer.usage)})
            )
        return [*events, DONE]

    def _event(self, choice: dict[str, Any], **more: Any) -> str:
        usage = {"usage": None} if self.usage else {}
        return _sse({**self._chunk_head(), "choices": [choice], **usage, **more})

    def _chunk_head(self) -> dict[str, Any]:
        chat = self.kind == "chat.completion"
        return self._head("chat.completion.chunk" if chat else self.kind)

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.kind == "chat.completion" else "cmpl-"
        return {
            "id": prefix + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _calls(self, calls: Sequence[ToolCall], first: int | None = None) -> list[dict[str, Any]]:
        """Calls as a message has them; with `index` from `first` on in a stream."""
        return [
            {
                **({} if first is None else {"index": first + place}),
                "id": new_call_id(),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for place, call in enumerate(calls)
        ]

    def _report(self, answer: Answer) -> dict[str, Any]:
        """How the answer came about: method, kept spans, sizes, seconds."""
        usage = answer.usage
        return {
            **report(answer, self.method),
            "original_prompt_tokens": usage.original_prompt_tokens,
            "prompt_tokens": usage.prompt_tokens,
            "cache_entries": usage.cache_entries,
            "broken_calls": list(answer.broken_calls),
        }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Count tokens OpenAI's way: the prompt is what the target really read."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": 0,
            "original_tokens": usage.original_prompt_tokens,
            "compressed_tokens": usage.prompt_tokens,
        },
    }


def error_event(body: dict[str, Any]) -> str:
    """What tells a client that its stream has failed."""
    return _sse(body) + DONE


def _reason(answer: Answer) -> str:
    if answer.finish_reason == "length":
        return "length"
    return "tool_calls" if answer.tool_calls else "stop"


def _delta(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def _text(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
