"""An agent whose long tool results are sieved, beside LangChain's SummarizationMiddleware.

The agent reads three files of a handbook that are longer than its budget. Its decisions are a
script, because the bundled target only answers questions; what each middleware sends to the model
is real, and so is the last answer. For models of the hub change two lines: DRAFT, and
`create_agent(ChatDraftSieve(model="Qwen/Qwen3-4B"), ...)` (or any other chat model) for the script.
"""

from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, SummarizationMiddleware
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from pydantic import Field

from draftsieve import SpecPC
from draftsieve.integrations.langchain import ChatDraftSieve, DraftCompressionMiddleware

HANDBOOK = Path(__file__).parent / "data" / "handbook"
FILES = sorted(path.name for path in HANDBOOK.glob("person-*.md"))[3:6]
QUESTION = "What is marked on the pass of Haizek Pimemont?"
ANSWER = "WV-023-CN"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
BUDGET = 1200  # tokens of a request
target = ChatDraftSieve(model="builtin:target", max_tokens=24, progress=False)


@tool
def read_file(name: str) -> str:
    """Read a file of the handbook."""
    return (HANDBOOK / name).read_text(encoding="utf-8")


class ScriptedAgent(BaseChatModel):
    """Reads every file in turn, then lets the bundled target answer from what it was sent."""

    left: list[str] = Field(default_factory=lambda: [*FILES])

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, **options: Any) -> Any:
        return self

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._reply(messages))])

    def _reply(self, messages: list[BaseMessage]) -> AIMessage:
        seen = [message.text for message in messages if message.type == "tool"]
        size = sum(target.get_num_tokens(message.text) for message in messages)
        print(f"  sent: {len(messages)} messages, {size} tokens of text")
        if self.left:
            name = self.left.pop(0)
            call = {"name": "read_file", "args": {"name": name}, "id": name}
            return AIMessage("", tool_calls=[call])
        kept = any(ANSWER in message.text for message in messages)
        print(f"  the answer {ANSWER} is still in what the model reads: {kept}")
        return AIMessage(target.invoke(f"Question: {QUESTION}", documents=seen).text)


def show(name: str, middleware: AgentMiddleware[Any, Any, Any]) -> None:
    print(name)
    agent = create_agent(ScriptedAgent(), [read_file], middleware=[middleware])
    final = agent.invoke({"messages": [HumanMessage(QUESTION)]})
    whole = sum(target.get_num_tokens(message.text) for message in final["messages"])
    print(f"  answer: {final['messages'][-1].text!r}; kept in the state: {whole} tokens\n")


if __name__ == "__main__":
    show(
        "DraftCompressionMiddleware",
        DraftCompressionMiddleware(
            model=DRAFT,
            method=SpecPC.preset("2026-11", capacity=BUDGET),
            recall=True,
            progress=False,
        ),
    )
    show(
        "SummarizationMiddleware",
        SummarizationMiddleware(model=target, trigger=("tokens", BUDGET), keep=("messages", 2)),
    )
