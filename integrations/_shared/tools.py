"""Tools and structured output in the spellings of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from ...core.errors import GrammarError
from ...core.grammar import Grammar
from ...core.prompt.tool_calls import answer_grammar, stated_schema

_SPELLINGS = {None: "auto", "required": "any", True: "any", False: "none"}


def choice_of(tool_choice: Any) -> str:
    """One spelling of the ways to choose a tool.

    Args:
        tool_choice: None, "auto", "any", "required", "none", a bool, a tool's name, or OpenAI's
            {"type": "function", "function": {"name": ...}}.

    Returns:
        "auto", "any", "none" or a tool's name.

    Raises:
        GrammarError: It is none of these.
    """
    if isinstance(tool_choice, Mapping):
        tool_choice = (tool_choice.get("function") or tool_choice).get("name", tool_choice)
    if isinstance(tool_choice, str | bool | None):
        return str(_SPELLINGS.get(tool_choice, tool_choice))
    raise GrammarError(
        f'tool_choice={tool_choice!r}: give "auto", "any", "none" or the name of a tool.'
    )


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


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid4().hex}"
