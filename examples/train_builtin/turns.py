"""Questions with their answers, and where the answers come from."""

from __future__ import annotations

from dataclasses import dataclass

from .scenes import Stated

LEAD = "... "  # begins an answer of natural text: behind it words have the passage's own tokens


@dataclass(frozen=True, slots=True)
class Sought:
    """A value that an answer gives."""

    stated: Stated
    start: int = 0  # where the answer names it
    said: int | None = None  # where the answer names its entity, if the question does not
    before: Stated | None = None  # the value of the same list that the answer names before it
    number: bool = False  # the answer names the passage instead


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A sentence of natural text with what a question takes from it. All places are characters."""

    sentence: str
    start: int  # of the answer in the sentence
    asked: int | None = None  # the word of the question behind which the answer follows (its end)
    keys: tuple[tuple[int, int], ...] = ()  # ends of words of the question, and in the sentence


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its only right answer."""

    question: str
    answer: str
    type: str
    distant: bool = False  # shares only the entity's name with the fact
    value_first: bool = False  # the fact names its value before its entity
    evidence: tuple[Sought, ...] = ()
    excerpt: Excerpt | None = None
