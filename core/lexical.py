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
    scores = [0.0] * len(documents)
    for word in _WORD.findall(question.casefold()):
        holders = sum(word in document for document in documents)
        weight = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
        for place, document in enumerate(documents):
            if count := document[word]:
                length = 1 - B + B * document.total() / average
                scores[place] += weight * count / (count + K1 * length)
    return scores
