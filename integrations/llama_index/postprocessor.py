"""A LlamaIndex node postprocessor: retrieved nodes in, the same nodes shortened out."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from ...core.types import CompressedContext, Passage
from ...retrievers.provenance import KEY, provenance
from .draft_options import SieveOptions

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
        context = self.loaded.compress(
            question, _passages(nodes), self.method, **self.call_options()
        )
        return _ended(_nodes(nodes, context))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        self._started(nodes, query_bundle)
        question = _question(query_bundle)
        context = await self.loaded.acompress(
            question, _passages(nodes), self.method, **self.call_options()
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


def _passages(nodes: Sequence[NodeWithScore]) -> list[Passage]:
    return [Passage(n.node.get_content(MetadataMode.NONE), n.node.node_id) for n in nodes]


def _nodes(nodes: Sequence[NodeWithScore], context: CompressedContext) -> list[NodeWithScore]:
    """Copies of the nodes with the texts of the context's passages, by index."""
    return [
        nodes[index].model_copy(
            update={"node": _node(nodes[index].node, passage.text, provenance(context, index))}
        )
        for passage, index in zip(context.passages, context.indices, strict=True)
    ]


def _node(node: BaseNode, text: str, kept: dict[str, Any]) -> BaseNode:
    """A copy of a node that shares nothing changeable but its embedding and payload objects."""
    copy = node.model_copy(
        update={
            "metadata": {**deepcopy(node.metadata), KEY: kept},
            "relationships": deepcopy(node.relationships),
            "excluded_llm_metadata_keys": _with_key(node.excluded_llm_metadata_keys),
            "excluded_embed_metadata_keys": _with_key(node.excluded_embed_metadata_keys),
        }
    )
    if text != node.get_content(MetadataMode.NONE):
        copy.set_content(text)
    return copy


def _with_key(keys: Sequence[str]) -> list[str]:
    return [*(key for key in keys if key != KEY), KEY]
