"""Tools: how they stand in a prompt, and how calls are read from an answer.

A call is written as Hermes and Qwen models write it: `<tool_call>`, a line with
{"name": ..., "arguments": {...}}, `</tool_call>`. Templates that know this form describe the tools
themselves; for all others the system text describes them, earlier calls stand in the assistant's
text, and results stand in a user message between `<tool_response>` lines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import GrammarError
from ..grammar import CALL_END, CALL_START, Grammar
from ..types import Segment, ToolCall
from .messages import Message, Part, add_system, call_arguments

_RESULT_START, _RESULT_END = "<tool_response>\n", "\n</tool_response>"
_DESCRIPTION = (
    "You can call these functions, each described by a JSON schema:\n{schemas}\n\n"
    'To call one, write {start}, a line with {{"name": its name, "arguments": its arguments as '
    "JSON}}, and {end}."
)


@dataclass(slots=True)
class ToolReader:
    """Splits an answer into text and tool calls while it comes in.

    Text that may become the start of a call is held back until that is decided; so is a call
    until it ends. White space behind a call is dropped.

    Args:
        calls_first: Calls stand at the beginning or nowhere (`Grammar.calls_first`), so that JSON
            whose strings spell a call stays text.
    """

    calls_first: bool = False
    # calls that are cut off or no valid JSON, as they stand in the answer
    broken: list[str] = field(default_factory=list)
    _held: str = ""
    _inside: bool = False
    _after_call: bool = False
    _no_calls: bool | None = None  # None: the answer's beginning does not say it yet

    def push(self, piece: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Take the next text and return the text and the calls that are now certain."""
        self._held += piece
        if self._holds_no_calls():
            text, self._held = self._held, ""
            return text, ()
        text, calls = "", []
        while True:
            if not self._inside and self._after_call:
                self._held = self._held.lstrip()
                self._after_call = not self._held
            before, mark, rest = self._held.partition(CALL_END if self._inside else CALL_START)
            if not mark:
                break
            self._held = rest
            if self._inside:
                calls += self._read(before)
            else:
                text += before
            self._inside = not self._inside
            self._after_call = not self._inside
        if not self._inside:
            ready = len(self._held) - _overlap(self._held, CALL_START)
            text, self._held = text + self._held[:ready], self._held[ready:]
        return text, tuple(calls)

    def close(self) -> str:
        """End the answer: the text still held back; a call without end counts as broken."""
        rest, self._held = self._held, ""
        if self._inside:
            self.broken.append(CALL_START + rest)
            return ""
        return rest

    def _holds_no_calls(self) -> bool:
        """Whether the answer began with something else than a call where calls come first."""
        if self.calls_first and self._no_calls is None:
            head = self._held[: len(CALL_START)]
            if len(head) == len(CALL_START) or not CALL_START.startswith(head):
                self._no_calls = head != CALL_START
        return bool(self._no_calls)

    def _read(self, text: str) -> list[ToolCall]:
        """One call, or none and an entry in `broken`."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments") or {}
            if isinstance(name, str) and isinstance(arguments, dict):
                return [ToolCall(name, arguments)]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        self.broken.append(CALL_START + text + CALL_END)
        return []


def parse_tool_calls(
    text: str, calls_first: bool = False
) -> tuple[str, tuple[ToolCall, ...], tuple[str, ...]]:
    """Split a whole answer into its text, its tool calls, and calls that cannot be read.

    Args:
        text: The answer.
        calls_first: As for `ToolReader`.
    """
    reader = ToolReader(calls_first)
    said, calls = reader.push(text)
    said += reader.close()
    return said, calls, tuple(reader.broken)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest tail of the text that the mark starts with."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


def stated_schema(response_format: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The JSON schema that the prompt shall state; None where there is none to state.

    Args:
        response_format: OpenAI's: None, {"type": "text"}, {"type": "json_object"}, or
            {"type": "json_schema", "json_schema": {"schema": ...}}.

    Raises:
        GrammarError: It is none of these.
    """
    wanted = response_format or {"type": "text"}
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    named = wanted.get("json_schema") if kind == "json_schema" else None
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if kind not in ("text", "json_object") and not isinstance(schema, Mapping):
        raise GrammarError(
            f"response_format={response_format!r} is not understood: give OpenAI's mapping, "
            '{"type": "json_schema", "json_schema": {"schema": ...}} or {"type": "json_object"}.'
        )
    return schema


def answer_grammar(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str,
    parallel: bool,
    response_format: Mapping[str, Any] | None,
) -> Grammar | None:
    """What an answer may be: calls of tools, JSON, either of the two, or (None) anything.

    Args:
        tools: Schemas of tools that may be called.
        choice: As for `Grammar.tool_calls`.
        parallel: The same.
        response_format: As for `stated_schema`; counts where the choice leaves words to say.

    Raises:
        GrammarError: Tools or response format cannot be used.
    """
    schema = stated_schema(response_format)
    if response_format is not None and response_format["type"] == "json_object":
        schema = {"type": "object"}
    if tools:
        return Grammar.tool_calls(tools, choice, parallel=parallel, answer=schema)
    return None if schema is None else Grammar.json_schema(schema)


def knows_tools(template: str | Mapping[str, str] | None) -> bool:
    """Whether a chat template (or one of several) writes calls as `ToolReader` reads them."""
    return CALL_START in str(template)


def in_plain_words(
    turns: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> list[Message]:
    """Say with text alone what tools there are, which were called, and what they returned.

    Args:
        turns: The messages.
        tools: Schemas of the tools, or None.

    Returns:
        Messages of system, user and assistant without "tool_calls"; results that follow each
        other share a message.
    """
    said: list[Message] = []
    for turn in turns:
        if turn.role == "tool":
            result = _result(turn)
            if said and said[-1].role == "user" and said[-1].extra.get("results"):
                gap = Part("\n", Segment.MESSAGE)
                said[-1] = replace(said[-1], parts=(*said[-1].parts, gap, *result))
            else:
                said.append(Message("user", result, {"results": True}))
        else:
            said.append(_with_calls(turn))
    said = [replace(turn, extra=_without(turn.extra, "results")) for turn in said]
    return _described(said, tools) if tools else said


def _result(turn: Message) -> tuple[Part, ...]:
    front, back = (Part(text, Segment.MESSAGE) for text in (_RESULT_START, _RESULT_END))
    return (front, *turn.parts, back)


def _with_calls(turn: Message) -> Message:
    calls = turn.extra.get("tool_calls")
    if not calls:
        return turn
    gap = "\n" if turn.parts else ""
    text = gap + "\n".join(_call_text(call.get("function", call)) for call in calls)
    parts = (*turn.parts, Part(text, Segment.MESSAGE))
    return Message(turn.role, parts, _without(turn.extra, "tool_calls", "content"))


def _call_text(function: Mapping[str, Any]) -> str:
    name = function["name"]
    call = {"name": name, "arguments": call_arguments(name, function.get("arguments"))}
    return f"{CALL_START}\n{json.dumps(call, ensure_ascii=False)}\n{CALL_END}"


def _described(turns: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with the description of the tools in the system text."""
    functions = (tool.get("function", tool) for tool in tools)
    schemas = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    text = _DESCRIPTION.format(schemas=schemas, start=CALL_START, end=CALL_END)
    return add_system(turns, text)


def _without(extra: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in extra.items() if key not in names}
