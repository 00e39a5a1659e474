"""What a sentence or passage is worth, of several opinions: the draft's, BM25's, an embedder's."""

from __future__ import annotations

import numpy as np

from ..config import SpecPC

_LEAST = 1e-6  # keeps the logarithm of a score of 0 finite


def mixed(
    worth: np.ndarray,
    options: SpecPC,
    words: np.ndarray | None,
    near: np.ndarray | None,
    passage: np.ndarray,
    likely: np.ndarray | None = None,
) -> np.ndarray:
    """Put opinions together by their shares.

    With an embedder, or with shares for passages, all are z-scores over the units that have
    tokens, of the draft's the logarithm: attention spans magnitudes, cosines lie close together.
    Units are then mixed with the best of their passage, and both with how likely the question is
    behind it. Otherwise draft and BM25 count as shares of their best.

    Args:
        worth: (units,) the draft's scores, not negative; -1 for units without tokens.
        options: The shares.
        words: (units,) of BM25; None if it is not asked.
        near: (units,) cosines, of units without tokens anything; None if no embedder is asked.
        passage: (units,) index of each one's passage.
        likely: (units,) log-probability of the question behind each one's passage; None if it was
            not read.

    Returns:
        (units,) what each is worth; units without tokens below all others.
    """
    if near is None and likely is None and not options.passage_weight:
        return worth if words is None else _shares_of_best(worth, words, options.lexical_weight)
    inside = worth >= 0
    lexical = 0.0 if words is None else options.lexical_weight
    semantic = 0.0 if near is None else options.semantic_weight
    total = (1 - semantic - lexical) * _z(np.log(worth[inside] + _LEAST))
    if near is not None:
        total += semantic * _z(near[inside])
    if words is not None:
        total += lexical * _z(words[inside])
    if share := options.passage_weight:
        total = (1 - share) * _z(total) + share * _z(_best_of_passage(total, passage[inside]))
    if likely is not None:
        share = options.likelihood_weight
        total = (1 - share) * _z(total) + share * _z(likely[inside])
    found = np.full(len(worth), -np.inf)
    found[inside] = total
    return found


def _shares_of_best(worth: np.ndarray, words: np.ndarray, share: float) -> np.ndarray:
    """(units,) both as shares of their best, the words with `share`; -1 without tokens stays."""
    best, most = worth.max(initial=0.0), words.max(initial=0.0)
    mixed = (1 - share) * worth / (best or 1.0) + share * words / (most or 1.0)
    return np.where(worth < 0, worth, mixed)


def _best_of_passage(values: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """(units,) the best value among the units of the same passage."""
    _, group = np.unique(passage, return_inverse=True)
    best = np.full(group.max(initial=-1) + 1, -np.inf)
    np.maximum.at(best, group, values)
    return best[group]


def _z(values: np.ndarray) -> np.ndarray:
    """Standard deviations from the mean, float64; 0 where all are equal."""
    values = values.astype(np.float64)
    spread = values.std() if len(values) else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))
