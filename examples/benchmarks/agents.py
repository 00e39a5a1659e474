"""Can a small model run an agent? Eight questions, each of which one call of one tool answers.

LangChain's `create_agent` and LlamaIndex's `FunctionAgent` with the same target: left alone; with
the first call forced (it must call some tool, and chooses which, with what argument); and forced
with tools whose schemas list the arguments that there are.

    python examples/benchmarks/agents.py
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_core.messages import HumanMessage, ToolMessage
from llama_index.core.agent.workflow import FunctionAgent

from draftsieve import Engine
from draftsieve.integrations.langchain import ChatDraftSieve
from draftsieve.integrations.llama_index import DraftSieveLLM

SYSTEM = "You are a helpful assistant. Use the tools to look things up, then answer the question."
STEPS, TOKENS = 4, 64  # answers of the model at most, and tokens of each
WAYS = {
    "left alone": (False, False),
    "forced": (True, False),
    "forced, arguments listed": (True, True),
}
TABLES: dict[str, dict[str, str]] = {
    "opening_hours": {"museum": "10:40", "library": "8:20", "bakery": "6:15"},
    "price_of": {"umbrella": "23 crowns", "lamp": "67 crowns", "kettle": "41 crowns"},
    "phone_of": {"Mira": "555-0173", "Jonas": "555-0288"},
}
QUESTIONS = [
    ("When does the museum open?", "opening_hours", "museum"),
    ("What does an umbrella cost?", "price_of", "umbrella"),
    ("What is the phone number of Mira?", "phone_of", "Mira"),
    ("At what time does the library open in the morning?", "opening_hours", "library"),
    ("How much is a lamp?", "price_of", "lamp"),
    ("How can I call Jonas?", "phone_of", "Jonas"),
    ("When can I buy bread at the bakery?", "opening_hours", "bakery"),
    ("Tell me the price of a kettle.", "price_of", "kettle"),
]


@dataclass
class Tried:
    """What an agent did with one question."""

    calls: list[tuple[str, str]] = field(default_factory=list)  # tool and argument
    answer: str = ""


def tools_for(tried: Tried, listed: bool) -> list[Callable[[str], str]]:
    """The three tools, which note what they are called with; `listed` puts all keys in schemas."""

    def look_up(tool: str, name: str) -> str:
        tried.calls.append((tool, name))
        found = {key.lower(): value for key, value in TABLES[tool].items()}
        return found.get(name.strip().lower(), f"There is nothing under {name!r}.")

    def opening_hours(place: str) -> str:
        """The time at which a place opens, such as a library."""
        return look_up("opening_hours", place)

    def price_of(article: str) -> str:
        """The price of an article in the shop, such as a lamp."""
        return look_up("price_of", article)

    def phone_of(person: str) -> str:
        """The phone number of a person."""
        return look_up("phone_of", person)

    tools: list[Callable[[str], str]] = [opening_hours, price_of, phone_of]
    for tool in tools if listed else ():
        argument = next(iter(tool.__annotations__))
        tool.__annotations__[argument] = Literal[tuple(TABLES[tool.__name__])]
    return tools


@wrap_model_call
def first_call_forced(
    request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
) -> ModelResponse[Any]:
    """The model must call a tool as long as no tool has answered."""
    called = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request if called else request.override(tool_choice="any"))


def by_langchain(engine: Engine, question: str, forced: bool, listed: bool) -> Tried:
    """Ask LangChain's agent."""
    tried = Tried()
    agent: Any = create_agent(
        ChatDraftSieve(engine=engine, max_tokens=TOKENS),
        tools_for(tried, listed),
        system_prompt=SYSTEM,
        middleware=[first_call_forced] if forced else [],
    )
    limit = {"recursion_limit": 2 * STEPS}
    state = agent.invoke({"messages": [HumanMessage(question)]}, limit)
    tried.answer = state["messages"][-1].text
    return tried


def by_llama_index(engine: Engine, question: str, forced: bool, listed: bool) -> Tried:
    """Ask LlamaIndex's agent."""
    tried = Tried()
    agent = FunctionAgent(
        tools=tools_for(tried, listed),
        llm=DraftSieveLLM(engine=engine, max_tokens=TOKENS),
        system_prompt=SYSTEM,
        initial_tool_choice="required" if forced else None,
        streaming=False,
    )

    async def run() -> str:
        return str(await agent.run(question, max_iterations=STEPS))

    tried.answer = asyncio.run(run())
    return tried


def main(argv: Sequence[str] | None = None) -> int:
    """Ask everything, print what happened, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    options = parser.parse_args(argv)
    engine = Engine.load(options.target, progress=False)
    rows = []
    for name, ask in (("create_agent", by_langchain), ("FunctionAgent", by_llama_index)):
        for way, how in WAYS.items():
            counts = [0, 0, 0, 0]
            for question, tool, argument in QUESTIONS[: options.questions]:
                tried = _tried(lambda q, ask=ask, how=how: ask(engine, q, *how), question)
                print(f"{name}, {way}: {question} {tried}", flush=True)
                first, given = tried.calls[0] if tried.calls else ("", "")
                found = first == tool and given.strip().lower() == argument.lower()
                right = bool(first), first == tool, found, TABLES[tool][argument] in tried.answer
                counts = [old + new for old, new in zip(counts, right, strict=True)]
            rows.append(f"| `{name}` | {way} | {' | '.join(map(str, counts))} |")
    print(f"\n{options.target}, {options.questions} questions\n")
    print("| agent | first call | a tool | the right tool | right argument too | right answer |")
    print("|---|---|---:|---:|---:|---:|", *rows, sep="\n")
    return 0


def _tried(ask: Callable[[str], Tried], question: str) -> Tried:
    """What came of a question; the frameworks have errors of their own for too many steps."""
    try:
        return ask(question)
    except Exception as error:  # noqa: BLE001
        return Tried(answer=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    raise SystemExit(main())
