"""What the LangChain tests share: documents, models over the tiny pair, merged streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
)

from draftsieve.core.config import SpecPC
from draftsieve.integrations.langchain import ChatDraftSieve, DraftSieveLLM

from .adapters_fixtures import QUESTION, TEXTS, tiny_engine, tiny_model, tiny_tokenizer

METHOD = SpecPC(ratio=0.4, unit="word")
TINY = SpecPC(capacity=1)  # cannot hold the question


def documents() -> list[Document]:
    """Two share an id, one has none; metadata is nested."""
    ids = ["a", "a", None]
    return [
        Document(page_content=text, id=name, metadata={"source": f"{n}.md", "tags": [{"n": n}]})
        for n, (text, name) in enumerate(zip(TEXTS, ids, strict=True))
    ]


def document_messages() -> list[Any]:
    blocks = [{"type": "document", "text": text, "id": f"d{n}"} for n, text in enumerate(TEXTS)]
    return [
        SystemMessage("Answer from the documents."),
        HumanMessage([*blocks, {"type": "text", "text": QUESTION}]),
    ]


def chat(**options: Any) -> ChatDraftSieve:
    return ChatDraftSieve(**{"engine": tiny_engine(), "max_tokens": 6, **options})


def llm(**options: Any) -> DraftSieveLLM:
    return DraftSieveLLM(engine=tiny_engine(), **{"max_tokens": 6, **options})


def text_of(found: Any) -> str:
    return found if isinstance(found, str) else found.text


def add(chunks: Any) -> AIMessageChunk:
    """Merge streamed chunks as LangChain does."""
    iterator: Iterator[AIMessageChunk] = iter(chunks)
    whole = next(iterator)
    for chunk in iterator:
        whole = whole + chunk
    return whole


def pair_folder(folder: Path) -> Path:
    """A tiny model and its tokenizer, saved."""
    tiny_model(32, seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
