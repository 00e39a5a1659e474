"""A LangChain document compressor: retrieved documents in, the same documents shortened out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableLambda
from pydantic import NonNegativeInt

from ...core.config import DEFAULT_METHOD, SpecPC
from ...core.types import CompressedContext
from ...retrievers.langchain import as_passages, shortened_copy
from ...retrievers.options import SieveOptions
from ...retrievers.provenance import KEY, provenance


class _Request(NamedTuple):
    """What callbacks see as the input."""

    documents: Sequence[Document]
    query: str


class DraftCompressor(SieveOptions, BaseDocumentCompressor):
    """Shortens retrieved documents to what a draft model finds relevant to the question.

    The draft is loaded when the object is made. Documents keep their order, number (unless
    `method.drop_empty`), ids and metadata; `metadata["draftsieve"]` tells what was kept: "spans"
    (dicts of "start", "end", "score": characters of the document's original text), "tokens",
    "compressed_tokens", "score", and "fallback" (why the text is unchanged, else None).

    Args:
        method: How much is kept, and of what: a `ratio` is a share of the draft tokens of all
            documents together. None keeps whole sentences that hold 0.35 of them.
        keep_order: True for the order of the input, False for the documents of best score first.
        drop_empty: Leave out documents of which nothing is kept; None for what `method` says.
        min_tokens: Documents of fewer draft tokens together stay whole; None for what `method`
            says.

    The draft and its options (`model`, `compressor`, `timeout`, `on_error`, `system`): see
    `SieveOptions`. With `on_error="original"` a failed request gives the documents back unchanged.

    Raises:
        ModelNotFoundError: There is no such model.
        ConfigError: An option is unknown or invalid.
    """

    keep_order: bool = True
    drop_empty: bool | None = None
    min_tokens: NonNegativeInt | None = None

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Shorten documents to what matters for a question.

        Args:
            documents: Retrieved documents; they are not changed.
            query: The question.
            callbacks: They see the compression as one run of a chain named "DraftCompressor".

        Returns:
            Shortened copies in the same order, or best first where `keep_order` is False.

        Raises:
            DraftSieveError: The request failed and `on_error` is "raise"; a
                `RequestTimeoutError` where the time was up.
        """
        return self._run.invoke(_Request(documents, query), self._config(callbacks))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Do what `compress_documents` does without blocking the event loop."""
        return await self._run.ainvoke(_Request(documents, query), self._config(callbacks))

    @property
    def _run(self) -> RunnableLambda[_Request, list[Document]]:
        """A compression as LangChain traces it."""
        return RunnableLambda(self._shorten, self._ashorten)

    def _config(self, callbacks: Callbacks | None) -> RunnableConfig:
        return {"callbacks": callbacks, "run_name": type(self).__name__}

    def _shorten(self, request: _Request) -> list[Document]:
        if not request.documents:
            return []
        passages = as_passages(request.documents)
        context = self.loaded.compress(request.query, passages, self._method, **self.asking())
        return self._documents(request.documents, context)

    async def _ashorten(self, request: _Request) -> list[Document]:
        if not request.documents:
            return []
        passages = as_passages(request.documents)
        context = await self.loaded.acompress(
            request.query, passages, self._method, **self.asking()
        )
        return self._documents(request.documents, context)

    @property
    def _method(self) -> SpecPC:
        """The method with the compressor's own options."""
        own = {"drop_empty": self.drop_empty, "min_tokens": self.min_tokens}
        changed = {name: value for name, value in own.items() if value is not None}
        return (self.method or DEFAULT_METHOD).model_copy(update=changed)

    def _documents(
        self, documents: Sequence[Document], context: CompressedContext
    ) -> list[Document]:
        found = [
            shortened_copy(documents[index], passage.text, provenance(context, index))
            for passage, index in zip(context.passages, context.indices, strict=True)
        ]
        if self.keep_order:
            return found
        return sorted(found, key=lambda document: -document.metadata[KEY]["score"])
