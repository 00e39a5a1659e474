"""How right an answer is, and whether its evidence survived compression."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from ..specpc.bm25 import UNSPACED
from ..specpc.fitting import merge_spans
from .baselines import Kept
from .tasks import EvalItem, Place

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHAINS = frozenset({"two-hop", "three-hop"})
_STEP = ": "  # between the values that an answer to a chain names
_PUNCTUATION = regex.compile(rf"[\p{{P}}{re.escape(string.punctuation)}]")
_CHARACTER = regex.compile(rf"[{UNSPACED}]")


@dataclass(frozen=True, slots=True)
class Score:
    """What an answer is worth.

    `correct`: exact match after `normalised`, several answers in any order. `recall`: share of the
    needed answers that occur in the output, RULER's measure (arXiv 2404.06654, section 3); for
    alternatives, whether one occurs. `f1`: overlap of words as in SQuAD (arXiv 1606.05250). Where a
    chain is asked for, the answer may name the values on the way first, each with a colon.
    """

    correct: bool
    recall: float
    f1: float


def score_answer(item: EvalItem, text: str) -> Score:
    """Compare an output with an item's answers."""
    if item.task in _CHAINS:
        text = text.rpartition(_STEP)[2]
    found = [answer for answer in item.answers if _folded(answer) in _folded(text)]
    if item.need == "any":
        best = max(word_f1(text, answer) for answer in item.answers)
        exact = any(squad_form(text) == squad_form(answer) for answer in item.answers)
        return Score(exact, float(bool(found)), best)
    recall = len(found) / len(item.answers)
    exact = listed(text) == listed(", ".join(item.answers))
    return Score(exact, recall, word_f1(text, " ".join(item.answers)))


def normalised(text: str) -> str:
    """Case, articles, white space and punctuation around the text do not count."""
    return " ".join(_ARTICLES.sub(" ", text.casefold()).split()).strip(".,;:!?\"' ")


def word_f1(text: str, answer: str) -> float:
    """F1 of the words that two texts share, by SQuAD's normalisation."""
    left, right = squad_form(text).split(), squad_form(answer).split()
    if not left or not right:
        return float(left == right)
    shared = sum((Counter(left) & Counter(right)).values())
    return 2 * shared / (len(left) + len(right))


def survival(item: EvalItem, kept: Kept) -> tuple[bool, bool] | None:
    """Whether the evidence's characters are kept, and whether its whole sentences are.

    Args:
        item: Its `need` says whether all evidence counts or one piece is enough.
        kept: Kept characters of every passage.

    Returns:
        None where the item has no evidence.
    """
    if not item.evidence:
        return None
    merged = [
        merge_spans(text, sorted(spans)) for text, spans in zip(item.passages, kept, strict=True)
    ]
    need = any if item.need == "any" else all
    return (
        need(_inside(evidence.value, merged) for evidence in item.evidence),
        need(_inside(evidence.sentence, merged) for evidence in item.evidence),
    )


def _inside(place: Place, kept: Sequence[Sequence[tuple[int, int]]]) -> bool:
    return any(start <= place.start and place.end <= end for start, end in kept[place.passage])


def listed(text: str) -> list[str]:
    """Several answers, however they are joined and ordered."""
    return sorted(normalised(part) for part in re.split(r",\s+|\s+and\s+|\n", text.strip()))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def squad_form(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces.

    In scripts without spaces each character is a word.
    """
    plain = _CHARACTER.sub(r" \g<0> ", _PUNCTUATION.sub("", text.casefold()))
    return " ".join(_ARTICLES.sub(" ", plain).split())
