"""LangChain's standard tests for retrievers, on all of ours."""

from __future__ import annotations

from typing import Any

from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import RetrieversIntegrationTests

from draftsieve.core.config import SpecPC
from draftsieve.retrievers import Bm25Index
from draftsieve.retrievers.langchain import Bm25Retriever, LookaheadRetriever, SievedRetriever

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor

SENTENCES = [f"{sentence.strip('.')}." for text in TEXTS for sentence in text.split(". ")]


def base() -> Bm25Retriever:
    return Bm25Retriever.from_documents([Document(text) for text in SENTENCES])


class Standard(RetrieversIntegrationTests):
    @property
    def retriever_query_example(self) -> str:
        return QUESTION


class TestBm25(Standard):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return Bm25Retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"index": Bm25Index.from_texts(SENTENCES)}


class TestSieved(Standard):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return SievedRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": base(), "compressor": tiny_compressor()}


class TestSievedToASmallBudget(TestSieved):
    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {**super().retriever_constructor_params, "method": SpecPC(ratio=0.3)}


class TestReranked(TestSieved):
    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {**super().retriever_constructor_params, "mode": "rerank"}


class TestLookahead(TestSieved):
    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return LookaheadRetriever
