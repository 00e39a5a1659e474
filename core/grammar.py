"""What an answer must look like: JSON of a schema, a regular expression, tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from .errors import GrammarError, MissingExtraError

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
"""Around a tool call, which is {"name": ..., "arguments": {...}}: the form of Hermes and Qwen."""

_JSON_STYLE: Mapping[str, Any] = {
    "whitespace_flexible": False,  # models that may add blanks can go on for ever
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "lenient": True,
}
_LISTED = ("anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "const"}
_LARGEST = 2**53 - 1


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like, for `Generation(grammar=...)`. Equal grammars are shared.

    Make one with `json_schema`, `regex` or `tool_calls`. An answer that `max_new_tokens` cuts off
    is the beginning of an allowed one, and its finish reason is "length".

    Raises:
        MissingExtraError: llguidance is not installed.
    """

    kind: Literal["json_schema", "regex", "lark"]
    source: str
    calls_first: bool = False  # an answer that does not begin with a tool call holds none

    def __post_init__(self) -> None:
        if find_spec("llguidance") is None:
            raise MissingExtraError(
                "Constrained decoding (tools, structured output, grammars) needs llguidance, "
                'which is not installed: pip install "draftsieve[tools]"'
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that fits a schema, on one line.

        Args:
            schema: A JSON schema. Objects take only the properties it names, in its order, unless
                it sets "additionalProperties"; integers without bounds stay within 2**53, as
                RFC 7493 wants it. Keywords that cannot be enforced are ignored with a logged
                warning.
        """
        return cls("json_schema", json.dumps(_styled(schema), ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression (Rust's syntax, no look-around) matches as a whole."""
        return cls("regex", pattern)

    @classmethod
    def tool_calls(
        cls,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "auto",
        *,
        parallel: bool = True,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar:
        """Calls of tools with arguments that fit their schemas; `core.tools` reads them.

        Args:
            tools: OpenAI's form: {"type": "function", "function": {"name", "description",
                "parameters"}}, or the inner mapping alone.
            choice: "auto" for text, calls or both, "any" for calls only, or the name of the tool
                that must be called.
            parallel: Allow several calls in one answer.
            answer: JSON schema of what may be said instead of calls where the choice is "auto":
                the answer is then calls alone or such JSON alone. None allows any text.

        Raises:
            GrammarError: There are no tools, or none of that name.
        """
        functions = [tool.get("function", tool) for tool in tools]
        known = [function["name"] for function in functions]
        if not functions or choice not in ("auto", "any", *known):
            raise GrammarError(
                f"tool_choice={choice!r}, but the tools are {known}: "
                'give "auto", "any" or the name of one of them.'
            )
        wanted = [f for f in functions if choice in ("auto", "any", f["name"])]
        schema = answer if choice == "auto" else None
        free = choice == "auto" and schema is None
        return cls("lark", _calls_grammar(wanted, free, parallel, schema), schema is not None)


def _calls_grammar(
    functions: Sequence[Mapping[str, Any]],
    free: bool,
    parallel: bool,
    answer: Mapping[str, Any] | None,
) -> str:
    """Tool calls in llguidance's dialect of Lark; `free` allows text around them."""
    lines = ["%llguidance {}"]
    if free:  # a lazy lexeme ends where it first can: text can never hold the start of a call
        lines.append(f"start: {'call*' if parallel else 'call?'} text")
        lines.append(f'text: TEXT\nTEXT: /(.|\\n)*/\nopen[lazy]: TEXT "{CALL_START}"')
        lines.append(f'call: open "\\n" tool "\\n{CALL_END}"')
    else:
        lines.append(f"start: calls {'' if answer is None else '| answer'}")
        lines.append(f"calls: call {'(_more call)*' if parallel else ''}")
        lines.append(f'_more: "\\n"\ncall: "{CALL_START}\\n" tool "\\n{CALL_END}"')
    if answer is not None:
        lines.append(f"answer: %json {json.dumps(_styled(answer), ensure_ascii=False)}")
    lines.append("tool: " + " | ".join(f"tool_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        name = json.dumps(function["name"], ensure_ascii=False)
        head = json.dumps(f'{{"name": {name}, "arguments": ', ensure_ascii=False)
        schema = _styled(function.get("parameters") or {"type": "object", "properties": {}})
        lines.append(f'tool_{i}: {head} %json {json.dumps(schema, ensure_ascii=False)} "}}"')
    return "\n".join(lines) + "\n"


def _styled(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with closed objects and our way of writing JSON."""
    if not isinstance(schema, Mapping):
        raise GrammarError(f"A JSON schema is a mapping, not {type(schema).__name__}.")
    return {**_closed(schema), "x-guidance": dict(_JSON_STYLE)}


def _closed(schema: Any) -> Any:
    """The schema with bounded integers, and objects that take only the properties they name.

    Branches of "allOf" stay open: each of them names only its share.
    """
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _NAMED:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(value) for name, value in found[key].items()}
    for key in _LISTED:
        if isinstance(found.get(key), list):
            found[key] = [_closed(value) for value in found[key]]
    for key in ("items", "additionalProperties"):
        if key in found:
            found[key] = _closed(found[key])
    if "properties" in found and "allOf" not in found:
        found.setdefault("additionalProperties", False)
    if found.get("type") == "integer" and not found.keys() & _BOUNDS:
        found |= {"minimum": -_LARGEST, "maximum": _LARGEST}
    return found
