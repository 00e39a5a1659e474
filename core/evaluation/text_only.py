"""Ways to shorten a prompt by its text alone, in the form that methods are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..specpc.bm25 import bm25
from .baselines import Kept, kept_text, random_sentences, ranked_passages, ranked_sentences
from .realtext.rankings import fused
from .shared import Case
from .squad import Scorer

SEED = 2026  # of random baselines
Shortened = tuple[Kept, Sequence[str]]  # kept characters, and the texts that the target reads
Shorten = Callable[[Case, float], Shortened]


def sentences(
    score: Scorer, case: Case, share: float, *, neighbours: int = 0, turns: bool = False
) -> Shortened:
    """The best sentences.

    Args:
        score: Scores them by the question.
        case: What is shortened.
        share: The budget.
        neighbours: As in `ranked_sentences`.
        turns: The question is everything that the user has said.
    """
    item, budget, count = case.item, case.budget(share), case.bench.draft.count_tokens
    asked = item.said_by_user if turns else item.question
    kept = ranked_sentences(
        asked, item.passages, budget, count, _shared(score, case), neighbours=neighbours
    )
    return joined(case, kept)


def passages(score: Scorer, case: Case, share: float) -> Shortened:
    """The best passages, whole."""
    item, budget, count = case.item, case.budget(share), case.bench.draft.count_tokens
    asked = _shared(score, case)
    kept = ranked_passages(item.question, item.passages, budget, count, asked)
    return joined(case, kept)


def at_random(case: Case, share: float) -> Shortened:
    """Sentences by chance."""
    item, budget, count = case.item, case.budget(share), case.bench.draft.count_tokens
    return joined(case, random_sentences(item.passages, budget, count, f"{SEED}:{item.id}"))


def truncated(cut: Callable[..., Kept], case: Case, share: float) -> Shortened:
    """What a truncation of `baselines` leaves."""
    count = case.bench.draft.count_tokens
    return joined(case, cut(case.item.passages, case.budget(share), count))


def whole(case: Case, _: float) -> Shortened:
    """Everything."""
    return tuple(((0, len(text)),) for text in case.item.passages), case.item.passages


def joined(case: Case, kept: Kept) -> Shortened:
    """Kept characters as texts, with a gap mark where something is missing."""
    return kept, [
        kept_text(text, spans) for text, spans in zip(case.item.passages, kept, strict=True)
    ]


EMBEDDED: Mapping[str, Callable[[Scorer], Shorten]] = {  # by an encoder's cosine
    "embedding": lambda near: partial(sentences, near),
    "embedding-neighbors": lambda near: partial(sentences, near, neighbours=1),
    "embedding-passages": lambda near: partial(passages, near),
    "embedding-turns": lambda near: partial(sentences, near, turns=True),
    "fusion": lambda near: partial(sentences, fused(bm25, near)),
}


def _shared(score: Scorer, case: Case) -> Scorer:
    """The scorer, asked once an item whatever the budgets; its seconds count each time."""

    def once(question: str, texts: Sequence[str]) -> Sequence[float]:
        return case.once((score, question, tuple(texts)), lambda: score(question, texts))

    return once
