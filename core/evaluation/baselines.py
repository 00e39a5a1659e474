"""Simple ways to fit a budget, which any compressor has to beat.

Each returns, for every text, the kept characters as ascending (start, end) spans. Budgets count the
tokens of the kept text as a target would read it, gap markers included (`kept_tokens`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..specpc.fitting import join_spans, merge_spans
from ..specpc.units import sentence_spans
from .squad import Counter, Scorer

Spans = tuple[tuple[int, int], ...]
Kept = tuple[Spans, ...]  # one entry a text
GAP = " … "


def kept_text(text: str, spans: Sequence[tuple[int, int]], gap: str = GAP) -> str:
    """The kept characters of one text, with a marker where something between them is missing."""
    return join_spans(text, merge_spans(text, sorted(spans)), gap)


def kept_tokens(texts: Sequence[str], kept: Kept, count: Counter, gap: str = GAP) -> int:
    """Tokens of everything kept, gap markers included."""
    return sum(count(kept_text(t, s, gap)) for t, s in zip(texts, kept, strict=True) if s)


def ranked_sentences(
    question: str,
    texts: Sequence[str],
    budget: int,
    count: Counter,
    score: Scorer,
    *,
    neighbours: int = 0,
) -> Kept:
    """Sentences by falling score while they fit; one that does not fit is passed over.

    Args:
        question: What is asked.
        texts: What sentences are taken of.
        budget: Most tokens that stay.
        count: Token counter.
        score: Scores sentences by the question.
        neighbours: Sentences of the same text before and after one that are scored together with
            it, and not taken with it.
    """
    places = _sentences(texts)
    shown = _widened(places, neighbours)
    scores = score(question, [texts[i][start:end] for i, start, end in shown])
    return _take(texts, _by_score(places, scores), budget, count)


def ranked_passages(
    question: str, texts: Sequence[str], budget: int, count: Counter, score: Scorer
) -> Kept:
    """Whole passages by falling score while they fit: what retrieving fewer would give."""
    places = [(i, 0, len(text)) for i, text in enumerate(texts)]
    return _take(texts, _by_score(places, score(question, texts)), budget, count)


def random_sentences(texts: Sequence[str], budget: int, count: Counter, seed: int | str) -> Kept:
    """Sentences in a seeded random order while they fit."""
    places = _sentences(texts)
    random.Random(seed).shuffle(places)
    return _take(texts, places, budget, count)


def truncation_head(texts: Sequence[str], budget: int, count: Counter) -> Kept:
    """Texts from the first on, the last of them cut at the character where the budget ends."""
    kept: list[Spans] = []
    left = budget
    for text in texts:
        length = _longest_prefix(text, left, count)
        kept.append(((0, length),) if length else ())
        left = left - count(text[:length]) if length == len(text) else 0
    return tuple(kept)


def truncation_tail(texts: Sequence[str], budget: int, count: Counter) -> Kept:
    """Texts from the last backwards, the first of them cut at the character where it begins."""
    kept: list[Spans] = []
    left = budget
    for text in reversed(texts):
        length = _longest_suffix(text, left, count)
        kept.append(((len(text) - length, len(text)),) if length else ())
        left = left - count(text) if length == len(text) else 0
    return tuple(reversed(kept))


def truncation_middle(texts: Sequence[str], budget: int, count: Counter) -> Kept:
    """The first and the last half of the budget; the middle is left out."""
    head = truncation_head(texts, budget // 2, count)
    spent = kept_tokens(texts, head, count)
    tail = truncation_tail(texts, budget - spent - count(GAP), count)
    return tuple(
        merge_spans(text, sorted((*first, *last)))
        for text, first, last in zip(texts, head, tail, strict=True)
    )


def _longest_suffix(text: str, budget: int, count: Counter) -> int:
    """Characters of the longest suffix within the budget, found by bisection."""
    if budget <= 0 or not text:
        return 0
    if count(text) <= budget:
        return len(text)
    low, high = 0, len(text)  # the suffix `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text[-middle:]) <= budget else (low, middle)
    return low


def _longest_prefix(text: str, budget: int, count: Counter) -> int:
    """Characters of the longest prefix within the budget, found by bisection."""
    if budget <= 0 or not text:
        return 0
    if count(text) <= budget:
        return len(text)
    low, high = 0, len(text)  # the prefix `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text[:middle]) <= budget else (low, middle)
    return low


def _sentences(texts: Sequence[str]) -> list[tuple[int, int, int]]:
    """(text, start, end) of every sentence."""
    return [(index, *span) for index, text in enumerate(texts) for span in sentence_spans(text)]


def _widened(places: Sequence[tuple[int, int, int]], neighbours: int) -> list[tuple[int, int, int]]:
    """Each sentence from its first neighbour's start to its last one's end."""
    found = []
    for here, (index, _, _) in enumerate(places):
        around = places[max(0, here - neighbours) : here + neighbours + 1]
        own = [place for place in around if place[0] == index]
        found.append((index, own[0][1], own[-1][2]))
    return found


def _by_score(
    places: Sequence[tuple[int, int, int]], scores: Sequence[float]
) -> list[tuple[int, int, int]]:
    """Places by falling score; equal scores keep the order of the text."""
    order = sorted(range(len(places)), key=lambda i: -scores[i])
    return [places[i] for i in order]


def _take(
    texts: Sequence[str], places: Sequence[tuple[int, int, int]], budget: int, count: Counter
) -> Kept:
    """Take places in order, each one if the kept text with it is within the budget."""
    kept: list[Spans] = [() for _ in texts]
    sizes = [0] * len(texts)
    for index, start, end in places:
        spans = merge_spans(texts[index], sorted((*kept[index], (start, end))))
        size = count(kept_text(texts[index], spans))
        if sum(sizes) - sizes[index] + size <= budget:
            kept[index], sizes[index] = spans, size
    return tuple(kept)
