"""How the passages around a gold one are found: by words, meaning, both, or chance."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from ...models.embedder import Embedder, TextVectors
from ...specpc.bm25 import Bm25
from ..squad import Scorer

_RANK = 60  # of reciprocal rank fusion (Cormack et al., 2009)


def rankings(embed: Embedder | None = None, seed: int = 0) -> Mapping[str, Scorer]:
    """The rankings by name: "bm25", "random", "mixed" (every other place by chance), and with an
    embedder "embedding" and "fusion" (of it and BM25).

    Args:
        embed: Texts to vectors; passages are embedded once.
        seed: Of what is left to chance.
    """
    chance = by_chance(seed)
    alike = by_words()
    found = {"bm25": alike, "random": chance, "mixed": in_turn(alike, chance)}
    if embed is not None:
        near = by_meaning(embed)
        found |= {"embedding": near, "fusion": fused(alike, near)}
    return found


def by_words() -> Scorer:
    """BM25; texts that are asked for again are counted once."""
    known: tuple[Sequence[str], Bm25] | None = None

    def score(question: str, texts: Sequence[str]) -> list[float]:
        nonlocal known
        if known is None or known[0] != texts:
            known = (texts, Bm25(texts))
        return known[1].scores(question)

    return score


def by_chance(seed: int) -> Scorer:
    """Scores that depend on nothing but the seed and the question."""

    def score(question: str, texts: Sequence[str]) -> list[float]:
        rng = random.Random(f"{seed}:{question}")
        return [rng.random() for _ in texts]

    return score


def by_meaning(embed: Embedder) -> Scorer:
    """Cosine of the question's vector and each text's."""
    known = TextVectors(room=None)  # collections may exceed what is usually remembered

    def score(question: str, texts: Sequence[str]) -> list[float]:
        found: list[float] = known.cosines(embed, question, texts).tolist()
        return found

    return score


def fused(*scorers: Scorer) -> Scorer:
    """Reciprocal rank fusion: what several rankings have near the top comes first."""

    def score(question: str, texts: Sequence[str]) -> list[float]:
        total = [0.0] * len(texts)
        for scorer in scorers:
            for rank, index in enumerate(ranked(scorer(question, texts)), 1):
                total[index] += 1 / (_RANK + rank)
        return total

    return score


def in_turn(*scorers: Scorer) -> Scorer:
    """The best of the first ranking, the best of the second that is left, and so on in turn."""

    def score(question: str, texts: Sequence[str]) -> list[float]:
        orders = [iter(ranked(scorer(question, texts))) for scorer in scorers]
        places: dict[int, float] = {}
        while len(places) < len(texts):
            for order in orders:
                fresh = next((index for index in order if index not in places), None)
                if fresh is not None:
                    places[fresh] = float(-len(places))
        return [places[index] for index in range(len(texts))]

    return score


def ranked(scores: Sequence[float]) -> list[int]:
    """Places by falling score; equal scores keep their order."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])
