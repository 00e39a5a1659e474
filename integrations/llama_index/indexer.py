"""A LlamaIndex transformation: nodes in, read by the draft, the same nodes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent

from ...retrievers.llama_index import as_passages
from ...retrievers.options import IndexOptions


class DraftIndexer(IndexOptions, TransformComponent):
    """Lets the draft read nodes when they are ingested, so that queries need not.

    It stands behind the node parser in an `IngestionPipeline` (or in the `transformations` of an
    index). Whoever has the same draft and `store` finds the texts there: `DraftSievePostprocessor`,
    `SievedRetriever`, ... Texts are taken without metadata, as these pass them to the draft. With a
    docstore only new and changed documents get here; nodes that the pipeline has cached do not.

    What a docstore strategy deletes elsewhere, `prune` forgets here, given what remains:
    `indexer.prune(splitter(list(pipeline.docstore.docs.values())))`.

    Args:
        store: A `PassageStore`, or the folder of one, which is made where it is missing.
        embedder: Keeps its vectors of the sentences too; see `IndexOptions`.

    For the draft (`model`, `compressor`, ...) see `DraftLoading`.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores this component."""
        return "DraftIndexer"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Read the nodes that are not in the store yet.

        Args:
            nodes: Any; what was read before, under whatever id, is not read again.
            kwargs: Without effect.

        Returns:
            The same nodes.

        Raises:
            StoreError: The store cannot be written.
        """
        self.passages.add(as_passages(nodes))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Do what a call does without blocking the event loop."""
        await self.loaded.worker.run(self.passages.add, as_passages(nodes))
        return nodes

    def prune(self, nodes: Iterable[BaseNode | str]) -> int:
        """Forget everything but these, and let it leave the disk.

        Args:
            nodes: All nodes that remain, of everyone who uses the store.

        Returns:
            How many texts were forgotten.
        """
        return self.passages.prune(as_passages(nodes))

    async def aprune(self, nodes: Iterable[BaseNode | str]) -> int:
        """Do what `prune` does without blocking the event loop."""
        return await self.loaded.worker.run(self.passages.prune, as_passages(nodes))
