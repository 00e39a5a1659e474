"""What every set of real questions is read into: passages, and questions that know their places."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import regex

from ...errors import PromptError
from ...specpc.bm25 import UNSPACED
from ...types import Passage
from ..tasks import Place, Turn

T = TypeVar("T")
_LETTER = rf"[\w--[{UNSPACED}]]"


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
    `distractors_answer`: an accepted answer may stand in passages that a question is not about.
    """

    name: str
    passages: tuple[Passage, ...]
    questions: tuple[RealQuestion, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    distractors_answer: bool = True


class Pool:
    """Passages in the order in which they come up, each text once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._passages: list[Passage] = []

    def add(self, text: str, identity: str, metadata: Mapping[str, Any] | None = None) -> int:
        """The place of a text, which is added where it is new."""
        number = self._numbers.setdefault(text, len(self._passages))
        if number == len(self._passages):
            self._passages.append(Passage(text, identity, metadata or {}))
        return number

    def passages(self) -> tuple[Passage, ...]:
        """All of them."""
        return tuple(self._passages)


def read_lines(path: str | Path, form: str, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `parse` makes of each line of a file, a JSON object.

    Raises:
        PromptError: A line that it cannot read; `form` says what a line has to be.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(parse(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PromptError(
                f"Line {number} of {str(path)!r} is not {form}: {type(error).__name__} {error}."
            ) from error
    return found


def occurrences(text: str, phrase: str) -> Iterator[tuple[int, int]]:
    """Characters where a phrase stands, whatever its case and white space.

    Within a word does not count: "4" does not stand in "14". Scripts without spaces have no words.
    """
    for found in _pattern(phrase).finditer(text) if phrase.strip() else ():
        yield found.span()


@lru_cache(maxsize=4096)
def _pattern(phrase: str) -> regex.Pattern[str]:
    words = r"\s+".join(regex.escape(word) for word in phrase.split())
    before = f"(?<!{_LETTER})" if regex.match(rf"(?V1)\s*{_LETTER}", phrase) else ""
    after = f"(?!{_LETTER})" if regex.search(rf"(?V1){_LETTER}\s*$", phrase) else ""
    return regex.compile(before + words + after, regex.V1 | regex.IGNORECASE)
