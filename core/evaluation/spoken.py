"""Scores of models that answer in sentences: what leads to the answer does not count against it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..specpc.units import word_spans
from .metrics import Score, listed, squad_form, word_f1
from .realtext.collection import occurrences
from .tasks import EvalItem

_SOURCE = r"(?:given |provided )?(?:passage|document|context|text|article)s?(?: (?:\[\d+\]|\d+))?"
_LEAD = re.compile(
    rf"\W*(?:(?:according to|based on|as (?:stated|mentioned|described|given) in|in|from) "
    rf"(?:the )?{_SOURCE},?\s*)?"
    r"(?:(?:the )?(?:correct |final |short )?answer(?: to the question)?(?: is:?|:)\s*)?",
    re.IGNORECASE,
)
_LINKS = {"a", "an", "the", "and", "he", "she", "it", "they", "its", "their", "there"}
_LINKS |= {
    "am",
    "are",
    "be",
    "been",
    "did",
    "do",
    "does",
    "had",
    "has",
    "have",
    "is",
    "was",
    "were",
}
_LINKS |= {"at", "by", "for", "from", "in", "of", "on", "that", "these", "this", "those", "to"}


def score_spoken(item: EvalItem, text: str) -> Score:
    """Compare an output with an item's answers, with and without the words that lead to it.

    Args:
        item: A question and its answers.
        text: What a model said.

    Returns:
        Exact match and F1 by SQuAD's normalisation, the best of all ways to leave off a leading
        phrase ("According to passage 2, the answer is", or words of the question, as in "The ferry
        sails at dawn"); as recall the share of the needed answers that stand in the text as words.
    """
    said = list(dict.fromkeys(_without_lead(text, item.question)))
    found = [any(True for _ in occurrences(text, answer)) for answer in item.answers]
    if item.need == "any":
        exact = any(squad_form(t) == squad_form(a) for t in said for a in item.answers)
        best = max(word_f1(t, a) for t in said for a in item.answers)
        return Score(exact, float(any(found)), best)
    whole = ", ".join(item.answers)
    exact = any(listed(t) == listed(whole) for t in said)
    best = max(word_f1(t, whole) for t in said)
    return Score(exact, sum(found) / len(found), best)


def _without_lead(text: str, question: str) -> Iterator[str]:
    """The text, and what is left of it after each further word that only leads to the answer."""
    yield text
    lead = _LEAD.match(text)
    rest = text[lead.end() :] if lead else text
    leading = {*squad_form(question).split(), *_LINKS}
    for start, end in word_spans(rest):
        yield rest[start:]
        if not set(squad_form(rest[start:end]).split()) <= leading:
            return
