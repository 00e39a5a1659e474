"""Adapters of both frameworks over passages that the draft has read before."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from llama_index.core.base.llms.types import ChatMessage, DocumentBlock, TextBlock
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from draftsieve import ConfigError, ModelError, PassageStore, SpecKV, SpecPC, StoreError
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
from draftsieve.retrievers import langchain as lc
from draftsieve.retrievers import llama_index as li

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    save_pair,
    tiny_compressor,
    tiny_engine,
    tokens_read,
)
from .embedders import Words

APART = SpecPC(ratio=0.4, unit="sentence", passages_apart=True)
Ask = Callable[[], Any]


def documents() -> list[Document]:
    return [Document(text, id=str(n)) for n, text in enumerate(TEXTS)]


def nodes() -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text), score=1.0) for text in TEXTS]


def _document_compressor(**options: Any) -> Ask:
    made = DraftCompressor(method=APART, **options)
    return lambda: [d.page_content for d in made.compress_documents(documents(), QUESTION)]


def _langchain_retriever(**options: Any) -> Ask:
    base = lc.Bm25Retriever.from_documents(documents(), k=3)
    made = lc.SievedRetriever(retriever=base, k=3, n=1, method=APART, **options)
    return lambda: [d.page_content for d in made.invoke(QUESTION)]


def _postprocessor(**options: Any) -> Ask:
    made = DraftSievePostprocessor(method=APART, **options)
    return lambda: [n.text for n in made.postprocess_nodes(nodes(), QueryBundle(QUESTION))]


def _llama_retriever(**options: Any) -> Ask:
    base = li.Bm25Retriever.from_nodes([n.node for n in nodes()], similarity_top_k=3)
    made = li.SievedRetriever(base, k=3, n=1, method=APART, **options)
    return lambda: [n.text for n in made.retrieve(QUESTION)]


def _memory(**options: Any) -> Ask:
    block = DraftSieveMemoryBlock(method=APART, tokenizer_fn=str.split, **options)
    turns = [ChatMessage(text, role="user") for text in TEXTS]

    async def ask() -> list[str | None]:
        block.messages = []
        await block.aput(turns)
        short = await block.atruncate(await block.aget([ChatMessage(QUESTION)]), 20)
        return [message.content for message in short or ()]

    return lambda: asyncio.run(ask())


READERS = [
    _document_compressor,
    _langchain_retriever,
    _postprocessor,
    _llama_retriever,
    _memory,
]


@pytest.mark.parametrize("make", READERS)
def test_the_second_call_reads_only_the_question(make: Callable[..., Ask], tmp_path: Path) -> None:
    """A folder that an application filled before, and one that fills as it is used."""
    plain = tiny_compressor()
    with PassageStore.open(tmp_path / "filled", plain) as store:
        store.add(TEXTS)
        question = len(store.frame.tail(QUESTION).ids)
        beginning = len(store.frame.ids)
    whole = sum(map(plain.count_tokens, TEXTS))
    filled = make(compressor=plain, store=tmp_path / "filled")
    filling = make(compressor=plain, store=str(tmp_path / "filling"), store_new=True)
    with tokens_read(plain.model) as reads:
        first = filled()
        assert reads() == beginning + question
        assert filled() == first
        assert reads() == question
        assert filling() == first
        assert reads() >= beginning + whole + question
        assert filling() == first
        assert reads() == question
    assert plain.draft.store is None


def test_an_agents_texts_come_from_the_store(tmp_path: Path) -> None:
    from langchain.agents.middleware import ModelRequest, ModelResponse

    from .test_middleware import Scripted

    method = SpecPC(capacity=150, unit="sentence", passages_apart=True)
    messages = [
        HumanMessage("Look it up."),
        AIMessage("", tool_calls=[{"name": "look", "args": {}, "id": "c1"}]),
        ToolMessage(" ".join(TEXTS), tool_call_id="c1"),
        HumanMessage(QUESTION),
    ]

    def ask() -> list[Any]:
        made = DraftCompressionMiddleware(
            compressor=tiny_compressor(), method=method, keep=0, min_tokens=8,
            store=tmp_path, store_new=True,
        )  # fmt: skip
        sent: list[Any] = []

        def handler(request: Any) -> Any:
            sent.extend(message.content for message in request.messages)
            return ModelResponse(result=[AIMessage("done")])

        made.wrap_model_call(ModelRequest(model=Scripted(lines=[]), messages=messages), handler)
        return sent

    whole = tiny_compressor().count_tokens(" ".join(TEXTS))
    with tokens_read(tiny_compressor().model) as reads:
        first = ask()
        fresh = reads()
        assert ask() == first
        assert 0 < reads() <= fresh - whole
    assert len(first[2]) < len(" ".join(TEXTS))


def _chat(**options: Any) -> Any:
    blocks: list[Any] = [{"type": "document", "text": text} for text in TEXTS]
    messages = [HumanMessage([*blocks, {"type": "text", "text": QUESTION}])]
    model = ChatDraftSieve(**options)
    return model.loaded, lambda: model.invoke(messages).response_metadata["spans"]


def _llm(**options: Any) -> Any:
    blocks = [DocumentBlock(data=text.encode(), title=str(n)) for n, text in enumerate(TEXTS)]
    messages = [ChatMessage(blocks=[*blocks, TextBlock(text=QUESTION)])]
    model = DraftSieveLLM(**options)
    return model.loaded, lambda: model.chat(messages).raw["spans"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("make", [_chat, _llm])
def test_models_answer_from_the_store(
    make: Callable[..., Any], pair: dict[str, str], tmp_path: Path
) -> None:
    options = {**pair, "method": APART, "max_tokens": 2}
    engine, ask = make(**options, store=tmp_path, store_new=True)
    whole = sum(map(engine.compressor.count_tokens, TEXTS))
    with tokens_read(engine.draft) as reads:
        spans = ask()
        assert reads() > whole
        assert ask() == spans
        assert 0 < reads() < whole
    _, again = make(**options, store=tmp_path)
    assert again() == spans


# ---------------------------------------------------------------- what is shared, what is written


def test_adapters_share_the_model_but_not_the_store(pair: dict[str, str], tmp_path: Path) -> None:
    ours, theirs, neither = (
        DraftCompressor(model=pair["draft"], method=APART, store=store, store_new=True)
        for store in (tmp_path / "ours", tmp_path / "theirs", None)
    )
    assert ours.loaded.model is theirs.loaded.model is neither.loaded.model
    ours.compress_documents(documents()[:2], QUESTION)
    theirs.compress_documents(documents()[2:], QUESTION)
    neither.compress_documents(documents(), QUESTION)
    for made, known in ((ours, [True, True, False]), (theirs, [False, False, True])):
        store = made.loaded.draft.store
        assert store is not None
        assert [text in store for text in TEXTS] == known
    assert neither.loaded.draft.store is None


def test_a_compressor_that_is_given_keeps_its_own_store(tmp_path: Path) -> None:
    own = tiny_compressor().with_store(tmp_path / "own")
    made = DraftSievePostprocessor(compressor=own)
    assert made.loaded is own
    assert made.store == str(tmp_path / "own")
    other = DraftSievePostprocessor(compressor=own, store=tmp_path / "other")
    assert other.store == str(tmp_path / "other")
    assert own.draft.store is not None
    assert own.draft.store.where == str(tmp_path / "own")
    assert other.loaded.model is own.model


def test_an_open_store_is_used_as_it_is() -> None:
    store = PassageStore.open(":memory:", tiny_compressor())
    store.add(TEXTS)
    made = DraftCompressor(compressor=tiny_compressor(), store=store, method=APART)
    assert made.store == ":memory:"
    with tokens_read(tiny_compressor().model) as reads:
        made.compress_documents(documents(), QUESTION)
        size = len(store.frame.ids) + len(store.frame.tail(QUESTION).ids)
        assert reads() == size


def test_stores_are_written_out_as_places(pair: dict[str, str], tmp_path: Path) -> None:
    given = {"model": pair["draft"], "method": APART, "store": tmp_path / "store"}
    sieve = DraftSievePostprocessor(**given, store_new=True)
    found = [n.text for n in sieve.postprocess_nodes(nodes(), QueryBundle(QUESTION))]
    stored = json.loads(sieve.to_json())
    assert stored["store"] == str(tmp_path / "store")
    again = DraftSievePostprocessor.from_dict(stored)
    assert again.loaded.draft.store_new
    store = sieve.loaded.draft.store
    assert store is not None
    asked = len(store.frame.ids) + len(store.frame.tail(QUESTION).ids)  # and no passage
    copies = (again, copy.deepcopy(sieve), pickle.loads(pickle.dumps(sieve)))  # noqa: S301
    for one in (*copies, sieve.model_copy()):
        with tokens_read(one.loaded.model) as reads:
            assert [n.text for n in one.postprocess_nodes(nodes(), QueryBundle(QUESTION))] == found
            assert reads() <= asked
    first, second = (
        ChatDraftSieve(**pair, method=APART, store=store)._get_llm_string()
        for store in (tmp_path / "store", None)
    )
    assert first != second
    memory = PassageStore.open(":memory:", tiny_compressor())
    memory.add(TEXTS)
    assert TEXTS[0] in copy.deepcopy(memory)
    assert TEXTS[0] not in pickle.loads(pickle.dumps(memory))  # noqa: S301


def test_what_cannot_be_served_is_refused_when_the_object_is_made(
    pair: dict[str, str], tmp_path: Path
) -> None:
    together = SpecPC(ratio=0.4)
    PassageStore.open(tmp_path, tiny_compressor()).close()
    for make in (_document_compressor, _llama_retriever):
        with pytest.raises(StoreError, match="another draft"):
            make(model=pair["draft"], store=tmp_path)
    with pytest.raises(ConfigError, match="reads them together"):
        DraftCompressor(compressor=tiny_compressor(), method=together, store=tmp_path)
    with pytest.raises(ConfigError, match="reads them together"):
        ChatDraftSieve(**pair, method=together, store=":memory:")
    with pytest.raises(ConfigError, match=r"give it to Engine.load\(..., store=...\)"):
        DraftSieveLLM(engine=tiny_engine(), store=tmp_path)
    with pytest.raises(ModelError, match="A store reads with a draft model and there is none"):
        ChatDraftSieve(model=pair["model"], method=SpecKV(capacity=9, scorer="snapkv"), store="x")
    with pytest.raises(ConfigError, match="store=3"):
        DraftCompressor(compressor=tiny_compressor(), store=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("Dear all", encoding="utf-8")
    with pytest.raises(StoreError, match="is no store"):
        DraftCompressor(compressor=tiny_compressor(), store=tmp_path / "other")


# ---------------------------------------------------------------- embedders, guesses


def test_an_embedder_opens_the_stores_vectors(tmp_path: Path) -> None:
    draft, indexing = tiny_compressor(), Words()
    with PassageStore.open(tmp_path, draft, embedder=indexing) as store:
        store.add(TEXTS)
    asking = Words()
    method = APART.model_copy(update={"semantic_weight": 0.5})
    made = DraftCompressor(compressor=draft, store=tmp_path, method=method, embedder=asking)
    plain = DraftCompressor(compressor=draft, store=":memory:", method=method, embedder=Words())
    asking.asked.clear()  # it was asked who it is
    kept = [d.page_content for d in made.compress_documents(documents(), QUESTION)]
    assert asking.asked == [QUESTION]
    assert kept == [d.page_content for d in plain.compress_documents(documents(), QUESTION)]
    with pytest.raises(StoreError, match="another embedder"):
        DraftCompressor(
            compressor=draft, store=tmp_path, method=method,
            embedder=lambda texts: [row[::-1] for row in Words()(texts)],
        )  # fmt: skip
    without = DraftCompressor(compressor=draft, store=tmp_path, method=APART)
    assert without.loaded.draft.store is not None
    assert without.loaded.draft.store.vectors is None


def test_a_guess_is_made_with_a_store_too(tmp_path: Path) -> None:
    """Also of passages that exceed the draft's window."""
    stored = tiny_compressor().with_store(tmp_path, store_new=True)
    for texts in (TEXTS, [f"{number}. {text}" for number in range(12) for text in TEXTS]):
        assert stored.guess_answer(QUESTION, texts, 4)
    assert stored.draft.store is not None
    assert f"3. {TEXTS[0]}" in stored.draft.store
    base = lc.Bm25Retriever.from_documents(documents(), k=2)
    found = lc.LookaheadRetriever(
        retriever=base, k=2, compressor=tiny_compressor(), store=tmp_path, on_error="raise"
    ).invoke(QUESTION)
    assert len(found) == 2
