"""Tools and structured output in LangChain's terms: what a call asks for, and calls as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import InvalidToolCall, ToolCallChunk
from langchain_core.messages import ToolCall as Call
from langchain_core.messages.tool import invalid_tool_call, tool_call_chunk
from langchain_core.messages.tool import tool_call as as_call

from ...core.grammar import Grammar
from ...core.prompt.tool_calls import answer_grammar, stated_schema
from ...core.types import ToolCall
from .._shared.tools import choice_of, new_call_id

TOOL_OPTIONS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "response_format"})
BROKEN = "The call is cut off or no valid JSON."


def tools_of(options: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    """The tools that a call puts into the prompt; None if it may not use any."""
    return None if choice_of(options.get("tool_choice")) == "none" else options.get("tools")


def schema_of(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The JSON schema that a call's prompt states."""
    return stated_schema(options.get("response_format"))


def grammar_of(options: Mapping[str, Any]) -> Grammar | None:
    """What a call's tools and response format allow the answer to be; None for anything.

    Raises:
        GrammarError: They cannot be used.
    """
    choice = choice_of(options.get("tool_choice"))
    parallel = options.get("parallel_tool_calls")
    several = choice == "auto" if parallel is None else bool(parallel)
    return answer_grammar(tools_of(options), choice, several, options.get("response_format"))


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
