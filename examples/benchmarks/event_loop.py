"""How long the event loop stands still while an adapter's asynchronous call runs.

Beside each call a task asks for the loop every millisecond; the longest time it had to wait beyond
that is the block. A call that ran in the loop itself would block it for as long as the call takes.
The first row has no model at work: it is what the machine itself does to a loop. Blocks of a few
milliseconds are Python's switch between threads; a busy machine adds its own. Prints a Markdown
table. Run `python examples/benchmarks/event_loop.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import torch
from compression_cost import python_reference, take
from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from draftsieve import Engine, SpecKV, SpecPC
from draftsieve.integrations import langchain, llama_index
from draftsieve.retrievers import Bm25Index
from draftsieve.retrievers import langchain as langchain_retrievers
from draftsieve.retrievers import llama_index as llama_index_retrievers

QUESTION = "Which team won the game?"
Call = Callable[[], Awaitable[Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all adapters and print the table."""
    options = _options(argv)
    engine = Engine.load(options.target, options.draft, progress=False)
    texts = take(python_reference().paragraphs, options.tokens, engine.count_tokens)
    print(
        f"{torch.get_num_threads()} threads, {len(texts)} passages, about {options.tokens} tokens "
        f"together, {options.new_tokens} new tokens, {options.repeats} repeats.\n"
    )
    print("| call | takes, ms (median) | longest block, ms (median) | longest of all, ms |")
    print("|---|---:|---:|---:|")
    calls = {"nothing (a pause)": partial(asyncio.sleep, 0.2), **adapters(engine, texts, options)}
    for name, call in calls.items():
        asyncio.run(block(call))  # warm up
        runs = [asyncio.run(block(call)) for _ in range(options.repeats)]
        taken, blocks = zip(*runs, strict=True)
        cells = (median(taken), median(blocks), max(blocks))
        print(f"| {name} | {' | '.join(f'{1000 * cell:.1f}' for cell in cells)} |", flush=True)


async def block(call: Call) -> tuple[float, float]:
    """Seconds that a call takes, and the longest that the loop stood still meanwhile."""
    longest, pause, began = 0.0, 0.001, time.perf_counter()
    work = asyncio.ensure_future(call())
    while not work.done():
        asked = time.perf_counter()
        await asyncio.sleep(pause)
        longest = max(longest, time.perf_counter() - asked - pause)
    await work
    return time.perf_counter() - began, longest


def adapters(engine: Engine, texts: Sequence[str], options: argparse.Namespace) -> dict[str, Call]:
    """One asynchronous call of each adapter."""
    assert engine.compressor is not None
    draft: dict[str, Any] = {"compressor": engine.compressor}
    target = {"engine": engine, "max_tokens": options.new_tokens, "method": SpecPC(ratio=0.3)}
    return {
        **_langchain_calls(texts, draft, target),
        **_llama_index_calls(texts, draft, target),
    }


def _langchain_calls(
    texts: Sequence[str], draft: dict[str, Any], target: dict[str, Any]
) -> dict[str, Call]:
    documents = [Document(text, id=str(n)) for n, text in enumerate(texts)]
    compressor = langchain.DraftCompressor(**draft)
    chat, llm = langchain.ChatDraftSieve(**target), langchain.DraftSieveLLM(**target)
    base = langchain_retrievers.Bm25Retriever.from_documents(documents, k=4)
    sieved = langchain_retrievers.SievedRetriever(retriever=base, k=2, n=4, **draft)
    guided = langchain_retrievers.LookaheadRetriever(retriever=base, k=4, **draft)
    sieve = langchain.DraftCompressionMiddleware(**draft, method=SpecPC(capacity=700), keep=1)
    plain = langchain.ChatDraftSieve(**{**target, "method": None})
    agent, number = create_agent(plain, middleware=[sieve]), count()
    talk = [m for text in texts[:8] for m in (HumanMessage(text), AIMessage("Noted."))]

    async def agent_call() -> None:
        asked = HumanMessage(f"{QUESTION} ({next(number)})")  # what was shortened is remembered
        await agent.ainvoke({"messages": [*talk, asked]})

    name = "LangChain "
    asked: dict[str, Any] = {"documents": documents}
    return {
        f"{name}DraftCompressor.acompress_documents": partial(
            compressor.acompress_documents, documents, QUESTION
        ),
        f"{name}ChatDraftSieve.ainvoke, SpecPC": partial(chat.ainvoke, QUESTION, **asked),
        f"{name}ChatDraftSieve.ainvoke, SpecKV": partial(
            chat.ainvoke, QUESTION, **asked, method=SpecKV(ratio=0.3)
        ),
        f"{name}ChatDraftSieve.astream": lambda: _drained(chat.astream(QUESTION, **asked)),
        f"{name}ChatDraftSieve.abatch": partial(chat.abatch, [QUESTION] * 4, **asked),
        f"{name}DraftSieveLLM.ainvoke": partial(llm.ainvoke, QUESTION, **asked),
        f"{name}DraftCompressionMiddleware": agent_call,
        f"{name}Bm25Retriever.ainvoke": partial(base.ainvoke, QUESTION),
        f"{name}SievedRetriever.ainvoke": partial(sieved.ainvoke, QUESTION),
        f"{name}LookaheadRetriever.ainvoke": partial(guided.ainvoke, QUESTION),
    }


def _llama_index_calls(
    texts: Sequence[str], draft: dict[str, Any], target: dict[str, Any]
) -> dict[str, Call]:
    nodes = [NodeWithScore(node=TextNode(text=text), score=1.0) for text in texts]
    sieve = llama_index.DraftSievePostprocessor(**draft)
    llm = llama_index.DraftSieveLLM(**target)
    memory = llama_index.DraftSieveMemoryBlock(**draft)
    base = llama_index_retrievers.Bm25Retriever(Bm25Index.from_texts(texts), similarity_top_k=4)
    sieved = llama_index_retrievers.SievedRetriever(base, k=2, n=4, **draft)
    guided = llama_index_retrievers.LookaheadRetriever(base, k=4, **draft)
    talk, asked = [ChatMessage(text) for text in texts], [ChatMessage(QUESTION)]

    async def remembered() -> None:
        turns = llama_index.memory.Turns(talk)
        turns.question = QUESTION
        await memory.atruncate(turns, sum(len(text) for text in texts) // 8)

    async def streamed() -> None:
        await _drained(await llm.astream_chat(asked, documents=list(texts)))

    name = "LlamaIndex "
    return {
        f"{name}DraftSievePostprocessor.apostprocess_nodes": partial(
            sieve.apostprocess_nodes, nodes, QueryBundle(QUESTION)
        ),
        f"{name}DraftSieveLLM.achat": partial(llm.achat, asked, documents=list(texts)),
        f"{name}DraftSieveLLM.astream_chat": streamed,
        f"{name}DraftSieveMemoryBlock.atruncate": remembered,
        f"{name}Bm25Retriever.aretrieve": partial(base.aretrieve, QUESTION),
        f"{name}SievedRetriever.aretrieve": partial(sieved.aretrieve, QUESTION),
        f"{name}LookaheadRetriever.aretrieve": partial(guided.aretrieve, QUESTION),
    }


async def _drained(pieces: AsyncIterator[Any]) -> None:
    async for _ in pieces:
        pass


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="builtin:target")
    parser.add_argument("--draft", default="builtin:draft")
    parser.add_argument("--tokens", type=int, default=1500, help="of all passages together")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
