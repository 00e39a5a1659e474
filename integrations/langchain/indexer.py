"""A LangChain document transformer: documents in, read by the draft, the same documents out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document

from ...retrievers.langchain import as_passages
from ...retrievers.options import IndexOptions


class DraftIndexer(IndexOptions, BaseDocumentTransformer):
    """Lets the draft read documents when they are indexed, so that questions need not.

    It stands behind the text splitter, in front of the vector store. Whoever has the same draft and
    `store` finds the texts there: `DraftCompressor`, `SievedRetriever`, ...

    A record manager (`langchain_core.indexing.index`) deletes changed and vanished documents from
    the vector store; `prune` does it here, with what remains after any kind of cleanup:
    `indexer.prune(vector_store.get_by_ids(record_manager.list_keys()))`, or simply the documents,
    where cleanup="full" has just been given all of them.

    Args:
        store: A `PassageStore`, or the folder of one, which is made where it is missing.
        embedder: Keeps its vectors of the sentences too; see `IndexOptions`.

    For the draft (`model`, `compressor`, ...) see `DraftLoading`.
    """

    def transform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Read the documents that are not in the store yet.

        Args:
            documents: Any; what was read before, under whatever id, is not read again.
            kwargs: Without effect.

        Returns:
            The same documents.

        Raises:
            StoreError: The store cannot be written.
        """
        self.passages.add(as_passages(documents))
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Do what `transform_documents` does without blocking the event loop."""
        await self.loaded.worker.run(self.passages.add, as_passages(documents))
        return documents

    def prune(self, documents: Iterable[Document | str]) -> int:
        """Forget everything but these, and let it leave the disk.

        Args:
            documents: All documents that remain, of everyone who uses the store.

        Returns:
            How many texts were forgotten.
        """
        return self.passages.prune(as_passages(documents))

    async def aprune(self, documents: Iterable[Document | str]) -> int:
        """Do what `prune` does without blocking the event loop."""
        return await self.loaded.worker.run(self.passages.prune, as_passages(documents))
