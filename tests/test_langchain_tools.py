"""Tools and structured output of ChatDraftSieve: what comes out fits its schema."""

from __future__ import annotations

import re
from itertools import count
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    HumanMessage,
)
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from draftsieve.core.errors import ConfigError, GrammarError
from draftsieve.core.grammar import Grammar
from draftsieve.integrations._shared import tools as shared_tools
from draftsieve.integrations.langchain import ChatDraftSieve

from .adapters_fixtures import (
    QUESTION,
    counted,
    tiny_engine,
)
from .langchain_fixtures import add, chat, llm, text_of


class Trip(BaseModel):
    """A trip by ferry."""

    to: Literal["Holm", "the harbour"]
    hour: int = Field(ge=0, le=23)


class TripDict(TypedDict):
    """A trip by ferry."""

    to: Literal["Holm", "the harbour"]
    open: bool


@tool
def opening(day: Literal["Sunday", "Monday"]) -> str:
    """Opening hours."""
    return "ten"


def talker(**options: Any) -> ChatDraftSieve:
    return chat(**{"max_tokens": 90, **options})


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"Trip", "opening"}),
        ("required", {"Trip", "opening"}),
        (True, {"Trip", "opening"}),
        ("opening", {"opening"}),
        ({"type": "function", "function": {"name": "Trip"}}, {"Trip"}),
    ],
)
def test_a_forced_call_is_valid(choice: Any, names: set[str]) -> None:
    model = talker().bind_tools([Trip, opening], tool_choice=choice)
    with counted(tiny_engine()) as calls:
        message = model.invoke(QUESTION)
    assert calls == ["generate"]
    (call,) = message.tool_calls
    assert call["name"] in names
    assert call["type"] == "tool_call"
    assert call["id"]
    if call["name"] == "Trip":
        Trip.model_validate(call["args"])
    else:
        assert opening.invoke(call).content == "ten"
    assert message.content == ""
    assert message.response_metadata["finish_reason"] == "stop"


def test_ids_of_calls_differ() -> None:
    model = talker().bind_tools([opening], tool_choice="any")
    ids = {model.invoke(QUESTION).tool_calls[0]["id"] for _ in range(2)}
    assert len(ids) == 2


def test_a_model_that_may_not_call_answers_as_without_tools() -> None:
    for choice in ("none", False):
        message = chat().bind_tools([opening], tool_choice=choice).invoke(QUESTION)
        assert message.content == chat().invoke(QUESTION).content
        assert message.tool_calls == []


def test_a_model_that_may_call_can_answer_in_words() -> None:
    message = talker(max_tokens=8).bind_tools([opening]).invoke(QUESTION)
    assert message.text
    assert message.tool_calls == message.invalid_tool_calls == []
    told = message.usage_metadata["input_tokens"]
    assert told > chat().invoke(QUESTION).usage_metadata["input_tokens"]


async def test_streamed_calls_add_up_to_the_answers() -> None:
    model = talker().bind_tools([Trip, opening], tool_choice="any", parallel_tool_calls=True)
    expected = model.invoke(QUESTION)
    assert expected.tool_calls
    assert len(expected.invalid_tool_calls) == 1  # the second one is cut off
    for chunks in (
        list(model.stream(QUESTION)),
        [chunk async for chunk in model.astream(QUESTION)],
    ):
        whole = add(chunks)
        assert plain(whole.tool_calls) == plain(expected.tool_calls)
        assert len(whole.invalid_tool_calls) == len(expected.invalid_tool_calls)
        assert whole.content == expected.content
        assert chunks[-1].chunk_position == "last"
    assert plain((await model.ainvoke(QUESTION)).tool_calls) == plain(expected.tool_calls)


def plain(calls: Any) -> list[Any]:
    return [(call["name"], call["args"]) for call in calls]


def test_a_call_that_is_cut_off_is_invalid() -> None:
    model = talker(max_tokens=20).bind_tools([Trip], tool_choice="any")
    for message in (model.invoke(QUESTION), add(model.stream(QUESTION))):
        assert message.tool_calls == []
        (broken,) = message.invalid_tool_calls
        assert broken["args"].startswith("<tool_call>")
        assert message.response_metadata["finish_reason"] == "length"


