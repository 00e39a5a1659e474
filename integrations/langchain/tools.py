"""Tool calls in LangChain's terms."""

from __future__ import annotations

import json
from collections.abc import Sequence

from langchain_core.messages import InvalidToolCall, ToolCallChunk
from langchain_core.messages import ToolCall as Call
from langchain_core.messages.tool import invalid_tool_call, tool_call_chunk
from langchain_core.messages.tool import tool_call as as_call

from ...core.types import ToolCall
from .._shared.tools import new_call_id

TOOL_OPTIONS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
BROKEN = "The call is cut off or no valid JSON."


def as_calls(calls: Sequence[ToolCall]) -> list[Call]:
    """The core's calls with fresh ids."""
    return [as_call(name=c.name, args=dict(c.arguments), id=new_call_id()) for c in calls]


def as_invalid_calls(broken: Sequence[str]) -> list[InvalidToolCall]:
    """Calls that cannot be read, as their text."""
    return [invalid_tool_call(args=text, id=new_call_id(), error=BROKEN) for text in broken]


def as_call_chunks(
    calls: Sequence[ToolCall], broken: Sequence[str], first: int
) -> list[ToolCallChunk]:
    """The core's calls as chunks, each whole, numbered from `first`.

    The text of a broken one is no JSON, so the sum of the chunks has it among its invalid calls.
    """
    texts: list[tuple[str | None, str]] = [
        *((call.name, json.dumps(call.arguments, ensure_ascii=False)) for call in calls),
        *((None, text) for text in broken),
    ]
    return [
        tool_call_chunk(name=name, args=text, id=new_call_id(), index=first + place)
        for place, (name, text) in enumerate(texts)
    ]
