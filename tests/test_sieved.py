"""Sieving retrievers of both frameworks over one draft, and the saved index they can start from."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from llama_index.core.base.base_retriever import BaseRetriever as LlamaIndexRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from pydantic import Field

from draftsieve.core.config import SpecPC
from draftsieve.core.errors import BudgetError, ConfigError, RequestTimeoutError
from draftsieve.core.types import Passage
from draftsieve.retrievers import Bm25Index, FolderError
from draftsieve.retrievers import langchain as lc
from draftsieve.retrievers import llama_index as li
from draftsieve.retrievers.options import DraftArguments, DraftOptions
from draftsieve.retrievers.sieved import fused

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor

METHOD = SpecPC(ratio=0.3, unit="sentence")
PASSAGES = [f"Notice {n}. {TEXTS[n % 3]}" for n in range(9)]
IDS = [f"p{n}" for n in range(9)]


@dataclass
class Found:
    """What a retriever of either framework returned."""

    id: str | None
    text: str
    score: float | None
    metadata: dict[str, Any]


class DocumentsInOrder(LangChainRetriever):
    """The first documents, whatever the query."""

    documents: list[Document]
    asked: list[Any] = Field(default_factory=list)

    def _get_relevant_documents(
        self, query: str, *, run_manager: Any, k: int | None = None
    ) -> list[Document]:
        self.asked.append((query, k))
        return self.documents[:k]


class NodesInOrder(LlamaIndexRetriever):
    """The first nodes, whatever the query."""

    def __init__(self, nodes: list[TextNode]) -> None:
        super().__init__()
        self.nodes, self.asked, self.similarity_top_k = nodes, [], 2

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        self.asked.append((query_bundle.query_str, self.similarity_top_k))
        return [NodeWithScore(node=n, score=0.5) for n in self.nodes[: self.similarity_top_k]]


def documents() -> list[Document]:
    pairs = zip(PASSAGES, IDS, strict=True)
    return [Document(text, id=name, metadata={"tags": [name]}) for text, name in pairs]


def nodes() -> list[TextNode]:
    pairs = zip(PASSAGES, IDS, strict=True)
    return [TextNode(text=text, id_=name, metadata={"tags": [name]}) for text, name in pairs]


def from_documents(found: Sequence[Document]) -> list[Found]:
    return [
        Found(d.id, d.page_content, d.metadata.get("draftsieve", {}).get("score"), d.metadata)
        for d in found
    ]


def from_nodes(found: Sequence[NodeWithScore]) -> list[Found]:
    return [Found(n.node.node_id, n.node.text, n.score, n.node.metadata) for n in found]


def with_langchain(question: str = QUESTION, **options: Any) -> list[Found]:
    retriever = lc.SievedRetriever(
        **{
            "retriever": DocumentsInOrder(documents=documents()),
            "compressor": tiny_compressor(),
            **options,
        }
    )
    return from_documents(retriever.invoke(question))


def with_llama_index(question: str = QUESTION, **options: Any) -> list[Found]:
    retriever = li.SievedRetriever(
        options.pop("retriever", NodesInOrder(nodes())), compressor=tiny_compressor(), **options
    )
    return from_nodes(retriever.retrieve(question))


both = pytest.mark.parametrize("sieved", [with_langchain, with_llama_index])
Sieve = Callable[..., list[Found]]


@pytest.fixture
def core_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the core's methods that are called, in order."""
    calls: list[str] = []
    kind = type(tiny_compressor())
    for name in ("compress", "acompress", "guess_answer", "aguess_answer"):
        inner = getattr(kind, name)

        def call(*args: Any, _inner: Any = inner, _name: str = name, **kwargs: Any) -> Any:
            calls.append(_name)
            return _inner(*args, **kwargs)

        monkeypatch.setattr(kind, name, call)
    return calls


def scores(count: int) -> list[float]:
    """Best token of each passage, from a reading of all of them."""
    method = METHOD.model_copy(update={"max_passages": count})
    return [s.score for s in tiny_compressor().compress(QUESTION, PASSAGES[:count], method).sizes]


# -- sieving ------------------------------------------------------------------------------------


