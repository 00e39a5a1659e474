"""DraftCompressor and ChatDraftSieve in the retrievers, pipelines and chains of LangChain."""

from __future__ import annotations

from runpy import run_path
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import Document
from langchain_core.messages import (
    HumanMessage,
)
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda

from draftsieve.integrations.langchain import DraftCompressor

from .adapters_fixtures import (
    EXAMPLES,
    QUESTION,
    tiny_compressor,
)
from .langchain_fixtures import METHOD, chat, documents


class Fixed(BaseRetriever):
    """Finds the same documents for every question."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return documents()


async def test_the_compressor_works_in_langchains_retriever_and_pipeline() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    expected = compressor.compress_documents(documents(), QUESTION)
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Fixed())
    assert retriever.invoke(QUESTION) == expected
    assert await retriever.ainvoke(QUESTION) == expected
    pipeline = DocumentCompressorPipeline(transformers=[compressor, compressor])
    twice = pipeline.compress_documents(documents(), QUESTION)
    assert twice == compressor.compress_documents(expected, QUESTION)
    assert await pipeline.acompress_documents(documents(), QUESTION) == twice


def test_compressor_and_chat_model_make_a_chain() -> None:
    compressor = DraftCompressor(compressor=tiny_compressor(), method=METHOD)
    chain = (
        RunnableLambda(lambda question: compressor.compress_documents(documents(), question))
        | RunnableLambda(
            lambda found: [HumanMessage("\n".join([*(d.page_content for d in found), QUESTION]))]
        )
        | chat()
    )
    assert chain.invoke(QUESTION).content


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_path(str(EXAMPLES / "langchain_rag.py"))
    answer, first, *others = capsys.readouterr().out.splitlines()
    assert answer
    assert "AK-731" in first  # the draft keeps the fact that is asked for
    assert len(others) == 2
