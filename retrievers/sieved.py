"""Many passages fetched, read once by the draft, the best of them kept; for any framework.

An adapter asks the core with `reading(...)` and takes what `picked(...)` says, by index.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..core.config import NEWEST_PRESET, SpecPC
from ..core.types import CompressedContext
from .provenance import provenance

Mode = Literal["sieve", "rerank"]
Order = Literal["original", "score"]
K = TypeVar("K", bound=Hashable)

RETRIEVAL_METHOD = SpecPC.preset(NEWEST_PRESET, capacity=1024)
"""Whole sentences as in `DEFAULT_METHOD`, to a fixed size: few short passages come back whole."""
_RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack et al., 2009)


@dataclass(frozen=True, slots=True)
class Sieved:
    """A kept passage: its place among the fetched ones, its text, what the draft made of it."""

    index: int
    text: str
    score: float | None  # None where the draft could not read
    kept: dict[str, Any]  # see `provenance`


def reading(method: SpecPC | None, mode: Mode, k: int) -> SpecPC:
    """The core's options for one retrieval.

    Args:
        method: How passages are read; in mode "sieve" also the budget over all of them. None for
            `RETRIEVAL_METHOD`.
        mode: "sieve" keeps the best passages and, inside them, the best spans; "rerank" keeps
            the best passages whole.
        k: Most passages kept.

    Returns:
        Options with `max_passages` and `drop_empty`.
    """
    whole = {"capacity": None, "ratio": 1.0} if mode == "rerank" else {}
    method = method or RETRIEVAL_METHOD
    return method.model_copy(update={**whole, "max_passages": k, "drop_empty": True})


def picked(context: CompressedContext, k: int, mode: Mode, order: Order | None) -> list[Sieved]:
    """What a retriever returns of a compressed context.

    Args:
        context: The core's result for `reading(...)`.
        k: Most passages returned.
        mode: As for `reading`.
        order: "original" (as fetched) or "score" (the draft's best first); None is "original"
            for "sieve" and "score" for "rerank". Where the draft could not read, the first k
            come back as they were fetched.

    Returns:
        Kept passages.
    """
    failed = context.stats.fallback is not None
    found = [
        Sieved(
            index,
            passage.text,
            None if failed else context.sizes[index].score,
            provenance(context, index),
        )
        for passage, index in zip(context.passages, context.indices, strict=True)
    ]
    by_score = order == "score" or (order is None and mode == "rerank")
    if by_score and not failed:
        found.sort(key=lambda sieved: -(sieved.score or 0.0))
    return found[:k]


def fused(*rankings: Sequence[K]) -> list[K]:
    """Merge rankings: what stands high in several of them comes first.

    Args:
        rankings: Keys of what was found, best first.

    Returns:
        Every key once, by the sum of 1 / (60 + rank) (reciprocal rank fusion); equal sums in
        the order of appearance.
    """
    sums: dict[K, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(dict.fromkeys(ranking), start=1):
            sums[key] = sums.get(key, 0.0) + 1 / (_RANK_CONSTANT + rank)
    return sorted(sums, key=lambda key: -sums[key])
