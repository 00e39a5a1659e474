"""LangChain retrievers: BM25, late interaction, sieved by a draft, guided by the draft's guess."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from inspect import Parameter, signature
from typing import Annotated, Any, ClassVar, Unpack

from pydantic import ConfigDict, Field

from ..core.config import SpecPC
from ..core.specpc.stored.passage_store import PassageStore
from ..core.types import CompressedContext, Passage
from .bm25 import Bm25Index, Bm25Options
from .extras import require
from .late import LateIndex, LateOptions
from .options import DraftOptions, SieveOptions
from .provenance import KEY
from .sieved import RETRIEVAL_METHOD, Mode, Order, fused, picked, reading

require("langchain_core", "langchain", "draftsieve.retrievers.langchain")

from langchain_core.callbacks import (  # noqa: E402
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document  # noqa: E402
from langchain_core.retrievers import BaseRetriever  # noqa: E402
from langchain_core.runnables import RunnableConfig  # noqa: E402

Count = Annotated[int, Field(ge=1)]
_STRICT = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


def as_passages(documents: Iterable[str | Document | Passage]) -> list[str | Passage]:
    """Turn documents into passages; texts and passages stay as they are."""
    return [Passage(d.page_content, d.id) if isinstance(d, Document) else d for d in documents]


def shortened_copy(document: Document, text: str, kept: Mapping[str, Any]) -> Document:
    """A document's copy with another text, and in its metadata what was kept."""
    metadata = {**deepcopy(document.metadata), KEY: kept}
    return document.model_copy(update={"page_content": text, "metadata": metadata})


class _Indexed(BaseRetriever):
    """A retriever over an index of passages."""

    model_config = _STRICT

    index: Any = Field(exclude=True, repr=False)
    k: Count = 4

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return self._search(query, k)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return await asyncio.to_thread(self._search, query, k)

    def _search(self, query: str, k: int | None) -> list[Document]:
        return [
            Document(passage.text, id=passage.id, metadata=deepcopy(dict(passage.metadata)))
            for passage, _ in self.index.search(query, self.k if k is None else k)
        ]


class Bm25Retriever(_Indexed):
    """Finds documents by the words they share with the query.

    Args:
        index: A `Bm25Index`, made here or loaded from disk.
        k: Most documents returned; `invoke(query, k=...)` overrides it.
    """

    index: Bm25Index = Field(exclude=True, repr=False)

    @classmethod
    def from_documents(
        cls, documents: Sequence[Document], *, k: int = 4, **options: Unpack[Bm25Options]
    ) -> Bm25Retriever:
        """Index documents; options as for `Bm25Index`."""
        return cls(index=Bm25Index(_whole(documents), **options), k=k)


class LateInteractionRetriever(_Indexed):
    """Finds documents whose stored keys fit the query's, beside the words they share.

    The draft has read the documents when they were indexed; a query costs its own tokens.

    Args:
        index: A `LateIndex`.
        k: Most documents returned; `invoke(query, k=...)` overrides it.
    """

    index: LateIndex = Field(exclude=True, repr=False)

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        store: PassageStore,
        *,
        k: int = 4,
        **options: Unpack[LateOptions],
    ) -> LateInteractionRetriever:
        """Index documents, which are read into the store where it lacks them; options as for
        `LateIndex`.
        """
        return cls(index=LateIndex(_whole(documents), store, **options), k=k)


def _whole(documents: Iterable[Document]) -> list[Passage]:
    """Documents as passages, metadata and all."""
    return [Passage(d.page_content, d.id, deepcopy(d.metadata)) for d in documents]


class _Around(BaseRetriever):
    """A retriever around another one, which is asked for a number of documents."""

    model_config = _STRICT

    retriever: BaseRetriever
    k: Count = 4
    fetch_argument: str = "k"

    def _search(
        self,
        query: str,
        run_manager: CallbackManagerForRetrieverRun,
        count: int,
        options: Mapping[str, Any],
    ) -> list[Document]:
        config = RunnableConfig(callbacks=run_manager.get_child())
        return self.retriever.invoke(query, config, **{self.fetch_argument: count, **options})

    async def _asearch(
        self,
        query: str,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        count: int,
        options: Mapping[str, Any],
    ) -> list[Document]:
        """Ask the base retriever without blocking the event loop.

        LangChain hands options to the async side of a retriever whenever its sync side takes
        some, which fails where the async side is LangChain's default: then the sync side runs in
        a thread.
        """
        options = {self.fetch_argument: count, **options}
        taken = signature(type(self.retriever)._aget_relevant_documents).parameters.values()
        names = {parameter.name for parameter in taken}
        if set(options) <= names or any(p.kind is Parameter.VAR_KEYWORD for p in taken):
            config = RunnableConfig(callbacks=run_manager.get_child())
            return await self.retriever.ainvoke(query, config, **options)
        config = RunnableConfig(callbacks=run_manager.get_sync().get_child())
        return await asyncio.to_thread(self.retriever.invoke, query, config, **options)


