"""LLM and postprocessor inside LlamaIndex's query and chat engines, with the bundled pair.

Tests of blocking calls are async too: without a running event loop LlamaIndex makes one that it
never closes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from runpy import run_path
from typing import Any

import pytest
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.memory import ChatMemoryBuffer, Memory
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers.base import BaseEventHandler
from pydantic import PrivateAttr
from sqlalchemy.ext.asyncio import create_async_engine

from draftsieve.core.config import SpecKV, SpecPC
from draftsieve.core.engine import Engine
from draftsieve.integrations.llama_index import (
    DraftSieveLLM,
    DraftSieveMemoryBlock,
    DraftSievePostprocessor,
)

from .adapters_fixtures import EXAMPLES

TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
]
QUESTION = "Which badge was issued to Mira Tolen?"
TEMPLATE = ChatPromptTemplate(
    [
        ChatMessage("Answer the question using only the passages.", role="system"),
        ChatMessage("{context_str}\n\nQuestion: {query_str}"),
    ]
)


@cache
def pair() -> Engine:
    return Engine.load("builtin:target", "builtin:draft", device="cpu", progress=False)


def llm(**options: Any) -> DraftSieveLLM:
    return DraftSieveLLM(engine=pair(), **{"max_tokens": 12, **options})


def sieve(**options: Any) -> DraftSievePostprocessor:
    method = SpecPC(ratio=0.25, unit="sentence")  # room for one sentence
    return DraftSievePostprocessor(compressor=pair().compressor, **{"method": method, **options})


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(
                text=text,
                id_=f"n{n}",
                metadata={"file": f"{n}.md", "secret": n},
                excluded_llm_metadata_keys=["secret"],
                start_char_idx=100 * n,
                end_char_idx=100 * n + len(text),
            ),
            score=0.9 - n / 10,
        )
        for n, text in enumerate(TEXTS)
    ]


class Stored(BaseRetriever):
    """Always finds the same stored nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = nodes()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.found


class Recorder(BaseEventHandler):
    """Keeps what the LLM is asked."""

    _asked: list[str] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, LLMChatStartEvent):
            self._asked.append("\n".join(str(message.content) for message in event.messages))


@contextmanager
def asked() -> Iterator[list[str]]:
    """The prompts that reach the LLM."""
    recorder = Recorder()
    get_dispatcher().add_event_handler(recorder)
    try:
        yield recorder._asked
    finally:
        get_dispatcher().event_handlers.remove(recorder)


def kept_texts() -> list[str]:
    return [node.text for node in sieve().postprocess_nodes(nodes(), query_str=QUESTION)]


async def test_a_query_engine_reads_the_shortened_nodes() -> None:
    retriever = Stored()
    before = deepcopy(retriever.found)
    engine = RetrieverQueryEngine.from_args(
        retriever, llm=llm(), node_postprocessors=[sieve()], text_qa_template=TEMPLATE
    )
    with asked() as prompts:
        response = engine.query(QUESTION)
    assert "AK-731" in str(response)
    assert retriever.found == before
    assert [node.text for node in response.source_nodes] == kept_texts() != TEXTS
    assert [node.node_id for node in response.source_nodes] == ["n0", "n1", "n2"]
    assert [node.score for node in response.source_nodes] == [n.score for n in before]
    (prompt,) = prompts
    assert all(text in prompt for text in kept_texts())
    assert "She plays chess" not in prompt
    assert "file: 0.md" in prompt
    assert "secret" not in prompt
    assert "draftsieve" not in prompt


async def test_queries_stream_and_run_async() -> None:
    def engine(**options: Any) -> RetrieverQueryEngine:
        return RetrieverQueryEngine.from_args(
            Stored(),
            llm=llm(),
            node_postprocessors=[sieve()],
            text_qa_template=TEMPLATE,
            **options,
        )

    expected = str(engine().query(QUESTION))
    assert str(await engine().aquery(QUESTION)) == expected
    assert "".join(engine(streaming=True).query(QUESTION).response_gen) == expected
    streamed = await engine(streaming=True, use_async=True).aquery(QUESTION)
    assert "".join([piece async for piece in streamed.async_response_gen()]) == expected


