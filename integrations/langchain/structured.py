"""`with_structured_output` by constrained decoding of the schema itself."""

from __future__ import annotations

import json
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass


def json_output(
    model: BaseChatModel, schema: Any, method: str, include_raw: bool
) -> Runnable[Any, Any]:
    """Bind a JSON response format and parse what comes back.

    Args:
        model: A chat model that takes `response_format`.
        schema: A pydantic class, a TypedDict, or a JSON schema.
        method: "json_schema", or "json_mode" for any JSON object.
        include_raw: Return {"raw", "parsed", "parsing_error"} instead of raising.
    """
    answering = model.bind(
        response_format=_response_format(schema, method),
        ls_structured_output_format={"kwargs": {"method": method}, "schema": schema},
    )
    parser: JsonOutputParser = _WholeJson()
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        parser = _WholeObject(pydantic_object=schema)
    if not include_raw:
        return answering | parser
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=answering) | parsed.with_fallbacks(
        [unparsed], exception_key="parsing_error"
    )


class _WholeJson(JsonOutputParser):
    """LangChain's parser completes JSON that was cut off; this one raises."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if not partial:
            _check_whole(result[0].text)
        return super().parse_result(result, partial=partial)


class _WholeObject(PydanticOutputParser[Any]):
    """The same for pydantic objects."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        if not partial:
            _check_whole(result[0].text)
        return super().parse_result(result, partial=partial)


def _check_whole(text: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise OutputParserException(
            f"The answer is no whole JSON ({error}): allow more max_tokens.", llm_output=text
        ) from error


def _response_format(schema: Any, method: str) -> dict[str, Any]:
    """OpenAI's form."""
    if method == "json_mode":
        return {"type": "json_object"}
    found = convert_to_json_schema(schema)
    named = {"name": str(found.get("title", "answer")), "schema": found}
    return {"type": "json_schema", "json_schema": named}
