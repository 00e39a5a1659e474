"""`with_structured_output`: constrained decoding of a schema, and parsers that say what is missing.

An answer that `max_tokens` cuts off is never completed and never None: it is an error that says so.
"""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    PydanticToolsParser,
)
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import (
    convert_to_json_schema,
    convert_to_openai_tool,
)
from langchain_core.utils.pydantic import is_basemodel_subclass

from .._shared.report import cut_off


def structured(
    model: BaseChatModel, schema: Any, method: str, include_raw: bool
) -> Runnable[Any, Any]:
    """Ask for an object of a schema and parse what comes back.

    Args:
        model: A chat model that takes `response_format` and tools.
        schema: A pydantic class, a TypedDict, or a JSON schema.
        method: "function_calling", "json_schema", or "json_mode" for any JSON object.
        include_raw: Return {"raw", "parsed", "parsing_error"} instead of raising.
    """
    told = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
    if method == "function_calling":
        answering = model.bind_tools([schema], tool_choice="any", **told)
    else:
        answering = model.bind(response_format=_response_format(schema, method), **told)
    parser = _parser(schema, method)
    if not include_raw:
        return answering | parser
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=answering) | parsed.with_fallbacks(
        [unparsed], exception_key="parsing_error"
    )


def _parser(schema: Any, method: str) -> Runnable[Any, Any]:
    pydantic = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        if pydantic:
            return _CallOfClass(tools=[schema], first_tool_only=True)
        name = convert_to_openai_tool(schema)["function"]["name"]
        return _CallByName(key_name=name, first_tool_only=True)
    return _WholeObject(pydantic_object=schema) if pydantic else _WholeJson()


class _CallOfClass(PydanticToolsParser):
    """LangChain's parser gives None where there is no whole call; this one raises."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if _is_whole(result[0], partial):
            _check_call(result[0])
        return super().parse_result(result, partial=partial)


class _CallByName(JsonOutputKeyToolsParser):
    """The same for dicts."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if _is_whole(result[0], partial):
            _check_call(result[0])
        return super().parse_result(result, partial=partial)


class _WholeJson(JsonOutputParser):
    """LangChain's parser completes JSON that was cut off; this one raises."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if _is_whole(result[0], partial):
            _check_json(result[0])
        return super().parse_result(result, partial=partial)


class _WholeObject(PydanticOutputParser[Any]):
    """The same for pydantic objects."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if _is_whole(result[0], partial):
            _check_json(result[0])
        return super().parse_result(result, partial=partial)


def _is_whole(answer: Generation, partial: bool) -> bool:
    """Whether nothing more is to come; in a stream the last piece says so."""
    message = answer.message if isinstance(answer, ChatGeneration) else None
    return not partial or getattr(message, "chunk_position", None) == "last"


def _check_call(answer: Generation) -> None:
    message = answer.message if isinstance(answer, ChatGeneration) else None
    if not isinstance(message, AIMessage) or not message.tool_calls:
        raise _missing(answer, "whole tool call")


def _check_json(answer: Generation) -> None:
    try:
        json.loads(answer.text)
    except ValueError as error:
        raise _missing(answer, "whole JSON") from error


def _missing(answer: Generation, what: str) -> OutputParserException:
    message = answer.message if isinstance(answer, ChatGeneration) else None
    report = {} if message is None else message.response_metadata
    usage = getattr(message, "usage_metadata", None) or {}
    broken = [call["args"] or "" for call in getattr(message, "invalid_tool_calls", ())]
    why = cut_off(report.get("finish_reason"), usage.get("output_tokens"), what)
    return OutputParserException(why, llm_output="".join([answer.text, *broken]))


def _response_format(schema: Any, method: str) -> dict[str, Any]:
    """OpenAI's form."""
    if method == "json_mode":
        return {"type": "json_object"}
    found = convert_to_json_schema(schema)
    named = {"name": str(found.get("title", "answer")), "schema": found}
    return {"type": "json_schema", "json_schema": named}
