"""Embedding objects of both frameworks, given to the adapters."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Document as LlamaDocument
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import PrivateAttr

from draftsieve import ConfigError, ModelNotFoundError, SpecKV, SpecKVPC, SpecPC
from draftsieve.core.config import DEFAULT_METHOD, SEMANTIC_WEIGHT
from draftsieve.core.models import embedder as vectors
from draftsieve.integrations.langchain import (
    ChatDraftSieve,
    DraftCompressionMiddleware,
    DraftCompressor,
)
from draftsieve.integrations.llama_index import (
    DraftSieveLLM,
    DraftSieveMemoryBlock,
    DraftSievePostprocessor,
)
from draftsieve.retrievers import embedders
from draftsieve.retrievers import langchain as lc
from draftsieve.retrievers import llama_index as li
from draftsieve.retrievers.embedders import as_embedder, with_embedder

from .adapters_fixtures import QUESTION, TEXTS, counted, tiny_compressor, tiny_engine
from .embedders import Words, hashed, write_encoder

HALF = SpecPC(ratio=0.4, unit="sentence", semantic_weight=0.5)
ALONE = SpecPC(ratio=0.4, unit="sentence", semantic_weight=1.0)


class LangWords(Embeddings):
    """LangChain's form of the hashed words."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: set[int] = set()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.asked += texts
        self.threads.add(threading.get_ident())
        return [hashed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.asked.append(f"? {text}")
        return hashed(text)


class LlamaWords(BaseEmbedding):
    """LlamaIndex's form of the hashed words."""

    model_name: str = "words"
    _asked: list[str] = PrivateAttr(default_factory=list)

    def _get_text_embedding(self, text: str) -> list[float]:
        self._asked.append(text)
        return hashed(text)

    def _get_query_embedding(self, query: str) -> list[float]:
        self._asked.append(f"? {query}")
        return hashed(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


def documents() -> list[Document]:
    return [Document(text, id=str(n)) for n, text in enumerate(TEXTS)]


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in TEXTS]


def expected(method: SpecPC) -> list[str]:
    """What the core keeps with the same vectors."""
    own = method.model_copy(update={"embedder": Words()})
    return [p.text for p in tiny_compressor().compress(QUESTION, TEXTS, own).passages]


@pytest.mark.parametrize("method", [HALF, ALONE])
def test_a_document_compressor_asks_langchains_embeddings(method: SpecPC) -> None:
    words = LangWords()
    compressor = DraftCompressor(compressor=tiny_compressor(), method=method, embedder=words)
    with counted(tiny_compressor()) as calls:
        found = compressor.compress_documents(documents(), QUESTION)
    assert calls == ["compress"]
    assert [document.page_content for document in found] == expected(method)
    assert words.asked[-1] == f"? {QUESTION}"
    before = len(words.asked)
    compressor.compress_documents(documents(), QUESTION)
    assert len(words.asked) == before  # every text is embedded once


async def test_asynchronous_calls_leave_the_event_loop_free() -> None:
    words = LangWords()
    compressor = DraftCompressor(compressor=tiny_compressor(), method=HALF, embedder=words)
    found = await compressor.acompress_documents(documents(), QUESTION)
    assert [document.page_content for document in found] == expected(HALF)
    assert threading.get_ident() not in words.threads
    sieve = DraftSievePostprocessor(
        compressor=tiny_compressor(), method=HALF, embedder=LlamaWords()
    )
    both = await asyncio.gather(
        *(sieve.apostprocess_nodes(nodes(), QueryBundle(QUESTION)) for _ in range(2))
    )
    for found in both:
        assert [node.text for node in found] == expected(HALF)


@pytest.mark.parametrize("method", [HALF, ALONE])
def test_a_postprocessor_asks_llama_indexs_embedding(method: SpecPC) -> None:
    words = LlamaWords()
    sieve = DraftSievePostprocessor(compressor=tiny_compressor(), method=method, embedder=words)
    found = sieve.postprocess_nodes(nodes(), QueryBundle(QUESTION))
    assert [node.text for node in found] == expected(method)
    before = len(words._asked)
    assert f"? {QUESTION}" in words._asked
    sieve.postprocess_nodes(nodes(), QueryBundle(QUESTION))
    assert len(words._asked) == before
    other = method.model_copy(update={"embedder": words})  # the same, inside of the method
    again = DraftSievePostprocessor(compressor=tiny_compressor(), method=other)
    assert [n.text for n in again.postprocess_nodes(nodes(), QueryBundle(QUESTION))] == [
        node.text for node in found
    ]
    assert len(words._asked) == before  # and its vectors are shared


def test_without_a_method_the_embedder_counts_a_half() -> None:
    for made in (
        DraftCompressor(compressor=tiny_compressor(), embedder=LangWords()),
        DraftSievePostprocessor(compressor=tiny_compressor(), embedder=LlamaWords()),
    ):
        assert made.method is not None
        assert made.method.semantic_weight == (DEFAULT_METHOD.semantic_weight or SEMANTIC_WEIGHT)
        assert made.method.unit == DEFAULT_METHOD.unit
        assert made.method.ratio == DEFAULT_METHOD.ratio
    assert DraftCompressor(compressor=tiny_compressor()).method is None
    retriever = lc.Bm25Retriever.from_documents(documents())
    sieved = lc.SievedRetriever(
        retriever=retriever, compressor=tiny_compressor(), embedder=LangWords()
    )
    assert sieved.method is not None
    assert sieved.method.capacity == 1024


def test_a_folder_or_function_is_taken_too(tmp_path: Path) -> None:
    folder = str(write_encoder(tmp_path))
    for embedder in (folder, Words()):
        core = HALF.model_copy(update={"embedder": embedder})
        wanted = [p.text for p in tiny_compressor().compress(QUESTION, TEXTS, core).passages]
        compressor = DraftCompressor(compressor=tiny_compressor(), method=HALF, embedder=embedder)
        found = compressor.compress_documents(documents(), QUESTION)
        assert [document.page_content for document in found] == wanted


def test_what_cannot_be_used_is_refused_when_the_object_is_made() -> None:
    words, draft, engine = LangWords(), tiny_compressor(), tiny_engine()
    plain = SpecPC(ratio=0.4, unit="sentence")
    with pytest.raises(ConfigError, match="this SpecPC never asks it: set SpecPC"):
        DraftCompressor(compressor=draft, method=plain, embedder=words)
    with pytest.raises(ConfigError, match="this SpecKV never asks it"):
        ChatDraftSieve(engine=engine, method=SpecKV(capacity=9), embedder=words)
    with pytest.raises(ConfigError, match=r"embedder=<builtins.int .* cannot embed"):
        DraftSievePostprocessor(compressor=draft, embedder=3)
    with pytest.raises(ConfigError, match="cannot embed"):
        DraftCompressionMiddleware(compressor=draft, embedder=3)
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        DraftCompressor(compressor=draft, method=HALF, embedder="./nowhere")
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        DraftSieveLLM(engine=engine, method=HALF.model_copy(update={"embedder": "./nowhere"}))


def test_failures_leave_the_documents_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(LangWords):
        def embed_query(self, text: str) -> list[float]:
            raise ConnectionError("the service is away")

    compressor = DraftCompressor(compressor=tiny_compressor(), method=HALF, embedder=Broken())
    found = compressor.compress_documents(documents(), QUESTION)
    assert [document.page_content for document in found] == TEXTS
    assert "ConnectionError: the service is away" in found[0].metadata["draftsieve"]["fallback"]
    assert "the service is away" in caplog.text


# ---------------------------------------------------------------- models, memory, agents


def test_a_chat_model_asks_for_its_own_and_for_a_calls_method() -> None:
    words = LangWords()
    blocks: list[Any] = [{"type": "document", "text": text} for text in TEXTS]
    messages = [HumanMessage([*blocks, {"type": "text", "text": QUESTION}])]
    model = ChatDraftSieve(engine=tiny_engine(), max_tokens=3, method=HALF, embedder=words)
    spans = model.invoke(messages).response_metadata["spans"]
    assert f"? {QUESTION}" in words.asked
    later = ChatDraftSieve(engine=tiny_engine(), max_tokens=3, embedder=LangWords())
    said = later.invoke(messages, method=HALF).response_metadata
    assert said["spans"] == spans
    assert json.dumps(said["method"])
    assert "LangWords" in said["method"]["embedder"]
    assert later.invoke(messages, method=SpecPC(ratio=0.4)).response_metadata["spans"]
    both = SpecKVPC(specpc=HALF, speckv=SpecKV(ratio=0.3))
    assert later.invoke(messages, method=both).response_metadata["spans"] == spans


def test_llama_indexs_llm_and_its_json() -> None:
    from llama_index.core.base.llms.types import DocumentBlock, TextBlock

    words = LlamaWords()
    model = DraftSieveLLM(engine=tiny_engine(), max_tokens=3, method=HALF, embedder=words)
    blocks = [DocumentBlock(data=text.encode(), title=str(n)) for n, text in enumerate(TEXTS)]
    answer = model.chat([ChatMessage(blocks=[*blocks, TextBlock(text=QUESTION)])])
    assert answer.raw["spans"]
    assert f"? {QUESTION}" in words._asked
    stored = json.loads(model.to_json())
    assert stored["embedder"] == stored["method"]["embedder"]
    assert stored["embedder"].endswith("_Renamed words>")
    assert "hashed" not in repr(model)


def test_caches_of_answers_tell_embedders_apart() -> None:
    first, second = LangWords(), LangWords()
    for methods in ((HALF, HALF), (None, None)):
        texts = [
            ChatDraftSieve(
                engine=tiny_engine(), method=method, embedder=words, cache=InMemoryCache()
            )._get_llm_string()
            for method, words in zip(methods, (first, second), strict=True)
        ]
        assert texts[0] != texts[1]


async def test_a_memory_block_asks_an_embedding() -> None:
    turns = [ChatMessage(text, role="user") for text in TEXTS]
    options = {"compressor": tiny_compressor(), "tokenizer_fn": str.split}
    asked = [ChatMessage(QUESTION)]
    words, found = LlamaWords(), []
    for method in (ALONE, ALONE.model_copy(update={"embedder": Words()})):
        given = {"embedder": words} if method is ALONE else {}
        block = DraftSieveMemoryBlock(method=method, **options, **given)
        await block.aput(turns)
        short = await block.atruncate(await block.aget(asked), 25)
        found.append([message.content for message in short or ()])
    assert found[0] == found[1] != [turn.content for turn in turns]
    assert f"? {QUESTION}" in words._asked


def test_an_agents_middleware_asks_an_embedder() -> None:
    words = LangWords()
    method = SpecPC(capacity=300, unit="sentence", semantic_weight=1.0)
    middleware = DraftCompressionMiddleware(
        compressor=tiny_compressor(), method=method, embedder=words, keep=0, min_tokens=8
    )
    from langchain.agents.middleware import ModelRequest, ModelResponse

    from .test_middleware import Scripted

    call = AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "c1"}])
    messages = [
        HumanMessage(" ".join(TEXTS * 3)),
        call,
        ToolMessage(" ".join(TEXTS * 3), tool_call_id="c1"),
        HumanMessage(QUESTION),
    ]
    sent: list[Any] = []

    def handler(request: Any) -> Any:
        sent.extend(request.messages)
        return ModelResponse(result=[AIMessage("done")])

    middleware.wrap_model_call(ModelRequest(model=Scripted(lines=[]), messages=messages), handler)
    assert f"? {QUESTION}" in words.asked
    assert len(sent[2].content) < len(messages[2].content)


