"""LlamaIndex retrievers: BM25, late interaction, sieved by a draft, and by the draft's guess."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, ClassVar, Unpack

from ..core.config import AnyEmbedder, SpecPC
from ..core.errors import ConfigError
from ..core.specpc.stored.passage_store import PassageStore
from ..core.types import CompressedContext, Passage
from .bm25 import Bm25Index, Bm25Options
from .extras import require
from .late import LateIndex, LateOptions
from .options import DraftArguments, DraftOptions, SieveOptions
from .provenance import KEY
from .sieved import RETRIEVAL_METHOD, Mode, Order, fused, picked, reading

require("llama_index.core", "llama-index", "draftsieve.retrievers.llama_index")

from llama_index.core.base.base_retriever import BaseRetriever  # noqa: E402
from llama_index.core.callbacks import CallbackManager  # noqa: E402
from llama_index.core.schema import (  # noqa: E402
    BaseNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)

Document = str | BaseNode | NodeWithScore | Passage


def as_passages(documents: Iterable[Document]) -> list[str | Passage]:
    """Turn nodes into passages, without their metadata; texts and passages stay as they are."""
    return [_passage(document) for document in documents]


def _passage(document: Document) -> str | Passage:
    if isinstance(document, str | Passage):
        return document
    node = document.node if isinstance(document, NodeWithScore) else document
    return Passage(node.get_content(MetadataMode.NONE), node.node_id)


def shortened_copy(node: BaseNode, text: str, kept: Mapping[str, Any]) -> BaseNode:
    """A node's copy with another text, and in its metadata what was kept.

    It shares nothing changeable with the node but its embedding and payload objects; models and
    embeddings do not see what was kept.
    """
    own = node.model_copy(
        update={
            "metadata": {**deepcopy(node.metadata), KEY: kept},
            "relationships": deepcopy(node.relationships),
            "excluded_llm_metadata_keys": _with_key(node.excluded_llm_metadata_keys),
            "excluded_embed_metadata_keys": _with_key(node.excluded_embed_metadata_keys),
        }
    )
    if text != node.get_content(MetadataMode.NONE):
        own.set_content(text)
    return own


class _Indexed(BaseRetriever):
    """A retriever over an index of passages, which become text nodes."""

    def __init__(
        self,
        index: Any,
        *,
        similarity_top_k: int = 4,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(callback_manager=callback_manager)
        self.index, self.similarity_top_k = index, similarity_top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(node=_text_node(passage), score=score)
            for passage, score in self.index.search(query_bundle.query_str, self.similarity_top_k)
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class Bm25Retriever(_Indexed):
    """Finds nodes by the words they share with the query.

    Args:
        index: A `Bm25Index`, made here or loaded from disk; its passages become text nodes.
        similarity_top_k: Most nodes returned.
        callback_manager: LlamaIndex's.
    """

    index: Bm25Index

    @classmethod
    def from_nodes(
        cls,
        nodes: Sequence[BaseNode],
        *,
        similarity_top_k: int = 4,
        **options: Unpack[Bm25Options],
    ) -> Bm25Retriever:
        """Index the texts of nodes; options as for `Bm25Index`."""
        return cls(Bm25Index(_whole(nodes), **options), similarity_top_k=similarity_top_k)


class LateInteractionRetriever(_Indexed):
    """Finds nodes whose stored keys fit the query's, beside the words they share.

    The draft has read the nodes' texts when they were indexed; a query costs its own tokens.

    Args:
        index: A `LateIndex`; its passages become text nodes.
        similarity_top_k: Most nodes returned.
        callback_manager: LlamaIndex's.
    """

    index: LateIndex

    @classmethod
    def from_nodes(
        cls,
        nodes: Sequence[BaseNode],
        store: PassageStore,
        *,
        similarity_top_k: int = 4,
        **options: Unpack[LateOptions],
    ) -> LateInteractionRetriever:
        """Index the texts of nodes, which are read into the store where it lacks them; options as
        for `LateIndex`.
        """
        return cls(LateIndex(_whole(nodes), store, **options), similarity_top_k=similarity_top_k)


class RetrieverOptions(SieveOptions):
    __doc__ = SieveOptions.__doc__

    default: ClassVar[SpecPC] = RETRIEVAL_METHOD


class SievedRetriever(BaseRetriever):
    """Fetches k * n nodes, lets a draft read them once, and keeps the best of at most k.

    The budget is one for all nodes. They come back as copies with the draft's score;
    `metadata["draftsieve"]` tells what was kept (as for `DraftSievePostprocessor`). Nodes of
    which nothing was kept are left out. Only a node's text is read, not its metadata.

    Args:
        retriever: Any base retriever. One with a `similarity_top_k` is copied and set to k * n;
            set others to it yourself.
        k: Most nodes returned.
        n: How many times as many are fetched.
        method: Budget over all nodes, and how they are read; a `ratio` is a share of all that was
            fetched. None keeps whole sentences within 1,024 draft tokens (prompt included).
        mode: "sieve" keeps the best nodes and, inside them, the best spans; "rerank" keeps the
            best nodes whole, the best first.
        order: "original" (as fetched) or "score"; None for the mode's own.
        embedder: What the method's `semantic_weight` asks, such as a `BaseEmbedding`; see
            `SieveOptions`.
        callback_manager: LlamaIndex's.
        options: See `DraftOptions`.

    Raises:
        ConfigError: k or n is below 1.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        *,
        k: int = 4,
        n: int = 4,
        method: SpecPC | None = None,
        mode: Mode = "sieve",
        order: Order | None = None,
        embedder: AnyEmbedder = None,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[DraftArguments],
    ) -> None:
        super().__init__(callback_manager=callback_manager)
        _check(k=k, n=n)
        self.retriever, self.k, self.n = _fetching(retriever, k * n), k, n
        self.options = RetrieverOptions(method=method, embedder=embedder, **options)
        self.method, self.mode, self.order = self.options.method, mode, order

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self.retriever.retrieve(query_bundle)[: self.k * self.n]
        question = query_bundle.query_str
        method, draft = reading(self.method, self.mode, self.k), self.options.loaded
        asking = self.options.asking()
        context = draft.compress(question, as_passages(found), method, **asking)
        return self._nodes(found, context)

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = (await self.retriever.aretrieve(query_bundle))[: self.k * self.n]
        question, asking = query_bundle.query_str, self.options.asking()
        method, draft = reading(self.method, self.mode, self.k), self.options.loaded
        context = await draft.acompress(question, as_passages(found), method, **asking)
        return self._nodes(found, context)

    def _nodes(
        self, found: Sequence[NodeWithScore], context: CompressedContext
    ) -> list[NodeWithScore]:
        """Copies of what was kept, by index."""
        kept = picked(context, self.k, self.mode, self.order)
        return [
            NodeWithScore(
                node=shortened_copy(found[each.index].node, each.text, each.kept),
                score=found[each.index].score if each.score is None else each.score,
            )
            for each in kept
        ]


