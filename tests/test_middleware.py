"""The agent middleware in real agents: budget, pairing, memory, recall, failures."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from runpy import run_path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from draftsieve.core.compressor import Compressor
from draftsieve.core.config import SpecPC
from draftsieve.core.conversation.compressor import TurnCompressor
from draftsieve.core.conversation.turns import Turn
from draftsieve.core.errors import (
    BudgetError,
    ConfigError,
    MissingExtraError,
    PromptError,
    RequestTimeoutError,
)
from draftsieve.integrations.langchain import DraftCompressionMiddleware

from .adapters_fixtures import (
    EXAMPLES,
    QUESTION,
    TEXTS,
    counted,
    tiny_compressor,
    tiny_model,
    tiny_tokenizer,
)

CAPACITY = 1200
METHOD = SpecPC(capacity=CAPACITY, unit="sentence")
LONG = " ".join(TEXTS * 4)  # about 250 tokens
Reply = AIMessage | Callable[[Sequence[BaseMessage]], AIMessage]


class Scripted(BaseChatModel):
    """Says its lines in order and remembers what it was sent."""

    lines: list[Any]
    sent: list[list[BaseMessage]] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **options: Any) -> Any:
        return self

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        line = self.lines[len(self.sent)]
        self.sent.append(messages)
        said = line(messages) if callable(line) else line
        return ChatResult(generations=[ChatGeneration(message=said)])


@tool
def search(page: int) -> str:
    """Search the harbour's files."""
    return report(page)


def report(page: int) -> str:
    return f"Report {page}. {LONG}"


def call(page: int, name: str = "search", **args: Any) -> AIMessage:
    chosen = args or {"page": page}
    return AIMessage("", tool_calls=[{"name": name, "args": chosen, "id": f"call-{page}"}])


def middleware(**options: Any) -> DraftCompressionMiddleware:
    return DraftCompressionMiddleware(
        **{"compressor": tiny_compressor(), "method": METHOD, **options}
    )


def talk(results: int, question: str = QUESTION) -> list[Any]:
    """An old exchange, a request, and so many searches for it."""
    found: list[Any] = [
        HumanMessage(f"Earlier: {LONG}", id="h0"),
        AIMessage(f"I said: {LONG}", id="a0"),
        HumanMessage(question, id="h1"),
    ]
    for page in range(results):
        found += [call(page), ToolMessage(report(page), tool_call_id=f"call-{page}", name="search")]
    return found


def sent_by(used: DraftCompressionMiddleware, messages: list[Any], **options: Any) -> list[Any]:
    """What the middleware hands on."""
    handed: list[ModelRequest[Any]] = []

    def handler(request: ModelRequest[Any]) -> ModelResponse[Any]:
        handed.append(request)
        return ModelResponse([AIMessage("done")])

    options = {"model": Scripted(lines=[]), "system_prompt": "Be short.", **options}
    used.wrap_model_call(ModelRequest(messages=messages, **options), handler)
    assert handed[0].system_message == ModelRequest(messages=[], **options).system_message
    assert handed[0].tools == options.get("tools", [])
    return list(handed[0].messages)


def size(messages: Sequence[BaseMessage], *others: str) -> int:
    """Tokens of a request, counted apart from the middleware."""
    texts = [*others]
    for message in messages:
        texts.append(message.text)
        if isinstance(message, AIMessage) and message.tool_calls:
            texts.append(json.dumps(message.tool_calls))
    return sum(tiny_compressor().count_tokens(text) for text in texts) + 4 * len(texts)


