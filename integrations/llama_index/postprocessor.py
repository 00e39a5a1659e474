"""A LlamaIndex node postprocessor: retrieved nodes in, the same nodes shortened out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from pydantic import ConfigDict, Field

from ...core.compressor import Compressor, OnError
from ...core.config import Quantization, SpecPC
from ...core.prompt import DEFAULT_SYSTEM
from ...core.types import CompressedContext, Passage
from ...retrievers.provenance import KEY, provenance

dispatcher = get_dispatcher(__name__)


class DraftSievePostprocessor(BaseNodePostprocessor):
    """Shortens retrieved nodes to what a draft model finds relevant to the query.

    The draft is loaded when the object is made. Nodes keep their order, number (unless
    `method.drop_empty`), ids, scores, metadata, relationships and `start_char_idx` /
    `end_char_idx`, which go on naming the whole chunk in its document: add `start_char_idx` to a
    kept span to find it there. `metadata["draftsieve"]` tells what was kept: "spans" (dicts of
    "start", "end", "score": characters of the node's original text), "tokens",
    "compressed_tokens", "score", and "fallback" (why the text is unchanged, else None); models
    and embeddings do not see it. Only a node's text is read, not its metadata or images.

    Tracing sees a rerank event with the nodes before and after.

    Args:
        model: "builtin:draft", a folder or a hub id of the draft.
        compressor: A loaded compressor, instead of `model`.
        method: How much is kept, and of what.
        system: The system text that the draft reads in front of the nodes; None for none.
        on_error: "original" gives the nodes back with their whole text when a request fails, a
            missing query included, and logs a warning; "raise" raises.
        quantization: Weights in 4 or 8 bits.
        device: "auto", "cpu", "cuda", ...
        dtype: "auto", "float32", "bfloat16", ...
        template_options: Passed to the draft's chat template.
        trust_remote_code: Run code that a hub repository carries.
        progress: Show progress bars while loading.

    Raises:
        ModelNotFoundError: There is no such model.
        ValidationError: An option is unknown or invalid.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "builtin:draft"
    compressor: Compressor | None = Field(default=None, exclude=True, repr=False)
    method: SpecPC = SpecPC.preset("2026-11", ratio=0.3)
    system: str | None = DEFAULT_SYSTEM
    on_error: OnError = "original"
    quantization: Quantization | None = None
    device: str = "auto"
    dtype: str = "auto"
    template_options: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    progress: bool = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.compressor is not None:
            self.model = self.compressor.model.name_or_path
            return
        self.compressor = Compressor.load(
            self.model,
            quantization=self.quantization,
            device=self.device,
            dtype=self.dtype,
            template_options=self.template_options,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex stores this component."""
        return "DraftSievePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        assert self.compressor is not None
        self._started(nodes, query_bundle)
        question = _question(query_bundle)
        context = self.compressor.compress(question, _passages(nodes), **self._options())
        return _ended(_nodes(nodes, context))

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if not nodes:
            return []
        assert self.compressor is not None
        self._started(nodes, query_bundle)
        question = _question(query_bundle)
        context = await self.compressor.acompress(question, _passages(nodes), **self._options())
        return _ended(_nodes(nodes, context))

    def _options(self) -> dict[str, Any]:
        return {"method": self.method, "system": self.system, "on_error": self.on_error}

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
