"""LangChain, offline: a ContextualCompressionRetriever whose documents are sieved by a draft model.

Pages of a handbook are found by BM25, shortened to what matters to the question, and answered from
by a target model. Any retriever may stand in for BM25. For models of the hub change TARGET and
DRAFT. `pip install langchain-classic` has the retriever; `SievedRetriever` does without it, and
keeps one budget over all documents.
"""

from pathlib import Path

from langchain_classic.retrievers import ContextualCompressionRetriever

from draftsieve import SpecPC
from draftsieve.integrations.langchain import ChatDraftSieve, DraftCompressor
from draftsieve.retrievers import Bm25Index, read_folder
from draftsieve.retrievers.langchain import Bm25Retriever

TARGET = "builtin:target"  # from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
HANDBOOK = Path(__file__).parent / "data" / "handbook"
QUESTIONS = [
    "What is marked on the pass of Haizek Pimemont?",
    "Until when may I stay in Shonuley House?",
]

chat = ChatDraftSieve(model=TARGET, max_tokens=24, progress=False)
retriever = ContextualCompressionRetriever(
    base_retriever=Bm25Retriever(index=Bm25Index(read_folder(HANDBOOK)), k=4),
    base_compressor=DraftCompressor(
        model=DRAFT, method=SpecPC.preset("2026-11", ratio=0.25, drop_empty=True), progress=False
    ),
)
for question in QUESTIONS:
    documents = retriever.invoke(question)
    answer = chat.invoke(f"Question: {question}", documents=documents)
    print(f"{question}\n  {answer.text}")
    for document in documents:
        kept = document.metadata["draftsieve"]
        sizes = f"{kept['compressed_tokens']} of {kept['tokens']} tokens kept"
        print(f"  {document.metadata['source']}: {sizes}, score {kept['score']:.3f}")
        print("      " + document.page_content.replace("\n", " "))