@both
def test_the_best_passages_stay_within_one_budget(sieved: Sieve, core_calls: list[str]) -> None:
    found = sieved(k=2, n=4, method=METHOD)
    assert core_calls == ["compress"]
    best = sorted(range(8), key=lambda i: -scores(8)[i])[:2]
    assert [f.id for f in found] == [IDS[i] for i in sorted(best)]
    tokens = [tiny_compressor().count_tokens(text) for text in PASSAGES[:8]]
    assert sum(f.metadata["draftsieve"]["compressed_tokens"] for f in found) > 0
    assert sum(f.metadata["draftsieve"]["compressed_tokens"] for f in found) <= 0.3 * sum(tokens)
    for f in found:
        original = PASSAGES[IDS.index(str(f.id))]
        spans = f.metadata["draftsieve"]["spans"]
        assert f.text == " … ".join(original[s["start"] : s["end"]] for s in spans)
        assert f.metadata["tags"] == [f.id]


@both
def test_a_small_budget_cuts_inside_passages(sieved: Sieve) -> None:
    found = sieved(k=3, n=3, method=SpecPC(ratio=0.08, unit="word", neighbor_tokens=0))
    assert found
    assert all(len(f.text) < len(PASSAGES[IDS.index(str(f.id))]) for f in found)


@both
def test_a_reranker_returns_whole_passages_best_first(sieved: Sieve) -> None:
    found = sieved(k=3, n=3, mode="rerank", method=METHOD)
    order = sorted(range(9), key=lambda i: -scores(9)[i])[:3]
    assert [(f.id, f.text) for f in found] == [(IDS[i], PASSAGES[i]) for i in order]
    assert [f.score for f in found] == pytest.approx([scores(9)[i] for i in order])
    originals = sieved(k=3, n=3, mode="rerank", method=METHOD, order="original")
    assert [f.id for f in originals] == sorted(str(f.id) for f in found)


@both
def test_order_by_score(sieved: Sieve) -> None:
    found = sieved(k=3, n=3, method=METHOD, order="score")
    assert [f.score for f in found] == sorted((f.score or 0 for f in found), reverse=True)
    assert {f.id for f in found} == {f.id for f in sieved(k=3, n=3, method=METHOD)}


@both
def test_k_is_the_most_even_where_all_fits(sieved: Sieve) -> None:
    roomy = SpecPC(capacity=100_000)
    assert [f.text for f in sieved(k=9, n=1, method=roomy)] == PASSAGES
    found = sieved(k=4, n=2, method=roomy)
    assert len(found) == 4
    assert all(f.text in PASSAGES[:8] for f in found)
    assert len(sieved(k=50, n=2, method=roomy)) == 9


def test_base_retrievers_are_asked_for_k_times_n() -> None:
    base = DocumentsInOrder(documents=documents())
    retriever = lc.SievedRetriever(retriever=base, compressor=tiny_compressor(), k=2, n=3)
    retriever.invoke(QUESTION)
    retriever.invoke(QUESTION, k=1)
    assert base.asked == [(QUESTION, 6), (QUESTION, 3)]
    nodes_base = NodesInOrder(nodes())
    assert len(with_llama_index(retriever=nodes_base, k=2, n=3)) == 2
    assert nodes_base.asked == [(QUESTION, 6)]
    assert nodes_base.similarity_top_k == 2  # the caller's retriever keeps its own


async def test_async_retrieval_equals_sync(core_calls: list[str]) -> None:
    first = lc.SievedRetriever(
        retriever=DocumentsInOrder(documents=documents()), compressor=tiny_compressor(), k=2
    )
    second = li.SievedRetriever(NodesInOrder(nodes()), compressor=tiny_compressor(), k=2)
    assert await first.ainvoke(QUESTION) == first.invoke(QUESTION)
    expected = [(n.node.text, n.score) for n in second.retrieve(QUESTION)]
    assert [(n.node.text, n.score) for n in await second.aretrieve(QUESTION)] == expected
    assert core_calls.count("acompress") == 2


def test_stored_documents_and_nodes_are_not_changed() -> None:
    kept_documents, kept_nodes = documents(), nodes()
    base = DocumentsInOrder(documents=kept_documents)
    for d in lc.SievedRetriever(retriever=base, compressor=tiny_compressor(), k=2).invoke(QUESTION):
        d.metadata["tags"].append("changed")
    sieved = li.SievedRetriever(NodesInOrder(kept_nodes), compressor=tiny_compressor(), k=2)
    for n in sieved.retrieve(QUESTION):
        n.node.metadata["tags"].append("changed")
        assert "draftsieve" not in n.node.get_content(MetadataMode.LLM)
    assert kept_documents == documents()
    assert [n.to_dict() for n in kept_nodes] == [n.to_dict() for n in nodes()]


@both
def test_a_failure_returns_what_was_fetched(sieved: Sieve) -> None:
    found = sieved(k=2, method=SpecPC(capacity=1))
    assert [f.text for f in found] == PASSAGES[:2]
    assert all("BudgetError" in f.metadata["draftsieve"]["fallback"] for f in found)
    with pytest.raises(BudgetError):
        sieved(k=2, method=SpecPC(capacity=1), on_error="raise")