def test_wrong_choices_fail_when_tools_are_bound() -> None:
    with pytest.raises(GrammarError, match="station"):
        chat().bind_tools([opening], tool_choice="station")
    with pytest.raises(GrammarError, match="tool_choice"):
        chat().bind_tools([opening], tool_choice=3)
    with pytest.raises(GrammarError, match="ChatDraftSieve"):
        llm().invoke(QUESTION, tools=[convert_to_openai_tool(opening)])


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_is_an_object_of_the_schema(method: str) -> None:
    assert isinstance(talker().with_structured_output(Trip, method=method).invoke(QUESTION), Trip)
    found = talker().with_structured_output(TripDict, method=method).invoke(QUESTION)
    assert found.keys() == {"to", "open"}
    schema = Trip.model_json_schema()
    found = talker().with_structured_output(schema, method=method).invoke(QUESTION)
    assert Trip.model_validate(found)
    raw = talker().with_structured_output(Trip, method=method, include_raw=True).invoke(QUESTION)
    assert isinstance(raw["parsed"], Trip)
    assert isinstance(raw["raw"], AIMessage)
    assert raw["parsing_error"] is None


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("schema", [Trip, TripDict, Trip.model_json_schema()])
async def test_an_object_that_is_cut_off_is_not_made_up(method: str, schema: Any) -> None:
    short = talker(max_tokens=9)
    model = short.with_structured_output(schema, method=method)
    said = "cut off by max_tokens after 9 tokens"
    with pytest.raises(OutputParserException, match=said) as caught:
        model.invoke(QUESTION)
    assert caught.value.llm_output
    with pytest.raises(OutputParserException, match=said):
        await model.ainvoke(QUESTION)
    with pytest.raises(OutputParserException, match=said):
        list(model.stream(QUESTION))
    with pytest.raises(OutputParserException, match=said):
        _ = [piece async for piece in model.astream(QUESTION)]
    whole = talker().with_structured_output(schema, method=method)
    assert list(whole.stream(QUESTION))[-1] == whole.invoke(QUESTION)
    found = short.with_structured_output(schema, method=method, include_raw=True).invoke(QUESTION)
    assert found["parsed"] is None
    assert isinstance(found["parsing_error"], OutputParserException)
    assert said in str(found["parsing_error"])
    assert found["raw"].content or found["raw"].invalid_tool_calls


def test_json_mode_is_any_object() -> None:
    options = {"response_format": {"type": "json_object"}}
    assert chat().invoke(QUESTION, **options).content.startswith("{")
    assert llm().invoke(QUESTION, **options).startswith("{")
    assert chat().with_structured_output(TripDict, method="json_mode") is not None
    with pytest.raises(ConfigError, match="json_schema"):
        chat().with_structured_output(Trip, method="xml")


def test_a_grammar_is_an_option_of_a_call() -> None:
    grammar = Grammar.regex("[0-9]{2}:[0-9]{2}")
    for found in (
        llm().invoke(QUESTION, grammar=grammar),
        chat().invoke(QUESTION, grammar=grammar),
    ):
        assert re.fullmatch("[0-9]{2}:[0-9]{2}", text_of(found))


def test_a_turn_of_tools_goes_back_into_the_prompt() -> None:
    model = talker().bind_tools([opening], tool_choice="opening")
    asked = HumanMessage(QUESTION)
    first = model.invoke([asked])
    result = opening.invoke(first.tool_calls[0])
    shorter = talker(max_tokens=4).invoke([asked, first, result])
    assert shorter.usage_metadata["input_tokens"] > first.usage_metadata["output_tokens"]
    without = talker(max_tokens=4).invoke([asked])
    assert shorter.usage_metadata["input_tokens"] > without.usage_metadata["input_tokens"]


# -- tools and a schema in one call -------------------------------------------------------------


FORM = {
    "type": "json_schema",
    "json_schema": {"name": "Trip", "schema": Trip.model_json_schema()},
}


def fits_one(message: Any) -> bool:
    """Whether a message is calls alone or JSON of the schema alone."""
    if message.tool_calls:
        return not message.content and all(call["name"] == "opening" for call in message.tool_calls)
    return bool(Trip.model_validate_json(message.content))


async def test_tools_and_a_schema_give_calls_or_the_object() -> None:
    model = talker(max_tokens=120).bind_tools([opening], response_format=FORM)
    expected = model.invoke(QUESTION)
    assert fits_one(expected)
    streamed = add(model.stream(QUESTION))
    found = await model.ainvoke(QUESTION)
    for message in (streamed, found):
        assert message.content == expected.content
        assert plain(message.tool_calls) == plain(expected.tool_calls)
    for seed in range(12):
        assert fits_one(model.invoke(QUESTION, temperature=3.0, seed=seed))
    forced = talker().bind_tools([opening], tool_choice="any", response_format=FORM)
    assert forced.invoke(QUESTION).tool_calls
    spoken = talker().bind_tools([opening], tool_choice="none", response_format=FORM)
    assert Trip.model_validate_json(spoken.invoke(QUESTION).text)
    bare = talker().bind_tools([opening]).invoke(QUESTION).usage_metadata["input_tokens"]
    assert expected.usage_metadata["input_tokens"] > bare  # the prompt states the schema too


def test_a_wrong_response_format_fails_when_tools_are_bound() -> None:
    with pytest.raises(GrammarError, match="json_object"):
        chat().bind_tools([opening], response_format={"type": "xml"})
    with pytest.raises(GrammarError, match="json_object"):
        chat().invoke(QUESTION, response_format=Trip)


@pytest.mark.parametrize("wrap", [lambda schema: schema, ProviderStrategy, ToolStrategy])
async def test_an_agent_with_tools_ends_in_its_response_format(
    wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the model says next depends on the ids in its prompt: with random ones it would now and
    # then call tools until its window is full
    numbers = (SimpleNamespace(hex=f"{number:032x}") for number in count())
    monkeypatch.setattr(shared_tools, "uuid4", lambda: next(numbers))
    model = talker(max_tokens=120, temperature=3.0, seed=4)
    agent = create_agent(model, [opening], response_format=wrap(Trip))
    asked = {"messages": [HumanMessage(QUESTION)]}
    for found in (agent.invoke(asked), await agent.ainvoke(asked)):
        assert isinstance(found["structured_response"], Trip)