async def test_the_cache_of_a_query_engines_prompt_can_be_evicted() -> None:
    def engine(model: DraftSieveLLM) -> RetrieverQueryEngine:
        return RetrieverQueryEngine.from_args(Stored(), llm=model, text_qa_template=TEMPLATE)

    whole = llm()
    evicting = llm(method=SpecKV(capacity=120, window_size=16))
    assert "AK-731" in str(engine(whole).query(QUESTION))
    with asked() as prompts:
        assert str(engine(evicting).query(QUESTION))
    assert "She plays chess" in prompts[0]  # text is never compressed


@pytest.mark.parametrize("mode", [MetadataMode.NONE, MetadataMode.LLM])
async def test_citations_line_up(mode: MetadataMode) -> None:
    engine = CitationQueryEngine(
        Stored(), llm=llm(), node_postprocessors=[sieve()], metadata_mode=mode
    )
    with asked() as prompts:
        response = engine.query(QUESTION)
    found = response.source_nodes
    kept = kept_texts()
    assert "" in kept  # a source of which nothing is kept goes on being counted
    assert [n.metadata["file"] for n in found] == ["0.md", "1.md", "2.md"]
    for number, (node, text, original) in enumerate(zip(found, kept, TEXTS, strict=True)):
        head = f"Source {number + 1}:\n"
        assert node.text.startswith(head)
        assert (f"file: {number}.md" in node.text) == (mode == MetadataMode.LLM)
        assert node.text.strip() in prompts[0]
        spans = node.metadata["draftsieve"]["spans"]
        assert " … ".join(original[s["start"] : s["end"]] for s in spans) == text
        assert text in node.text
    assert "draftsieve" not in prompts[0]
    assert "secret" not in prompts[0]


@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
async def test_chat_engines_read_the_shortened_nodes(kind: Any) -> None:
    def engine() -> Any:
        return kind.from_defaults(
            retriever=Stored(),
            llm=llm(),
            node_postprocessors=[sieve()],
            memory=ChatMemoryBuffer.from_defaults(token_limit=2000),
        )

    with asked() as prompts:
        response = engine().chat(QUESTION)
    assert str(response)
    assert [node.text for node in response.source_nodes] == kept_texts()
    assert "AK-731" in prompts[-1]
    assert "She plays chess" not in prompts[-1]
    assert str(await engine().achat(QUESTION)) == str(response)
    streamed = await engine().astream_chat(QUESTION)
    pieces = [piece async for piece in streamed.async_response_gen()]
    assert "".join(pieces) == str(response)


async def test_a_chat_remembers_what_left_its_history() -> None:
    block = DraftSieveMemoryBlock(
        compressor=pair().compressor, tokenizer_fn=str.split, method=SpecPC(unit="sentence")
    )
    database = create_async_engine("sqlite+aiosqlite:///:memory:")
    memory = Memory.from_defaults(
        async_engine=database,
        token_limit=60,
        chat_history_token_ratio=0.5,
        token_flush_size=10,
        memory_blocks=[block],
        tokenizer_fn=str.split,
    )
    for text in TEXTS:
        await memory.aput_messages([ChatMessage(text), ChatMessage("Noted.", role="assistant")])
    engine = SimpleChatEngine.from_defaults(llm=llm(), memory=memory)
    with asked() as prompts:
        response = await engine.achat(QUESTION)
    await database.dispose()
    assert str(response)
    assert "AK-731" in prompts[-1]  # it was the first thing said, and it is what is asked for
    assert len(prompts[-1].split()) <= 60


async def test_the_citation_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "llama_index_citations.py"))
    printed = capsys.readouterr().out
    assert "WV-023-CN" in printed  # the badge that is asked for, kept by the draft
    assert "[1] person-haizek-pimemont.md" in printed
    assert printed.count("tokens kept") == 12


def test_the_memory_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "llama_index_memory.py"))
    first, second = capsys.readouterr().out.split("\n\n")[1:]
    assert "AK-731" in first
    assert "3 May 2041" in second
    assert first.count("user:") == second.count("user:") == 4
    assert first != second
    assert "…" in first  # something gave way both times
    assert "…" in second