def test_nothing_found_stays_nothing() -> None:
    assert with_langchain(retriever=DocumentsInOrder(documents=[])) == []
    assert with_llama_index(retriever=NodesInOrder([])) == []


def test_wrong_options_are_refused() -> None:
    base = DocumentsInOrder(documents=[])
    with pytest.raises(ConfigError, match="keep"):
        lc.SievedRetriever(retriever=base, compressor=tiny_compressor(), keep=3)
    with pytest.raises(ConfigError, match="k=0"):
        lc.SievedRetriever(retriever=base, compressor=tiny_compressor(), k=0)
    with pytest.raises(ConfigError, match="keep"):
        li.SievedRetriever(NodesInOrder([]), compressor=tiny_compressor(), keep=3)
    with pytest.raises(ConfigError, match="n is 0"):
        li.SievedRetriever(NodesInOrder([]), compressor=tiny_compressor(), n=0)


def test_wrong_options_are_refused_before_a_draft_is_loaded() -> None:
    assert DraftArguments.__annotations__.keys() == DraftOptions.model_fields.keys()
    for options in ({"timeout": 0.0}, {"on_error": "ignore"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            li.SievedRetriever(NodesInOrder([]), model="gone", **options)


def test_a_retrieval_out_of_time_returns_what_was_fetched_or_raises() -> None:
    for sieved in (with_langchain, with_llama_index):
        found = sieved(timeout=1e-6, k=2, n=2)
        assert [each.text for each in found] == PASSAGES[:2]
        with pytest.raises(RequestTimeoutError):
            sieved(timeout=1e-6, on_error="raise")
    base = DocumentsInOrder(documents=documents())
    options = {"compressor": tiny_compressor(), "k": 3, "timeout": 1e-6}
    guided = lc.LookaheadRetriever(retriever=base, **options)
    assert [d.id for d in guided.invoke(QUESTION)] == IDS[:3]
    with pytest.raises(RequestTimeoutError):
        lc.LookaheadRetriever(retriever=base, **options, on_error="raise").invoke(QUESTION)


def test_the_bundled_draft_finds_the_passage_that_answers() -> None:
    texts = [
        "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays.",
        "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
        "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
        "The office of Tessa Varn is room 118. She was born in 1988.",
    ]
    base = DocumentsInOrder(documents=[Document(text) for text in texts])
    retriever = lc.SievedRetriever(
        retriever=base, k=1, n=4, mode="rerank", model="builtin:draft", progress=False
    )
    assert retriever.invoke("Which badge was issued to Mira Tolen?")[0].page_content == texts[0]
    assert retriever.invoke("When did Project Halvora begin?")[0].page_content == texts[2]


# -- lookahead ----------------------------------------------------------------------------------


def test_ranks_are_merged() -> None:
    assert fused("abc", "dca") == list("acdb")
    assert fused("abc", "") == list("abc")
    assert fused("aab") == list("ab")


def test_the_guess_joins_the_second_query(core_calls: list[str]) -> None:
    base = DocumentsInOrder(documents=documents())
    options: dict[str, Any] = {"compressor": tiny_compressor(), "k": 3, "lookahead_tokens": 5}
    found = lc.LookaheadRetriever(retriever=base, **options).invoke(QUESTION)
    guess = tiny_compressor().guess_answer(QUESTION, PASSAGES[:3], 5)
    assert guess
    assert base.asked == [(QUESTION, 3), (f"{QUESTION} {guess}", 3)]
    assert found == documents()[:3]
    assert core_calls == ["guess_answer"] * 2  # one of them is this test's
    nodes_base = NodesInOrder(nodes())
    retriever = li.LookaheadRetriever(nodes_base, **options)
    assert [n.node.node_id for n in retriever.retrieve(QUESTION)] == IDS[:3]
    assert nodes_base.asked == base.asked


async def test_async_lookahead_equals_sync() -> None:
    index = Bm25Index([Passage(t, i) for t, i in zip(PASSAGES, IDS, strict=True)])
    first = lc.LookaheadRetriever(
        retriever=lc.Bm25Retriever(index=index), compressor=tiny_compressor()
    )
    assert await first.ainvoke(QUESTION) == first.invoke(QUESTION)
    second = li.LookaheadRetriever(li.Bm25Retriever(index), compressor=tiny_compressor())
    names = [n.node.node_id for n in await second.aretrieve(QUESTION)]
    assert names == [n.node.node_id for n in second.retrieve(QUESTION)]
    assert names == [d.id for d in first.invoke(QUESTION)]


def test_a_failed_guess_leaves_the_first_search() -> None:
    base = DocumentsInOrder(documents=documents())
    options: dict[str, Any] = {"retriever": base, "compressor": tiny_compressor(), "k": 2}
    endless = "word " * 2000
    retriever = lc.LookaheadRetriever(**options)
    assert retriever.invoke(endless) == documents()[:2]
    assert len(base.asked) == 1
    with pytest.raises(ValueError, match="tokens"):
        lc.LookaheadRetriever(**options, on_error="raise").invoke(endless)


def test_retrievers_combine() -> None:
    index = Bm25Index([Passage(t, i) for t, i in zip(PASSAGES, IDS, strict=True)])
    guided = li.LookaheadRetriever(li.Bm25Retriever(index), compressor=tiny_compressor())
    both_of_them = li.SievedRetriever(guided, compressor=tiny_compressor(), k=2, n=3)
    assert len(both_of_them.retrieve(QUESTION)) == 2
    assert (guided.k, both_of_them.retriever.k) == (4, 6)


# -- the index on disk --------------------------------------------------------------------------

ODD = [
    Passage("Línea uno\nwith\u2028separators \x1c and \ud800", "a", {"n": [1, {"x": None}]}),
    Passage("渡し船は七時に出ます。", None),
    Passage("The ferry leaves the harbour.", "a"),
]


def test_an_index_comes_back_from_disk(tmp_path: Path) -> None:
    index = Bm25Index(ODD, stopwords=["The"], k1=1.2, b=0.5)
    index.save(tmp_path / "deep" / "index")
    loaded = Bm25Index.load(tmp_path / "deep" / "index")
    for question in ("the ferry", "船", "separators línea", "nothing", "the"):
        assert loaded.search(question, 3) == index.search(question, 3)
    assert [p for p, _ in loaded.search("the", 3)] == ODD
    index_of_nothing = Bm25Index([])
    index_of_nothing.save(tmp_path / "deep" / "index")
    assert len(Bm25Index.load(tmp_path / "deep" / "index")) == 0


def test_a_saved_index_holds_no_pickle(tmp_path: Path) -> None:
    Bm25Index(ODD).save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.suffix in (".json", ".jsonl", ".npy")
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)


def test_damaged_indexes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no whole index"):
        Bm25Index.load(tmp_path / "gone")
    Bm25Index(ODD).save(tmp_path)
    whole = (tmp_path / "passages.jsonl").read_text()
    (tmp_path / "passages.jsonl").write_text(whole.splitlines()[0])
    with pytest.raises(FolderError, match="do not belong together"):
        Bm25Index.load(tmp_path)
    (tmp_path / "passages.jsonl").write_text(whole)
    np.save(tmp_path / "data.csc.index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FolderError, match="no whole index"):
        Bm25Index.load(tmp_path)
    options = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**options, "format": 9}))
    with pytest.raises(FolderError, match="format 9"):
        Bm25Index.load(tmp_path)


