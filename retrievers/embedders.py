"""Embedding objects of the frameworks as the core asks them; it knows them by their methods."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakValueDictionary

from ..core.config import SEMANTIC_WEIGHT, SpecKVPC, SpecPC, can_embed, stages
from ..core.errors import ConfigError
from ..core.models.embedder import load_embedder

M = TypeVar("M")
_METHODS = ("get_text_embedding_batch", "get_query_embedding")  # LlamaIndex's names


class _Renamed:
    """A LlamaIndex embedding under the names that LangChain and the core have for its methods."""

    def __init__(self, embedding: Any) -> None:
        self.embedding, self.model_name = embedding, getattr(embedding, "model_name", None)

    def embed_documents(self, texts: list[str]) -> Any:
        return self.embedding.get_text_embedding_batch(texts)

    def embed_query(self, text: str) -> Any:
        return self.embedding.get_query_embedding(text)


_MADE: WeakValueDictionary[int, _Renamed] = WeakValueDictionary()  # one for each embedding


def as_embedder(value: Any) -> Any:
    """What `SpecPC.embedder` takes, of anything that embeds.

    Args:
        value: A LangChain `Embeddings`, a LlamaIndex `BaseEmbedding`, or what `SpecPC.embedder`
            takes by itself.

    Raises:
        ConfigError: It cannot embed.
    """
    if not all(callable(getattr(value, name, None)) for name in _METHODS):
        return can_embed(value)
    found = _MADE.get(id(value)) or _Renamed(value)
    return _MADE.setdefault(id(value), found)


def with_embedder(method: M, embedder: Any) -> M:
    """The method, which asks an embedder where it weighs one and has none of its own.

    Args:
        method: Any method, or None.
        embedder: See `as_embedder`.
    """
    if isinstance(method, SpecKVPC):
        return method.model_copy(update={"specpc": with_embedder(method.specpc, embedder)})
    if not isinstance(method, SpecPC) or not method.semantic_weight:
        return method
    own = as_embedder(embedder if method.embedder is None else method.embedder)
    return method.model_copy(update={"embedder": own})


def settled(method: M, embedder: Any, default: M | None = None) -> M:
    """The method of an object that is made with an embedder; a named model is loaded.

    Args:
        method: As it was given.
        embedder: As it was given, None for none.
        default: What None stands for where there is an embedder, which then counts
            `SEMANTIC_WEIGHT` unless the default says how much.

    Raises:
        ConfigError: The method would never ask the embedder.
        ModelNotFoundError: There is no such model.
    """
    if embedder is not None and method is None and isinstance(default, SpecPC):
        weight = default.semantic_weight or SEMANTIC_WEIGHT
        method = default.model_copy(update={"semantic_weight": weight})
    found = with_embedder(method, embedder)
    specpc = stages(found)[0] if isinstance(found, SpecPC | SpecKVPC) else None
    asked = specpc is not None and specpc.semantic_weight
    if embedder is not None and found is not None and not asked:
        raise ConfigError(
            f"An embedder is given, but this {type(found).__name__} never asks it: set "
            f'SpecPC(unit="sentence", semantic_weight={SEMANTIC_WEIGHT}), or leave the embedder '
            "out."
        )
    if specpc is not None and asked and specpc.embedder is not None:
        load_embedder(specpc.embedder)
    return found