class Reads:
    """Texts that a real draft is given, call by call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[list[str]] = []
        inner = Compressor.compress_prompt

        def compress_prompt(this: Compressor, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append([passage.text for passage in prompt.passages])
            return inner(this, prompt, *args, **kwargs)

        monkeypatch.setattr(Compressor, "compress_prompt", compress_prompt)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


# -- the budget ---------------------------------------------------------------------------------


def test_what_fits_is_sent_as_it_is(reads: Reads) -> None:
    messages = [HumanMessage(QUESTION), call(1), ToolMessage(LONG, tool_call_id="call-1")]
    assert sent_by(middleware(), messages) == messages
    assert reads.calls == []


def test_old_turns_and_results_give_way_to_the_budget() -> None:
    given = talk(3)
    before = [message.model_copy(deep=True) for message in given]
    used = middleware()
    with counted(used.turns) as calls:
        sent = sent_by(used, given)
    assert calls == ["compress"]
    assert given == before
    assert size(given, "Be short.") > CAPACITY
    assert size(sent, "Be short.") <= CAPACITY
    assert [(m.type, m.id) for m in sent] == [(m.type, m.id) for m in given]
    assert [m.tool_calls for m in sent if m.type == "ai"] == [
        m.tool_calls for m in given if m.type == "ai"
    ]
    assert [m.tool_call_id for m in sent if m.type == "tool"] == ["call-0", "call-1", "call-2"]
    assert sent[2] == given[2]  # the request
    assert sent[-1] == given[-1]  # the newest result
    assert all(len(sent[i].text) < len(given[i].text) for i in (0, 1, 4))


def test_copies_tell_what_was_kept() -> None:
    given = talk(3)
    sent = sent_by(middleware(), given)
    for message, original in zip(sent, given, strict=True):
        for told in message.response_metadata.get("draftsieve", []):
            kept = [original.text[s["start"] : s["end"]] for s in told["spans"]]
            assert message.text in (" … ".join(kept), "[left out as unrelated]")
            assert told["compressed_tokens"] < told["tokens"]
            assert told["block"] is None
    assert sum("draftsieve" in m.response_metadata for m in sent) >= 3


def test_one_result_that_is_too_long_is_shortened_at_once() -> None:
    huge = ToolMessage(" ".join([LONG] * 8), tool_call_id="call-1")
    sent = sent_by(middleware(), [HumanMessage(QUESTION), call(1), huge])
    assert size(sent, "Be short.") <= CAPACITY
    assert 0 < len(sent[2].text) < len(huge.text)


def test_schemas_and_system_prompt_count() -> None:
    class Verdict(BaseModel):
        """A long form of answer."""

        words: str = Field(description=LONG)

    @tool(description=LONG)
    def lookup(page: int) -> str:
        return ""

    messages = [HumanMessage(QUESTION), call(1), ToolMessage(LONG, tool_call_id="call-1")]
    used = middleware(method=SpecPC(capacity=600, unit="sentence"))
    assert sent_by(used, messages) == messages
    for options in (
        {"tools": [lookup]},
        {"tools": [{"name": "lookup", "description": LONG}]},
        {"system_prompt": LONG},
        {"response_format": ToolStrategy(Verdict)},
        {"response_format": Verdict},
    ):
        sent = sent_by(used, messages, **options)
        assert len(sent[2].text) < len(LONG), options


def test_a_models_own_limit_lowers_the_budget() -> None:
    small = Scripted(lines=[], profile={"max_input_tokens": 600})
    assert size(sent_by(middleware(), talk(1), model=small), "Be short.") <= 600
    assert size(sent_by(middleware(max_input_tokens=600), talk(1)), "Be short.") <= 600


def test_newest_turns_and_chosen_tools_stay() -> None:
    given = talk(3)
    for keep in (1, 3, 5):
        sent = sent_by(middleware(keep=keep, method=SpecPC(capacity=1500)), given)
        talking = [i for i, m in enumerate(given) if m.type != "tool"][-keep]
        assert sent[talking:] == given[talking:]
        assert sent[:talking] != given[:talking]
    sent = sent_by(middleware(exclude_tools=["search"], method=SpecPC(capacity=1500)), given)
    assert [m for m in sent if m.type == "tool"] == [m for m in given if m.type == "tool"]
    assert sent[:2] != given[:2]


def test_the_latest_request_stays_however_long() -> None:
    given = talk(3, question=f"{LONG} {QUESTION}")
    sent = sent_by(middleware(keep=1, method=SpecPC(capacity=1500)), given)
    assert sent[2] == given[2]
    assert sent[0] != given[0]


def test_blocks_of_text_are_shortened_and_other_blocks_stay() -> None:
    picture = {"type": "image", "url": "https://example.org/a.png"}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    given = [
        HumanMessage([{"type": "text", "text": report(1)}, picture, report(2)]),
        AIMessage([thought, {"type": "text", "text": LONG}]),
        HumanMessage([{"type": "text", "text": QUESTION}]),
    ]
    method = SpecPC(capacity=1700, unit="sentence")  # a picture counts 1,000
    sent = sent_by(middleware(method=method), given)
    assert sent[1:] == given[1:]
    first, second, third = sent[0].content
    assert second == picture
    assert len(first["text"]) + len(third) < len(report(1)) + len(report(2))
    assert {told["block"] for told in sent[0].response_metadata["draftsieve"]} <= {0, 2}


def test_random_conversations_stay_within_the_budget() -> None:
    draw = random.Random(4)
    sentences = [s + "." for text in TEXTS for s in text.split(". ")]
    for _ in range(12):
        given: list[Any] = []
        for turn in range(draw.randint(1, 4)):
            given.append(HumanMessage(" ".join(draw.choices(sentences, k=draw.randint(1, 4)))))
            for page in range(draw.randint(0, 2)):
                text = " ".join(draw.choices(sentences, k=draw.randint(1, 60)))
                given += [call(page), ToolMessage(text, tool_call_id=f"call-{page}")]
            given.append(AIMessage(draw.choice(sentences), id=str(turn)))
        given.append(HumanMessage(QUESTION))
        capacity = draw.randint(1500, 2500)
        method = SpecPC(capacity=capacity, unit=draw.choice(["token", "sentence"]))
        stable = draw.random() < 0.5
        sent = sent_by(middleware(method=method, stable_prefix=stable), given)
        assert size(sent, "Be short.") <= capacity
        assert all(m.text for m in sent if m.type == "tool")


# -- memory -------------------------------------------------------------------------------------


def test_a_message_is_compressed_once(reads: Reads) -> None:
    used = middleware(method=SpecPC(capacity=1600, unit="sentence"))
    forms: dict[int, str] = {}
    for results in range(1, 6):
        sent = sent_by(used, talk(results))
        assert size(sent, "Be short.") <= 1600
        for place, text in forms.items():
            assert sent[place].text == text
        forms = {i: m.text for i, m in enumerate(sent) if "draftsieve" in m.response_metadata}
    assert len(forms) >= 4
    given = [text for texts in reads.calls for text in texts]
    assert len(given) == len(set(given))
    count = len(reads.calls)
    sent_by(used, talk(5))
    assert len(reads.calls) == count  # the same request again


def test_a_new_request_reads_old_texts_anew(reads: Reads) -> None:
    used = middleware()
    sent_by(used, talk(3))
    first = [*reads.calls]
    sent_by(used, talk(3, question="Who may travel free?"))
    assert reads.calls == first * 2


def breaks(stable: bool) -> int:
    """How often a long conversation, with a new request each turn, changes what was sent."""
    method = SpecPC(capacity=2400, unit="sentence")
    used = middleware(stable_prefix=stable, fill=0.5, method=method)
    given, changed = talk(2), 0
    sent = sent_by(used, given)
    for turn in range(10):
        given = [*given, AIMessage(f"Answer {turn}."), HumanMessage(f"Question {turn}?")]
        given += [call(turn), ToolMessage(report(turn), tool_call_id=f"call-{turn}")]
        previous, sent = sent, sent_by(used, given)
        changed += sent[: len(previous)] != previous
        assert size(sent, "Be short.") <= 2400
    assert sum("draftsieve" in m.response_metadata for m in sent) >= 2
    return changed


def test_a_stable_prefix_stays_for_new_requests() -> None:
    assert breaks(stable=True) <= 4
    assert breaks(stable=False) >= 6


def test_memory_forgets_what_was_unused_for_longest() -> None:
    turns = TurnCompressor(tiny_compressor(), METHOD, remember=2)
    for n in range(4):
        turns.compress(QUESTION, [Turn(f"{n} {LONG * 5}", "never")])
    assert len(turns.memory) == 2


# -- in agents ----------------------------------------------------------------------------------


def test_state_keeps_the_originals() -> None:
    model = Scripted(lines=[*map(call, range(5)), AIMessage("At seven.")])
    agent = create_agent(model, [search], system_prompt="Be short.", middleware=[middleware()])
    final = agent.invoke({"messages": [HumanMessage(QUESTION)]})
    results = [m.text for m in final["messages"] if m.type == "tool"]
    assert results == [report(page) for page in range(5)]
    assert final["messages"][-1].text == "At seven."
    last = model.sent[-1]
    assert size(last[1:]) <= CAPACITY < size(final["messages"][:-1])
    assert last[0] == SystemMessage("Be short.")


async def test_async_agents_send_the_same() -> None:
    lines = [*map(call, range(5)), AIMessage("At seven.")]
    sent = []
    for run in ("invoke", "ainvoke"):
        model, used = Scripted(lines=lines), middleware()
        agent = create_agent(model, [search], middleware=[used])
        state = {"messages": [HumanMessage(QUESTION, id="h")]}
        with counted(used.turns) as calls:
            await agent.ainvoke(state) if run == "ainvoke" else agent.invoke(state)
        assert calls == ["compress" if run == "invoke" else "acompress"] * 6
        sent.append([[(m.type, m.text) for m in messages] for messages in model.sent])
    assert sent[0] == sent[1]


def test_recall_returns_the_original() -> None:
    def ask_back(messages: Sequence[BaseMessage]) -> AIMessage:
        note = next(m.text for m in messages if m.type == "tool" and "recall(" in m.text)
        return call(9, "recall", key=note.split('recall("')[1].split('"')[0])

    model = Scripted(lines=[*map(call, range(6)), ask_back, AIMessage("At seven.")])
    used = middleware(recall=True, method=SpecPC(capacity=2300, unit="sentence"))
    agent = create_agent(model, [search], middleware=[used])
    final = agent.invoke({"messages": [HumanMessage(QUESTION)]})
    recalled = final["messages"][-2]
    assert recalled.name == "recall"
    assert recalled.text == report(0)
    assert model.sent[-1][-1].text == report(0)  # not shortened again in this request
    assert middleware().tools == []


def test_recall_of_an_unknown_key_says_so() -> None:
    model = Scripted(lines=[call(0, "recall", key="nothing"), AIMessage("Sorry.")])
    agent = create_agent(model, [search], middleware=[middleware(recall=True)])
    final = agent.invoke({"messages": [HumanMessage(QUESTION)]})
    assert "'nothing'" in final["messages"][-2].text


# -- failures -----------------------------------------------------------------------------------


def broken() -> Compressor:
    """A draft whose pass fails, as it does when memory runs out."""

    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    model = tiny_model(32, seed=1)
    model.model.layers[0].register_forward_pre_hook(fail)
    return Compressor(model, tiny_tokenizer())


def test_a_failure_sends_the_originals_where_they_fit(caplog: pytest.LogCaptureFixture) -> None:
    given, draft = talk(3), broken()
    assert sent_by(middleware(compressor=draft), given) == given
    assert sent_by(middleware(compressor=draft, max_input_tokens=5000), given) == given
    assert len(warnings_of(caplog)) == 2


def test_a_failure_raises_where_the_originals_exceed_the_models_limit() -> None:
    with pytest.raises(BudgetError, match="reads at most 1000"):
        sent_by(middleware(compressor=broken(), max_input_tokens=1000), talk(3))
    with pytest.raises(MemoryError, match="Out of memory"):
        sent_by(middleware(compressor=broken(), on_error="raise"), talk(3))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines of the log at WARNING; none of them carries a traceback."""
    found = [r for r in caplog.records if r.levelname == "WARNING"]
    assert not any(record.exc_info for record in found)
    caplog.clear()
    return [record.getMessage() for record in found]


