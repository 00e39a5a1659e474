"""A LlamaIndex node postprocessor: retrieved nodes in, the same nodes shortened out."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from ...core.types import CompressedContext
from ...retrievers.llama_index import as_passages, shortened_copy
from ...retrievers.options import SieveOptions
from ...retrievers.provenance import provenance

dispatcher = get_dispatcher(__name__)


class DraftSievePostprocessor(SieveOptions, BaseNodePostprocessor):
    """Shortens retrieved nodes to what a draft model finds relevant to the query.

    The draft is loaded when the object is made. Nodes keep their order, number (unless
    `method.drop_empty`), ids, scores, metadata, relationships and `start_char_idx` /
    `end_char_idx`, which go on naming the whole chunk in its document: add `start_char_idx` to a
    kept span to find it there. `metadata["draftsieve"]` tells what was kept: "spans" (dicts of
    "start", "end", "score": characters of the node's original text), "tokens",
    "compressed_tokens", "score", and "fallback" (why the text is unchanged, else None); models
    and embeddings do not see it. Only a node's text is read, not its metadata or images.

    Tracing sees a rerank event with the nodes before and after.

    Options: see `SieveOptions`. Where `on_error` is "original", a missing query fails like any
    other request: the nodes come back with their whole text, and a warning is logged.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores this component."""
        return "DraftSievePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        self._started(nodes, query_bundle)
        question = _question(query_bundle)
        context = self.loaded.compress(question, as_passages(nodes), self.method, **self.asking())
        return _ended(_nodes(nodes, context))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        self._started(nodes, query_bundle)
        question = _question(query_bundle)
        context = await self.loaded.acompress(
            question, as_passages(nodes), self.method, **self.asking()
        )
        return _ended(_nodes(nodes, context))

    def _started(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> None:
        dispatcher.event(
            ReRankStartEvent(
                query=query_bundle, nodes=nodes, top_n=len(nodes), model_name=self.model
            )
        )


def _ended(nodes: list[NodeWithScore]) -> list[NodeWithScore]:
    dispatcher.event(ReRankEndEvent(nodes=nodes))
    return nodes


def _question(query_bundle: QueryBundle | None) -> str:
    """No query is an empty question: the core refuses it, or falls back."""
    return "" if query_bundle is None else query_bundle.query_str


def _nodes(nodes: Sequence[NodeWithScore], context: CompressedContext) -> list[NodeWithScore]:
    """Copies of the nodes with the texts of the context's passages, by index."""
    return [
        nodes[index].model_copy(
            update={
                "node": shortened_copy(nodes[index].node, passage.text, provenance(context, index))
            }
        )
        for passage, index in zip(context.passages, context.indices, strict=True)
    ]