# ---------------------------------------------------------------- retrievers


def test_sieving_retrievers_ask_the_embedder_of_their_vector_store() -> None:
    words = LangWords()
    store = InMemoryVectorStore.from_documents(documents(), words)
    sieved = lc.SievedRetriever(
        retriever=store.as_retriever(),
        k=2,
        n=2,
        compressor=tiny_compressor(),
        method=ALONE,
        embedder=words,
    )
    found = sieved.invoke(QUESTION)
    assert found[0].page_content.startswith("The ferry to Holm leaves at seven")
    embedding = LlamaWords()
    index = VectorStoreIndex.from_documents(
        [LlamaDocument(text=text) for text in TEXTS],
        embed_model=embedding,
        transformations=[SentenceSplitter()],
    )
    other = li.SievedRetriever(
        index.as_retriever(),
        k=2,
        n=2,
        compressor=tiny_compressor(),
        method=ALONE,
        embedder=embedding,
    )
    assert other.retrieve(QUESTION)[0].node.get_content().startswith("The ferry to Holm leaves")


def test_an_embedding_is_renamed_once() -> None:
    words = LlamaWords()
    one = as_embedder(words)
    assert as_embedder(words) is one
    assert as_embedder(one) is one
    assert as_embedder(LangWords) is LangWords  # a function, as far as anybody can tell
    assert as_embedder(None) is None
    assert with_embedder(None, words) is None
    assert with_embedder(SpecKV(), words) == SpecKV()
    assert with_embedder(HALF, words).embedder is one
    own = HALF.model_copy(update={"embedder": "folder"})
    assert with_embedder(own, words).embedder == "folder"
    key, known = id(words), len(vectors._KNOWN)
    del words, one
    gc.collect()
    assert key not in embedders._MADE
    assert len(vectors._KNOWN) <= known
