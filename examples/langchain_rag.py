"""LangChain, offline: BM25 finds documents, a draft model sieves them, a target model answers.

For models of the hub change TARGET and DRAFT.
"""

from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from draftsieve import SpecPC
from draftsieve.integrations.langchain import ChatDraftSieve, DraftCompressor
from draftsieve.retrievers import Bm25Index

TARGET = "builtin:target"  # from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
]
QUESTION = "Which badge was issued to Mira Tolen?"

index = Bm25Index.from_texts(TEXTS)
compressor = DraftCompressor(model=DRAFT, method=SpecPC(ratio=0.5, unit="sentence"))
chat = ChatDraftSieve(model=TARGET, max_tokens=24)


def sieve(question: str) -> dict[str, Any]:
    found = [Document(p.text, id=p.id) for p, _ in index.search(question, k=3)]
    return {"question": question, "documents": compressor.compress_documents(found, question)}


def answer(sieved: dict[str, Any]) -> str:
    return chat.invoke(f"Question: {sieved['question']}", documents=sieved["documents"]).text


chain = RunnableLambda(sieve) | RunnablePassthrough.assign(answer=answer)
result = chain.invoke(QUESTION)
print(result["answer"])
for document in result["documents"]:
    print(document.id, repr(document.page_content), document.metadata["draftsieve"]["spans"])
