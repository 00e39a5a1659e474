"""Documents that are read when they are indexed, in LangChain and in LlamaIndex's pipelines."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Document as LlamaDocument
from llama_index.core import MockEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from draftsieve import ConfigError, PassageStore, SpecPC
from draftsieve.integrations import langchain as lc
from draftsieve.integrations import llama_index as li

from .adapters_fixtures import QUESTION, TEXTS, tiny_compressor, tokens_read
from .embedders import Words

APART = SpecPC(ratio=0.4, unit="sentence", passages_apart=True)
CHANGED = f"{TEXTS[0]} It is painted red."
NEW = "A second ferry goes to Lund on Fridays."


def document(name: str, text: str) -> Document:
    return Document(text, metadata={"source": name})


def held(store: PassageStore, *texts: str) -> bool:
    """Whether a store holds exactly these texts."""
    return all(text in store for text in texts) and store.stats().entries == len(texts)


# ---------------------------------------------------------------- LangChain


def test_langchain_documents_are_read_once_and_come_back_as_they_were(tmp_path: Path) -> None:
    indexer = lc.DraftIndexer(compressor=tiny_compressor(), store=tmp_path)
    documents = [document(str(n), text) for n, text in enumerate(TEXTS)]
    before = [d.model_copy(deep=True) for d in documents]
    with tokens_read(tiny_compressor().model) as reads:
        assert indexer.transform_documents(documents) is documents
        assert reads() >= sum(map(tiny_compressor().count_tokens, TEXTS))
        again = [document("elsewhere", text) for text in TEXTS]
        assert indexer.transform_documents(again) is again
        assert reads() == 0
        sieve = lc.DraftCompressor(compressor=tiny_compressor(), store=tmp_path, method=APART)
        sieve.compress_documents(documents, QUESTION)
        frame = indexer.passages.frame
        assert reads() == len(frame.ids) + len(frame.tail(QUESTION).ids)
    assert documents == before


async def test_langchain_documents_are_read_beside_the_event_loop(tmp_path: Path) -> None:
    indexer = lc.DraftIndexer(compressor=tiny_compressor(), store=tmp_path)
    documents = [document(str(n), text) for n, text in enumerate(TEXTS)]
    assert await indexer.atransform_documents(documents) is documents
    assert held(indexer.passages, *TEXTS)
    assert await indexer.aprune(documents[1:]) == 1
    assert held(indexer.passages, *TEXTS[1:])


@pytest.mark.parametrize("cleanup", ["full", "incremental", "scoped_full"])
def test_a_record_managers_changes_reach_the_store(cleanup: Any, tmp_path: Path) -> None:
    indexer = lc.DraftIndexer(compressor=tiny_compressor(), store=tmp_path)
    manager = InMemoryRecordManager("tests")
    vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))

    def update(documents: Sequence[Document]) -> Any:
        read = indexer.transform_documents(documents)
        return index(
            read, manager, vectors, cleanup=cleanup, source_id_key="source", key_encoder="sha256"
        )

    def remaining() -> list[Document]:
        return vectors.get_by_ids(manager.list_keys())

    one, two, three = (document(str(n), text) for n, text in enumerate(TEXTS))
    update([one, two, three])
    assert indexer.prune(remaining()) == 0
    changed, new = document("0", CHANGED), document("new", NEW)
    with tokens_read(tiny_compressor().model) as reads:
        done = update([changed, two, new])
        read = reads()
    count = tiny_compressor().count_tokens
    assert count(CHANGED) + count(NEW) <= read < count(CHANGED) + count(NEW) + count(TEXTS[1])
    assert done["num_added"] == 2
    if cleanup == "full":  # all that remains has been given
        assert indexer.prune([changed, two, new]) == 2
        assert indexer.prune(remaining()) == 0
        assert held(indexer.passages, CHANGED, TEXTS[1], NEW)
    else:  # documents that were not given stay
        assert indexer.prune(remaining()) == 1
        assert held(indexer.passages, CHANGED, *TEXTS[1:], NEW)
    vectors.delete(manager.list_keys())
    manager.delete_keys(manager.list_keys())
    indexer.prune(remaining())
    assert held(indexer.passages)


# ---------------------------------------------------------------- LlamaIndex


def llama_document(name: str, text: str) -> LlamaDocument:
    return LlamaDocument(text=text, id_=name, metadata={"title": f"Page {name}"})


def pipeline(
    indexer: li.DraftIndexer, strategy: DocstoreStrategy = DocstoreStrategy.UPSERTS_AND_DELETE
) -> IngestionPipeline:
    return IngestionPipeline(
        transformations=[SPLITTER, indexer, MockEmbedding(embed_dim=4)],
        docstore=SimpleDocumentStore(),
        docstore_strategy=strategy,
        vector_store=SimpleVectorStore(),
    )


SPLITTER = SentenceSplitter(chunk_size=64, chunk_overlap=0)


def test_a_query_finds_the_nodes_of_a_pipeline(tmp_path: Path) -> None:
    """The texts that a postprocessor passes to the draft are those that were read."""
    indexer = li.DraftIndexer(compressor=tiny_compressor(), store=tmp_path)
    text = "\n\n".join([*TEXTS, *(f"Once more. {text}" for text in TEXTS)])
    found = pipeline(indexer).run(documents=[llama_document("all", text)])
    assert len(found) > 1
    assert held(indexer.passages, *(node.get_content() for node in found))
    sieve = li.DraftSievePostprocessor(compressor=tiny_compressor(), store=tmp_path, method=APART)
    nodes = [NodeWithScore(node=node, score=1.0) for node in found]
    with tokens_read(tiny_compressor().model) as reads:
        sieve.postprocess_nodes(nodes, QueryBundle(QUESTION))
        frame = indexer.passages.frame
        assert reads() == len(frame.ids) + len(frame.tail(QUESTION).ids)


@pytest.mark.parametrize(
    "strategy", [DocstoreStrategy.UPSERTS, DocstoreStrategy.UPSERTS_AND_DELETE]
)
def test_a_docstores_changes_reach_the_store(strategy: DocstoreStrategy, tmp_path: Path) -> None:
    indexer = li.DraftIndexer(compressor=tiny_compressor(), store=tmp_path)
    flow = pipeline(indexer, strategy)
    old = [llama_document(str(n), text) for n, text in enumerate(TEXTS)]
    flow.run(documents=old)
    assert held(indexer.passages, *TEXTS)
    with tokens_read(tiny_compressor().model) as reads:
        flow.run(documents=old)
        assert reads() == 0
        flow.run(documents=[llama_document("0", CHANGED), old[1], llama_document("new", NEW)])
        read = reads()
    count = tiny_compressor().count_tokens
    assert count(CHANGED) + count(NEW) <= read < count(CHANGED) + count(NEW) + count(TEXTS[1])
    assert flow.docstore is not None
    remaining = SPLITTER(list(flow.docstore.docs.values()))
    if strategy is DocstoreStrategy.UPSERTS:  # documents that were not given stay
        assert indexer.prune(remaining) == 1
        assert held(indexer.passages, CHANGED, *TEXTS[1:], NEW)
    else:
        assert indexer.prune(remaining) == 2
        assert held(indexer.passages, CHANGED, TEXTS[1], NEW)


def test_pipelines_cache_what_an_indexer_returns(tmp_path: Path) -> None:
    def made() -> li.DraftIndexer:
        return li.DraftIndexer(compressor=tiny_compressor(), store=tmp_path, embedder=Words())

    nodes: list[BaseNode] = [llama_document(str(n), text) for n, text in enumerate(TEXTS)]
    first = get_transformation_hash(nodes, made())
    assert first == get_transformation_hash(nodes, made())
    other = li.DraftIndexer(compressor=tiny_compressor(), store=tmp_path / "other")
    assert first != get_transformation_hash(nodes, other)  # another store must be filled
    flow = IngestionPipeline(transformations=[made()])
    before = [node.model_copy(deep=True) for node in nodes]
    for _ in range(2):
        found = flow.run(nodes=nodes)
        assert [node.get_content() for node in found] == TEXTS
        assert [node.metadata for node in found] == [node.metadata for node in before]
    assert len(flow.cache.cache.get_all(flow.cache.collection)) == 1
    assert nodes == before


async def test_nodes_are_read_beside_the_event_loop_and_in_other_processes(tmp_path: Path) -> None:
    indexer = li.DraftIndexer(compressor=tiny_compressor(), store=tmp_path)
    nodes = [llama_document(str(n), text) for n, text in enumerate(TEXTS)]
    found = await IngestionPipeline(transformations=[indexer]).arun(nodes=nodes[:2])
    assert [node.get_content() for node in found] == TEXTS[:2]
    assert held(indexer.passages, *TEXTS[:2])
    copy = pickle.loads(pickle.dumps(indexer))  # noqa: S301, as a pipeline's workers get it
    assert copy(nodes[2:]) == nodes[2:]
    assert held(indexer.passages, *TEXTS)
    assert await indexer.aprune(nodes[:1]) == 2
    assert held(indexer.passages, *TEXTS[:1])


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("kind", [lc.DraftIndexer, li.DraftIndexer])
def test_an_indexer_keeps_an_embedders_vectors(kind: Any, tmp_path: Path) -> None:
    indexing, asking = Words(), Words()
    indexer = kind(compressor=tiny_compressor(), store=tmp_path, embedder=indexing)
    if kind is lc.DraftIndexer:
        indexer.transform_documents([Document(text) for text in TEXTS])
    else:
        indexer([llama_document(str(n), text) for n, text in enumerate(TEXTS)])
    method = APART.model_copy(update={"semantic_weight": 0.5})
    sieve = lc.DraftCompressor(
        compressor=tiny_compressor(), store=tmp_path, method=method, embedder=asking
    )
    asking.asked.clear()
    sieve.compress_documents([Document(text) for text in TEXTS], QUESTION)
    assert asking.asked == [QUESTION]


@pytest.mark.parametrize("kind", [lc.DraftIndexer, li.DraftIndexer])
def test_an_indexer_needs_a_store(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="DraftIndexer has no store: give store="):
        kind(compressor=tiny_compressor())
    with pytest.raises(ConfigError, match="no option 'timeout'"):
        kind(compressor=tiny_compressor(), store=tmp_path, timeout=3)
    own = tiny_compressor().with_store(tmp_path)
    assert kind(compressor=own).passages is own.draft.store


@pytest.mark.real
def test_a_real_draft_reads_documents_once(smollm2: str, tmp_path: Path) -> None:
    """With the default method, whose heads are known for it."""
    options: dict[str, Any] = {"model": smollm2, "dtype": "float32", "store": tmp_path}
    documents = [Document(text) for text in TEXTS]
    indexer = lc.DraftIndexer(**options)
    indexer.transform_documents(documents)
    assert held(indexer.passages, *TEXTS)
    sieve = lc.DraftCompressor(**options)
    assert sieve.loaded.model is indexer.loaded.model
    with tokens_read(sieve.loaded.model) as reads:
        kept = sieve.compress_documents(documents, QUESTION)
        frame = indexer.passages.frame
        asked = len(frame.tail(QUESTION).ids)  # over the passages, and alone (late interaction)
        assert reads() == len(frame.ids) + 2 * asked
    assert "seven in the morning" in kept[0].page_content
    assert kept[0].metadata["draftsieve"]["fallback"] is None