class LookaheadRetriever(BaseRetriever):
    """Searches twice: with the query, and with the query and the draft's guessed answer.

    The draft reads what the first search found and guesses; both results are merged by rank. It
    costs a reading and a few decoding steps of the draft, so nothing uses it by itself: put it
    around a base retriever where questions share few words with their answers' nodes.

    Args:
        retriever: Any base retriever; one with a `similarity_top_k` is copied and set to k.
        k: Most nodes returned.
        lookahead_tokens: Most draft tokens of the guess.
        callback_manager: LlamaIndex's.
        options: See `DraftOptions`.

    Raises:
        ConfigError: k or lookahead_tokens is below 1.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        *,
        k: int = 4,
        lookahead_tokens: int = 16,
        callback_manager: CallbackManager | None = None,
        **options: Unpack[DraftArguments],
    ) -> None:
        super().__init__(callback_manager=callback_manager)
        _check(k=k, lookahead_tokens=lookahead_tokens)
        self.retriever, self.k = _fetching(retriever, k), k
        self.lookahead_tokens, self.options = lookahead_tokens, DraftOptions(**options)

    @property
    def similarity_top_k(self) -> int:
        """Most nodes returned, under LlamaIndex's usual name."""
        return self.k

    @similarity_top_k.setter
    def similarity_top_k(self, k: int) -> None:
        self.retriever, self.k = _fetching(self.retriever, k), k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        first, question = self.retriever.retrieve(query_bundle), query_bundle.query_str
        draft, asking = self.options.loaded, self.options.asking()
        guess = draft.guess_answer(question, as_passages(first), self.lookahead_tokens, **asking)
        second = self.retriever.retrieve(f"{question} {guess}") if guess else []
        return _merged(first, second)[: self.k]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        first, question = await self.retriever.aretrieve(query_bundle), query_bundle.query_str
        draft, asking = self.options.loaded, self.options.asking()
        guess = await draft.aguess_answer(
            question, as_passages(first), self.lookahead_tokens, **asking
        )
        second = await self.retriever.aretrieve(f"{question} {guess}") if guess else []
        return _merged(first, second)[: self.k]


def _check(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ConfigError(f"{name} is {number}: it must be at least 1.")


def _fetching(retriever: BaseRetriever, count: int) -> BaseRetriever:
    """The retriever, or where its number of nodes can be set a copy that returns `count`."""
    if not hasattr(retriever, "similarity_top_k"):
        return retriever
    changed: Any = copy(retriever)
    changed.similarity_top_k = count
    own: BaseRetriever = changed
    return own


def _whole(nodes: Iterable[BaseNode]) -> list[Passage]:
    """Nodes as passages, metadata and all."""
    return [
        Passage(n.get_content(MetadataMode.NONE), n.node_id, deepcopy(n.metadata)) for n in nodes
    ]


def _text_node(passage: Passage) -> TextNode:
    metadata = deepcopy(dict(passage.metadata))
    if passage.id is None:
        return TextNode(text=passage.text, metadata=metadata)
    return TextNode(text=passage.text, id_=passage.id, metadata=metadata)


def _with_key(keys: Sequence[str]) -> list[str]:
    return [*(key for key in keys if key != KEY), KEY]


def _merged(*results: Sequence[NodeWithScore]) -> list[NodeWithScore]:
    """Each node once, by rank."""
    keyed = [{n.node.node_id: n for n in found} for found in results]
    known = {key: node for found in reversed(keyed) for key, node in found.items()}
    return [known[key] for key in fused(*(list(found) for found in keyed))]
