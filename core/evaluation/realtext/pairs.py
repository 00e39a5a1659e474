"""Two Natural Questions asked at once: what answers them stands in two passages.

The questions have nothing to do with each other, so that nothing leads from one passage to the
other; for that there are the generated tasks two-hop and three-hop. (Of all questions, too few name
what answers another one.) Only questions that one place answers take part, so that it is known what
must be kept.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from ..tasks import Place
from .collection import Collection, RealQuestion
from .natural_questions import read_natural_questions

NAME = "nq-pairs"


def read_pairs(path: str | Path) -> Collection:
    """Read Natural Questions in pairs, each question in one of them.

    Args:
        path: As for `read_natural_questions`, and its errors.

    Returns:
        Questions that need all of two places, and all passages.
    """
    known = read_natural_questions(path)
    asked = _answered_once(known)
    random.Random(NAME).shuffle(asked)
    pairs = zip(asked[::2], asked[1::2], strict=False)
    found = tuple(_both(*pair) for pair in pairs if pair[0].gold != pair[1].gold)
    return replace(known, name=NAME, questions=found, left_out=())


def _both(first: RealQuestion, second: RealQuestion) -> RealQuestion:
    return RealQuestion(
        id=f"{first.id}+{second.id}",
        text=f"Answer both questions. (1) {first.text}? (2) {second.text}?",
        answers=(*first.answers, *second.answers),
        need="all",
        places=(*first.places, *second.places),
        gold=(*first.gold, *second.gold),
    )


def _answered_once(known: Collection) -> list[RealQuestion]:
    """The questions with one place, with that place and its text alone; each wording once."""
    found: dict[str, RealQuestion] = {}
    for question in known.questions:
        smallest = [p for p in question.places if not any(_holds(p, q) for q in question.places)]
        if len(smallest) == 1:
            (place,) = smallest
            text = known.passages[place.passage].text[place.start : place.end]
            single = replace(question, places=(place,), answers=(text,))
            found.setdefault(question.text, single)
    return list(found.values())


def _holds(outer: Place, inner: Place) -> bool:
    """Whether a place holds another one, smaller than itself."""
    inside = outer.start <= inner.start and inner.end <= outer.end
    return inside and inner.end - inner.start < outer.end - outer.start
