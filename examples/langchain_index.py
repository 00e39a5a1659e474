"""LangChain, offline: a draft reads documents when they are indexed, and questions cost little.

A record manager says which documents are new, changed or gone; the draft's readings follow. For a
model of the hub change DRAFT (no target is needed). A real application keeps STORE, and has
embeddings, a vector store and a record manager of its own.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore

from draftsieve.integrations.langchain import DraftCompressor, DraftIndexer
from draftsieve.retrievers import Bm25Index, read_folder
from draftsieve.retrievers.langchain import Bm25Retriever

DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
HANDBOOK = Path(__file__).parent / "data" / "handbook"
QUESTIONS = [
    "What is marked on the pass of Haizek Pimemont?",
    "Until when may I stay in Shonuley House?",
]

passages = read_folder(HANDBOOK)[:16]
documents = [Document(p.text, metadata={"source": p.id}) for p in passages]
records = InMemoryRecordManager("handbook")
vectors = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))  # stands for real ones


def update(indexer: DraftIndexer, documents: list[Document]) -> None:
    """Bring vector store and readings up to date with these documents."""
    start = perf_counter()
    done = index(
        indexer.transform_documents(documents),
        records,
        vectors,
        cleanup="full",
        source_id_key="source",
        key_encoder="sha256",
    )
    gone = indexer.prune(documents)
    added = f"{done['num_added']} added, {done['num_deleted']} deleted, {gone} readings forgotten"
    print(f"{added} in {perf_counter() - start:.1f} s")


with TemporaryDirectory() as folder:
    STORE = Path(folder) / "readings"
    indexer = DraftIndexer(model=DRAFT, store=STORE)
    update(indexer, documents)
    documents[0] = Document(f"{documents[0].page_content} (As of May.)", metadata={"source": "new"})
    update(indexer, documents)

    retriever = Bm25Retriever(index=Bm25Index(passages), k=4)
    for name, store in (("read now", None), ("from the store", STORE)):
        sieve = DraftCompressor(model=DRAFT, store=store)
        for question in QUESTIONS:
            found = retriever.invoke(question)
            start = perf_counter()
            kept = sieve.compress_documents(found, question)
            tokens = sum(d.metadata["draftsieve"]["compressed_tokens"] for d in kept)
            print(f"{name}: {perf_counter() - start:.2f} s, {tokens} tokens kept: {question}")
