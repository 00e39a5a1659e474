"""How much of a free reference answer can still be said from what was kept.

References in free text mark no characters that must survive, so their words are counted.
"""

from __future__ import annotations

import math

from ..specpc.bm25 import words
from ..specpc.units import sentence_spans
from .baselines import Kept, kept_text
from .puzzles import NOT_FOUND
from .tasks import EvalItem


def words_kept(item: EvalItem, kept: Kept) -> float | None:
    """Share of the reference answer's words from the passages that what was kept still holds.

    Words that stand in no passage do not count, nor those of the question and the conversation,
    which the target sees anyway. The rarer a word in the passages' sentences, the more it counts
    (BM25's weight), so that function words are next to nothing. A word is found wherever it stands,
    so the figure is above 0 by chance: compare it with that of `random-sentences`.

    Args:
        item: A question and its reference answers.
        kept: Kept characters of every passage.

    Returns:
        In [0, 1], 1 for all passages; None where characters are marked, where nothing answers, and
        where the passages hold no such word.
    """
    if item.evidence or item.answers == (NOT_FOUND,):
        return None
    sentences = [set(words(text[s:e])) for text in item.passages for s, e in sentence_spans(text)]
    known = set(words(item.question)).union(*(words(turn.text) for turn in item.turns))
    weights: dict[str, float] = {}
    for word in {word for answer in item.answers for word in words(answer)} - known:
        if found := sum(word in sentence for sentence in sentences):
            weights[word] = math.log(1 + (len(sentences) - found + 0.5) / (found + 0.5))
    if not weights:
        return None
    shown = {
        word
        for text, spans in zip(item.passages, kept, strict=True)
        for word in words(kept_text(text, spans))
    }
    return sum(weights[word] for word in weights.keys() & shown) / sum(weights.values())
