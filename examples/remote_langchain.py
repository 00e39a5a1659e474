"""LangChain with a remote target: the draft sieves here, an OpenAI-compatible server answers.

Any server will do (vLLM, SGLang, a hosted one): set OPENAI_BASE_URL and OPENAI_API_KEY. For models
of the hub change TARGET (or set MODEL) to the name of the served model, and DRAFT.
"""

import os

from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

from draftsieve import SpecPC
from draftsieve.integrations.langchain import DraftCompressor

TARGET = os.environ.get("MODEL", "target")  # served from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
DOCUMENTS = [
    Document("Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214."),
    Document("Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410."),
    Document("Project Halvora began on 3 May 2041. Its budget is 420 crowns."),
]
QUESTION = "Which badge was issued to Mira Tolen?"

compressor = DraftCompressor(model=DRAFT, method=SpecPC(ratio=0.5, unit="sentence"))
chat = ChatOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    model=TARGET,
    temperature=0,
    max_tokens=24,
)


def ask(documents: list[Document]) -> None:
    passages = [f"[{n}] {d.page_content}" for n, d in enumerate(documents, 1) if d.page_content]
    answer = chat.invoke(
        [
            SystemMessage("Answer the question using only the passages."),
            HumanMessage("\n\n".join([*passages, f"Question: {QUESTION}"])),
        ]
    )
    usage = answer.usage_metadata or {}
    print(f"{usage.get('input_tokens')} tokens read by the server: {answer.text}")


ask(DOCUMENTS)
ask(list(compressor.compress_documents(DOCUMENTS, QUESTION)))
