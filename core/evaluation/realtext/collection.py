"""What every set of real questions is read into: passages, and questions that know their places."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ...types import Passage
from ..tasks import Place, Turn


@dataclass(frozen=True, slots=True)
class RealQuestion:
    """A question, what answers it, and where that stands in the collection's passages.

    `answers` are all needed (`need="all"`, then `places` has one entry an answer) or alternatives
    (`need="any"`); a question without answers is not answered by the collection. `gold` are the
    passages that belong into the context, in any order. `turns` is what was said before.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    need: Literal["all", "any"]
    places: tuple[Place, ...]
    gold: tuple[int, ...]
    kind: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True)
class Collection:
    """Passages and the questions about them.

    A passage's metadata may name its "article": passages of one article follow each other.
    `left_out` are questions of the files that cannot be used, with the reason.
    """

    name: str
    passages: tuple[Passage, ...]
    questions: tuple[RealQuestion, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def occurrences(text: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Characters where a phrase stands, whatever its case and white space.

    Within a word does not count: "4" does not stand in "14".
    """
    for found in _pattern(phrase).finditer(text) if phrase.strip() else ():
        yield found.span()


@lru_cache(maxsize=4096)
def _pattern(phrase: str) -> re.Pattern[str]:
    words = r"\s+".join(map(re.escape, phrase.split()))
    before = r"(?<!\w)" if re.match(r"\s*\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w\s*$", phrase) else ""
    return re.compile(before + words + after, re.IGNORECASE)