class SievedRetriever(SieveOptions, _Around):
    """Fetches k * n documents, lets a draft read them once, and keeps the best of at most k.

    The budget is one for all documents. They come back as copies; `metadata["draftsieve"]` tells
    what was kept (as for `DraftCompressor`). Documents of which nothing was kept are left out.

    Args:
        retriever: Any base retriever. It is asked for k * n documents by the argument
            `fetch_argument`; one that does not know it returns as many as it is set to.
        k: Most documents returned; `invoke(query, k=...)` overrides it.
        n: How many times as many are fetched.
        method: Budget over all documents, and how they are read; a `ratio` is a share of all that
            was fetched. None keeps whole sentences within 1,024 draft tokens (prompt included).
        mode: "sieve" keeps the best documents and, inside them, the best spans; "rerank" keeps
            the best documents whole, the best first.
        order: "original" (as fetched) or "score"; None for the mode's own.
        fetch_argument: Name under which the base retriever takes the number of documents.

    For the other options see `SieveOptions`.
    """

    model_config = _STRICT
    default: ClassVar[SpecPC] = RETRIEVAL_METHOD

    n: Count = 4
    mode: Mode = "sieve"
    order: Order | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **options: Any,
    ) -> list[Document]:
        k = self.k if k is None else k
        found = self._search(query, run_manager, k * self.n, options)[: k * self.n]
        method = reading(self.method, self.mode, k)
        context = self.loaded.compress(query, as_passages(found), method, **self.asking())
        return self._documents(found, context, k)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **options: Any,
    ) -> list[Document]:
        k = self.k if k is None else k
        found = (await self._asearch(query, run_manager, k * self.n, options))[: k * self.n]
        method = reading(self.method, self.mode, k)
        context = await self.loaded.acompress(query, as_passages(found), method, **self.asking())
        return self._documents(found, context, k)

    def _documents(
        self, found: Sequence[Document], context: CompressedContext, k: int
    ) -> list[Document]:
        """Copies of what was kept, by index."""
        return [
            shortened_copy(found[sieved.index], sieved.text, sieved.kept)
            for sieved in picked(context, k, self.mode, self.order)
        ]


class LookaheadRetriever(DraftOptions, _Around):
    """Searches twice: with the query, and with the query and the draft's guessed answer.

    The draft reads what the first search found and guesses; both results are merged by rank. It
    costs a reading and a few decoding steps of the draft, so nothing uses it by itself: put it
    around a base retriever where questions share few words with their answers' passages.

    Args:
        retriever: Any base retriever.
        k: Most documents returned, and asked for in each search; `invoke(query, k=...)`
            overrides it.
        lookahead_tokens: Most draft tokens of the guess.
        fetch_argument: Name under which the base retriever takes the number of documents.

    For the other options see `DraftOptions`.
    """

    model_config = _STRICT

    lookahead_tokens: Count = 16

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **options: Any,
    ) -> list[Document]:
        k = self.k if k is None else k
        first = self._search(query, run_manager, k, options)
        guess = self.loaded.guess_answer(
            query, as_passages(first), self.lookahead_tokens, **self.asking()
        )
        again = f"{query} {guess}"
        second = self._search(again, run_manager, k, options) if guess else []
        return _merged(first, second)[:k]

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **options: Any,
    ) -> list[Document]:
        k = self.k if k is None else k
        first = await self._asearch(query, run_manager, k, options)
        guess = await self.loaded.aguess_answer(
            query, as_passages(first), self.lookahead_tokens, **self.asking()
        )
        again = f"{query} {guess}"
        second = await self._asearch(again, run_manager, k, options) if guess else []
        return _merged(first, second)[:k]


def _merged(*results: Sequence[Document]) -> list[Document]:
    """Each document once, by rank; a document is known by its id and text."""
    keyed = [{(d.id, d.page_content): d for d in found} for found in results]
    known = {key: document for found in reversed(keyed) for key, document in found.items()}
    return [known[key] for key in fused(*(list(found) for found in keyed))]
