"""LangChain, offline: a vector store finds documents, its embeddings and a draft choose in them.

The embeddings here count words, so that the example needs no download: use those of your store,
such as `HuggingFaceEmbeddings`. For a model of the hub change DRAFT (no target is needed).
"""

import re
from zlib import crc32

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from draftsieve import SpecPC
from draftsieve.integrations.langchain import DraftCompressor

DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
WIDTH = 256
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. He answers in the morning only. He likes tea.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns. It is going well.",
]
QUESTIONS = ["Which badge was issued to Mira Tolen?", "When did Project Halvora begin?"]


class WordEmbeddings(Embeddings):
    """Counts of words, each at a place that its hash gives."""

    def embed_query(self, text: str) -> list[float]:
        row = [0.1] * WIDTH
        for word in re.findall(r"\w+", text.lower()):
            row[crc32(word.encode()) % WIDTH] += 1.0
        return row

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


embeddings = WordEmbeddings()
store = InMemoryVectorStore.from_documents([Document(text) for text in TEXTS], embeddings)
method = SpecPC.preset("2026-11", ratio=0.4, semantic_weight=0.5)
compressor = DraftCompressor(model=DRAFT, method=method, embedder=embeddings)
for question in QUESTIONS:
    found = store.similarity_search(question, k=2)
    print(question)
    for document in compressor.compress_documents(found, question):
        kept = document.metadata["draftsieve"]
        sizes = f"{kept['compressed_tokens']} of {kept['tokens']} tokens kept"
        print(f"  {sizes}: {document.page_content!r}")
