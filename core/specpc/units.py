"""Texts cut into units that are kept or dropped as a whole: words, sentences, passages."""

from __future__ import annotations

import re

import regex
import sentencex

from ..config import Unit
from ..prompt.safe_tokenizer import replace_surrogates
from .bm25 import UNSPACED

Bounds = list[tuple[int, int]]  # character start and end (exclusive), ascending, not overlapping

# A run without spaces: a number, identifier, URL or e-mail address is never cut. Scripts written
# without spaces fall apart into single characters instead.
_WORD = regex.compile(rf"(?:[^\s{UNSPACED}]|\d)+|\S")
_LINE = re.compile(r"[^\r\n]+")


def unit_spans(text: str, unit: Unit) -> Bounds:
    """Cut a text into units.

    Args:
        text: Any text.
        unit: "word", "sentence" or "passage" (the whole text); "token" is the tokenizer's affair.

    Returns:
        Spans without surrounding whitespace; together they hold every other character.
    """
    if unit == "word":
        return word_spans(text)
    if unit == "sentence":
        return sentence_spans(text)
    return [span for span in [_strip(text, 0, len(text))] if span[0] < span[1]]


def word_spans(text: str) -> Bounds:
    """Runs of characters between whitespace."""
    return [match.span() for match in _WORD.finditer(text)]


def sentence_spans(text: str) -> Bounds:
    """Sentences, by sentencex; a line break always ends one (lists, headings, code)."""
    spans = []
    for line in _LINE.finditer(text):
        clean = replace_surrogates(line.group())
        for sentence in sentencex.get_sentence_boundaries("en", clean):
            first = line.start() + sentence["start_index"]
            start, end = _strip(text, first, line.start() + sentence["end_index"])
            if start < end:
                spans.append((start, end))
    return spans


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end
