"""Tools of LlamaIndex with the bundled target: calls always fit, agents and programs run."""

import asyncio
from functools import cache
from typing import Annotated, Any, Literal

import pytest
from llama_index.core.agent.workflow import AgentStream, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field, ValidationError

from draftsieve.core.engine import Engine
from draftsieve.core.errors import GrammarError, ModelError
from draftsieve.core.grammar import Grammar
from draftsieve.integrations.llama_index import DraftSieveLLM

from .adapters_fixtures import counted

pytestmark = [
    # LlamaIndex's agents use deprecated parts of pydantic and of their own workflows
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
QUESTION = "When does the ferry leave?"
Place = Literal["harbour", "museum"]
Day = Literal[1, 2, 3, 4, 5, 6, 7]


@cache
def pair() -> Engine:
    return Engine.load("builtin:target", "builtin:draft", device="cpu", progress=False)


def llm(**options: Any) -> DraftSieveLLM:
    return DraftSieveLLM(engine=pair(), **{"max_tokens": 60, **options})


def timetable(place: Place, day: Day) -> str:
    """Departures from a place on a day of the week."""
    return f"From {place} on day {day}: 7:00."


def prices(place: Place) -> str:
    """Prices at a place."""
    return f"{place}: 3.50"


def tools() -> list[FunctionTool]:
    return [FunctionTool.from_defaults(timetable), FunctionTool.from_defaults(prices)]


def calls_of(response: ChatResponse) -> list[tuple[str, dict[str, Any]]]:
    found = llm().get_tool_calls_from_response(response, error_on_no_tool_call=False)
    return [(call.tool_name, call.tool_kwargs) for call in found]


def fits(name: str, arguments: dict[str, Any]) -> bool:
    wanted = {"timetable": {"place", "day"}, "prices": {"place"}}[name]
    return (
        arguments.keys() == wanted
        and arguments["place"] in ("harbour", "museum")
        and arguments.get("day", 1) in range(1, 8)
    )


# -- calls --------------------------------------------------------------------------------------


def test_a_required_call_fits_its_tool() -> None:
    with counted(pair()) as calls:
        response = llm().chat_with_tools(tools(), QUESTION, tool_required=True)
    assert calls == ["generate"]
    ((name, arguments),) = calls_of(response)
    assert fits(name, arguments)
    (block,) = response.message.blocks
    assert isinstance(block, ToolCallBlock)
    assert block.tool_call_id
    (call,) = response.message.additional_kwargs["tool_calls"]
    assert call["function"] == {"name": name, "arguments": arguments}
    assert response.raw["broken_calls"] == []
    assert response.raw["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("choice", ["prices", {"type": "function", "function": {"name": "prices"}}])
def test_a_tool_can_be_named(choice: Any) -> None:
    response = llm().chat_with_tools(tools(), QUESTION, tool_choice=choice)
    ((name, arguments),) = calls_of(response)
    assert name == "prices"
    assert fits(name, arguments)


def test_a_free_choice_may_be_text_and_none_shows_no_tools() -> None:
    free = llm(max_tokens=8).chat_with_tools(tools(), QUESTION)
    assert free.message.content
    with pytest.raises(ModelError, match="pass tool_required=True"):
        llm().get_tool_calls_from_response(free)
    plain = llm(max_tokens=8).chat([ChatMessage(QUESTION)])
    for given in (
        llm(max_tokens=8).chat_with_tools(tools(), QUESTION, tool_choice="none"),
        llm(max_tokens=8).chat_with_tools([], QUESTION),
    ):
        assert given.message == plain.message
        assert given.raw["usage"] == plain.raw["usage"] != free.raw["usage"]


def test_an_unknown_tool_is_named() -> None:
    with pytest.raises(GrammarError, match="weather"):
        llm().chat_with_tools(tools(), QUESTION, tool_choice="weather")


def test_a_call_that_is_cut_off_is_no_call() -> None:
    response = llm(max_tokens=9).chat_with_tools(tools(), QUESTION, tool_required=True)
    assert calls_of(response) == []
    assert response.raw["finish_reason"] == "length"
    assert len(response.raw["broken_calls"]) == 1
    with pytest.raises(ModelError, match="cut off by max_tokens after 9 tokens"):
        llm().get_tool_calls_from_response(response)
    with pytest.raises(ModelError, match="cut off by max_tokens after 9 tokens"):
        llm(max_tokens=9).structured_predict(Trip, TEMPLATE, what=QUESTION)


async def test_streams_and_async_calls_equal_the_whole_answer() -> None:
    expected = calls_of(llm().chat_with_tools(tools(), QUESTION, tool_required=True))
    asked = {"tools": tools(), "user_msg": QUESTION, "tool_required": True}
    with counted(pair()) as calls:
        pieces = list(llm().stream_chat_with_tools(**asked))
        found = await llm().achat_with_tools(**asked)
        apieces = [p async for p in await llm().astream_chat_with_tools(**asked)]
    assert calls == ["stream_prompt", "agenerate", "astream_prompt"]
    assert calls_of(found) == expected
    for streamed in (pieces, apieces):
        assert calls_of(streamed[-1]) == expected
        assert streamed[-1].raw["usage"] == found.raw["usage"]
        ids = {b.tool_call_id for p in streamed for b in p.message.blocks if "call" in b.block_type}
        assert len(ids) == 1


def test_a_tool_is_called_with_what_was_said() -> None:
    answered = llm().predict_and_call(tools(), QUESTION, tool_choice="prices")
    assert answered.response in (prices("harbour"), prices("museum"))
    assert answered.sources[0].tool_name == "prices"


def test_earlier_calls_and_results_stand_in_the_prompt() -> None:
    called = llm().chat_with_tools(tools(), QUESTION, tool_choice="prices").message
    identifier = called.blocks[0].tool_call_id
    result = ChatMessage("3.50", role="tool", additional_kwargs={"tool_call_id": identifier})
    turns = [ChatMessage(QUESTION), called, result]
    whole = llm(max_tokens=4).chat_with_tools(tools(), chat_history=turns)
    short = llm(max_tokens=4).chat_with_tools(tools(), chat_history=turns[:1])
    assert whole.raw["usage"]["prompt_tokens"] > short.raw["usage"]["prompt_tokens"] + 20


def test_an_answer_may_follow_a_grammar() -> None:
    text = llm().complete(QUESTION, grammar=Grammar.regex(r"at [0-9]:[0-9]{2} (am|pm)")).text
    assert text.startswith("at ")
    assert len(text) == len("at 7:00 am")


# -- structured output --------------------------------------------------------------------------


class Trip(BaseModel):
    """A trip by ferry."""

    place: Place
    day: Day


class Plan(BaseModel):
    """Some trips."""

    trips: Annotated[list[Trip], Field(min_length=1, max_length=2)]
    cheap: bool


TEMPLATE = PromptTemplate("Plan this: {what}")
FORM = {"type": "json_schema", "json_schema": {"name": "Trip", "schema": Trip.model_json_schema()}}


async def test_a_response_format_is_an_option_of_a_call() -> None:
    model, asked = llm(), [ChatMessage(QUESTION)]
    found = model.chat(asked, response_format=FORM)
    assert Trip.model_validate_json(found.message.content or "")
    again = await model.acomplete(QUESTION, response_format=FORM)
    assert again.text == found.message.content
    pieces = list(model.stream_complete(QUESTION, response_format=FORM))
    assert pieces[-1].text == again.text
    assert model.complete(QUESTION, response_format={"type": "json_object"}).text.startswith("{")
    plain = model.chat(asked).raw["usage"]["prompt_tokens"]
    assert found.raw["usage"]["prompt_tokens"] > plain  # the prompt states the schema
    for form in ({"type": "xml"}, Trip):
        with pytest.raises(GrammarError, match="json_object"):
            model.chat(asked, response_format=form)


async def test_tools_and_a_response_format_give_calls_or_the_object() -> None:
    model, asked = llm(max_tokens=90), {"tools": tools(), "user_msg": QUESTION}

    def said(response: ChatResponse) -> Any:
        calls = calls_of(response)
        if calls:
            assert not response.message.content
            assert all(fits(*call) for call in calls)
            return calls
        return Trip.model_validate_json(response.message.content or "")

    expected = said(model.chat_with_tools(**asked, response_format=FORM))
    assert said(await model.achat_with_tools(**asked, response_format=FORM)) == expected
    pieces = list(model.stream_chat_with_tools(**asked, response_format=FORM))
    assert said(pieces[-1]) == expected
    for seed in range(6):
        said(model.chat_with_tools(**asked, response_format=FORM, temperature=3.0, seed=seed))
    forced = model.chat_with_tools(**asked, response_format=FORM, tool_required=True)
    assert calls_of(forced)
    spoken = model.chat_with_tools(**asked, response_format=FORM, tool_choice="none")
    assert Trip.model_validate_json(spoken.message.content or "")


async def test_structured_predictions_are_valid() -> None:
    model = llm(max_tokens=120)
    assert isinstance(model.structured_predict(Plan, TEMPLATE, what=QUESTION), Plan)
    found = await model.astructured_predict(Trip, TEMPLATE, what=QUESTION)
    response = model.as_structured_llm(Trip).chat([ChatMessage("Plan this: " + QUESTION)])
    assert response.raw == found
    assert Trip.model_validate_json(response.message.content or "") == found


async def test_structured_streams_end_in_a_valid_object() -> None:
    model = llm(max_tokens=120)
    expected = model.structured_predict(Trip, TEMPLATE, what=QUESTION)
    assert list(model.stream_structured_predict(Trip, TEMPLATE, what=QUESTION))[-1] == expected
    stream = await model.astream_structured_predict(Trip, TEMPLATE, what=QUESTION)
    assert [found async for found in stream][-1] == expected
    short = llm(max_tokens=9)
    with pytest.raises(ModelError, match="cut off by max_tokens"):
        list(short.stream_structured_predict(Trip, TEMPLATE, what=QUESTION))
    stream = await short.astream_structured_predict(Trip, TEMPLATE, what=QUESTION)
    with pytest.raises(ModelError, match="cut off by max_tokens"):
        _ = [found async for found in stream]


def test_a_program_of_another_mode_is_kept() -> None:
    model = llm(max_tokens=4, pydantic_program_mode=PydanticProgramMode.LLM)
    with pytest.raises((ValueError, ValidationError)):  # free text of a tiny model is no JSON
        model.structured_predict(Trip, TEMPLATE, what=QUESTION)
    last = list(model.stream_structured_predict(Trip, TEMPLATE, what=QUESTION))[-1]
    assert not isinstance(last, Trip)


# -- agents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_calls_and_answers(streaming: bool) -> None:
    agent = FunctionAgent(
        tools=tools(),
        llm=llm(),
        system_prompt="Answer with what the functions return.",
        initial_tool_choice="timetable",
        streaming=streaming,
    )
    handler = agent.run(QUESTION)
    events = [event async for event in handler.stream_events()]
    output = await handler
    results = [event for event in events if isinstance(event, ToolCallResult)]
    assert [event.tool_name for event in results] == ["timetable"]
    assert fits("timetable", results[0].tool_kwargs)
    assert results[0].tool_output.content == timetable(**results[0].tool_kwargs)
    assert output.response.role == "assistant"
    assert output.response.content
    if streaming:
        deltas = [event.delta for event in events if isinstance(event, AgentStream)]
        assert output.response.content in "".join(deltas)


class Thinking(DraftSieveLLM):
    """The bundled target does not know ReAct's way of writing: a grammar says what comes next."""

    async def astream_chat(self, messages: Any, **kwargs: Any) -> Any:
        seen = any("Observation:" in str(message.content) for message in messages[1:])
        step = (
            r"Answer: [a-z]{1,8}"
            if seen
            else r'Action: prices\nAction Input: \{"place": "(harbour|museum)"\}'
        )
        grammar = Grammar.regex(r"Thought: [a-z]{1,8}\n" + step)
        return await super().astream_chat(messages, grammar=grammar, **kwargs)


async def test_a_react_agent_calls_and_answers() -> None:
    agent = ReActAgent(tools=tools(), llm=Thinking(engine=pair(), max_tokens=40))
    handler = agent.run(QUESTION)
    events = [event async for event in handler.stream_events()]
    output = await handler
    (result,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert result.tool_output.content == prices(**result.tool_kwargs)
    assert output.response.content
    assert "Thought" not in output.response.content


async def test_agents_share_an_engine() -> None:
    def agent() -> FunctionAgent:
        return FunctionAgent(tools=tools(), llm=llm(max_tokens=40), initial_tool_choice="prices")

    alone = (await agent().run(QUESTION)).response.content
    both = await asyncio.gather(agent().run(QUESTION), agent().run(QUESTION))
    assert [output.response.content for output in both] == [alone, alone]
