"""Tools in the spellings of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from ...core.errors import GrammarError

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


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{uuid4().hex}"