@pytest.mark.parametrize("stable", [False, True])
def test_a_budget_that_is_too_small_is_met_as_far_as_possible(
    stable: bool, reads: Reads, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, given = "Be short. " * 50, talk(4)
    method = SpecPC(capacity=300, unit="sentence")
    used = middleware(method=method, stable_prefix=stable)
    sent = sent_by(used, given, system_prompt=prompt)
    (told,) = warnings_of(caplog)
    enough = int(re.findall("a capacity of ([0-9]+) would do", told)[0])
    assert 300 < size(sent, prompt) <= enough < size(given, prompt) / 2
    assert [type(m) for m in sent] == [type(m) for m in given]
    assert sent[2] == given[2]  # the request
    kept = [m for m in sent if any("spans" in k for k in m.response_metadata.get("draftsieve", []))]
    assert any(k["spans"] for m in kept for k in m.response_metadata["draftsieve"])
    count = len(reads.calls)
    assert sent_by(used, given, system_prompt=prompt) == sent
    assert len(reads.calls) == count  # and nothing is read again for it
    more = sent_by(used, talk(5), system_prompt=prompt)
    assert len(reads.calls) == count + 1
    assert [m.text for m in more[: len(sent)]] == [m.text for m in sent]
    assert len(warnings_of(caplog)) == 2
    roomy = middleware(method=SpecPC(capacity=enough, unit="sentence"), stable_prefix=stable)
    assert size(sent_by(roomy, given, system_prompt=prompt), prompt) <= enough
    assert warnings_of(caplog) == []


def test_a_model_that_reads_little_gets_what_it_can_read(caplog: pytest.LogCaptureFixture) -> None:
    prompt, given = "Be short. " * 50, talk(4)
    whole = middleware(method=SpecPC(capacity=100), max_input_tokens=5000)
    limit = size(sent_by(whole, given, system_prompt=prompt), prompt) - 60
    tight = middleware(method=SpecPC(capacity=100), max_input_tokens=limit)
    assert size(sent_by(tight, given, system_prompt=prompt), prompt) <= limit
    assert len(warnings_of(caplog)) == 2


def test_what_cannot_fit_raises() -> None:
    method = SpecPC(capacity=40)
    with pytest.raises(BudgetError, match="must stay"):
        sent_by(middleware(method=method, on_error="raise"), talk(3))
    with pytest.raises(BudgetError, match="reads at most 60"):
        sent_by(middleware(method=method, max_input_tokens=60), talk(3))
    given = [*[AIMessage(LONG)] * 5, AIMessage("Hm."), AIMessage("Ah.")]
    with pytest.raises(PromptError, match="question is empty"):
        sent_by(middleware(on_error="raise"), given)


def test_a_request_out_of_time_sends_the_originals_or_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert sent_by(middleware(timeout=1e-9), talk(3)) == talk(3)
    assert "timeout" in warnings_of(caplog)[0]
    with pytest.raises(RequestTimeoutError):
        sent_by(middleware(timeout=1e-9, on_error="raise"), talk(3))
    with pytest.raises(ConfigError, match="timeout"):
        middleware(timeout=0)


def test_no_method_keeps_whole_sentences_within_4096_tokens() -> None:
    used = DraftCompressionMiddleware(compressor=tiny_compressor())
    given = talk(20)
    sent = sent_by(used, given)
    assert size(given, "Be short.") > 4096 >= size(sent, "Be short.")
    shortened = [m for m in sent if "draftsieve" in m.response_metadata]
    for message in shortened:
        assert all(part.rstrip().endswith(".") for part in message.text.split(" … ") if part)


def test_wrong_options_fail_at_construction() -> None:
    with pytest.raises(ConfigError, match="capacity"):
        middleware(method=SpecPC(ratio=0.5))
    with pytest.raises(ConfigError, match="fill=0"):
        middleware(fill=0)


def test_only_the_middleware_needs_langchain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("draftsieve.integrations.langchain")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain", None)
    package = import_module("draftsieve.integrations.langchain")
    assert package.DraftCompressor
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[agents\]"'):
        _ = package.DraftCompressionMiddleware
    with pytest.raises(AttributeError, match="Nothing"):
        _ = package.Nothing


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "langchain_agent.py"), run_name="__main__")
    out = capsys.readouterr().out
    sieved, summarised = out.split("SummarizationMiddleware")
    assert "is still in what the model reads: True" in sieved
    assert sieved.count("sent:") == summarised.count("sent:") == 4
