"""BM25: which texts share words with a question, the rarer the better (Robertson, 1994)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
K1, B = 1.5, 0.75


def bm25(question: str, texts: Sequence[str]) -> list[float]:
    """BM25 with Lucene's inverse document frequency, over lower-case words.

    Args:
        question: Its words are looked for, repeated ones once each time.
        texts: The documents, which also say how rare a word is.

    Returns:
        One score a text, 0 where no word is shared.
    """
    documents = [Counter(_WORD.findall(text.casefold())) for text in texts]
    average = max(1.0, sum(map(Counter.total, documents)) / max(1, len(documents)))
    asked = _WORD.findall(question.casefold())
    holders: dict[str, list[int]] = {word: [] for word in asked}
    for place, document in enumerate(documents):
        for word in holders.keys() & document.keys():
            holders[word].append(place)
    scores = [0.0] * len(documents)
    for word in asked:
        found = len(holders[word])
        weight = math.log(1 + (len(documents) - found + 0.5) / (found + 0.5))
        for place in holders[word]:
            count, length = documents[place][word], documents[place].total() / average
            scores[place] += weight * count / (count + K1 * (1 - B + B * length))
    return scores