def test_metadata_that_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="passage 'x'"):
        Bm25Index([Passage("text", "x", {"when": object()})]).save(tmp_path)


def test_bm25_retrievers_return_copies_with_metadata() -> None:
    retriever = lc.Bm25Retriever.from_documents(documents(), k=2)
    found = retriever.invoke("notice 8")
    assert found[0] == documents()[8]
    found[0].metadata["tags"].append("changed")
    assert retriever.invoke("notice 8")[0] == documents()[8]
    node = li.Bm25Retriever.from_nodes(nodes(), similarity_top_k=1).retrieve("notice 8")[0]
    assert (node.node.node_id, node.node.text) == ("p8", PASSAGES[8])
    assert node.node.metadata == {"tags": ["p8"]}


async def test_bm25_searches_leave_the_event_loop_free() -> None:
    """While the search waits (here for the loop to let it go), the loop goes on."""
    released = threading.Event()

    class Waiting(Bm25Index):
        def search(self, *args: Any, **options: Any) -> Any:
            assert released.wait(20), "the event loop was blocked"
            return super().search(*args, **options)

    index = Waiting([Passage(text, f"p{n}") for n, text in enumerate(PASSAGES)])
    searches: list[Any] = [
        lc.Bm25Retriever(index=index, k=1).ainvoke("notice 8"),
        li.Bm25Retriever(index, similarity_top_k=1).aretrieve("notice 8"),
    ]
    for search in searches:
        released.clear()
        work = asyncio.create_task(search)
        await asyncio.sleep(0.01)
        released.set()
        assert len(await work) == 1
