"""BM25: which texts share words with a question, the rarer the better (Robertson, 1994)."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import regex

# Scripts written without spaces, for a character class; "ー" belongs to two of them.
UNSPACED = r"\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}\p{Hiragana}\p{Katakana}\p{Han}ー"
_WORD = regex.compile(r"\w+")  # letters, digits, combining marks
_PART = regex.compile(
    rf"[[^{UNSPACED}]||\d]+|(?P<unspaced>[{UNSPACED}--\d][{UNSPACED}\p{{M}}--\d]*)", regex.V1
)
K1, B = 1.5, 0.75


class Bm25:
    """Texts that are searched many times.

    Args:
        texts: The documents, which also say how rare a word is.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._documents = [Counter(words(text)) for text in texts]
        self._average = max(1.0, sum(map(Counter.total, self._documents)) / max(1, len(texts)))

    def scores(self, question: str) -> list[float]:
        """One score a text, 0 where no word of the question is shared."""
        asked = words(question)
        holders: dict[str, list[int]] = {word: [] for word in asked}
        for place, document in enumerate(self._documents):
            for word in holders.keys() & document.keys():
                holders[word].append(place)
        scores = [0.0] * len(self._documents)
        for word in asked:
            found = len(holders[word])
            weight = math.log(1 + (len(scores) - found + 0.5) / (found + 0.5))
            for place in holders[word]:
                document = self._documents[place]
                count, length = document[word], document.total() / self._average
                scores[place] += weight * count / (count + K1 * (1 - B + B * length))
        return scores


def bm25(question: str, texts: Sequence[str]) -> list[float]:
    """BM25 with Lucene's inverse document frequency, over `words`.

    Args:
        question: Its words are looked for, repeated ones once each time.
        texts: The documents, which also say how rare a word is.

    Returns:
        One score a text, 0 where no word is shared.
    """
    return Bm25(texts).scores(question)


def words(text: str) -> list[str]:
    """Cut a text into lower-case words of letters, digits and combining marks, in any script.

    Where a script is written without spaces, every two neighbouring characters are a word, as in
    Lucene's CJK analyzer; a character without neighbours is one alone.

    Args:
        text: Any text; compatibility forms (full width, ligatures) count as the plain ones.

    Returns:
        The words in order.
    """
    found: list[str] = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        if word.isascii():
            found.append(word)
            continue
        for part in _PART.finditer(word):
            pairs = [first + second for first, second in pairwise(part["unspaced"] or "")]
            found += pairs or [part[0]]
    return found
