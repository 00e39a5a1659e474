"""Lines that an editor wrapped, joined again: a line break would end a sentence."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator

_LEAST = 40  # characters of the longest line of wrapped prose
_FENCE = re.compile(r"\s*(```|~~~)")
_ALONE = re.compile(r"\s*$|\s*(#{1,6}\s|\||\W{3,}$|\.\.)")  # blank, heading, table, rule, directive
_ENDS = re.compile(r"[.!?:;\u2026\u3002\uff01\uff1a\uff1b\uff1f][\"'”’»)\]*_]*\s*$")
# What begins something new: items of lists, quotes, rows of a log, code.
_BEGINS = re.compile(r"\s*([>:*+•·–-]|(\d{1,3}|[A-Za-z])[.)]\s|\d+[-/:.]\d+)|\s{4}|\t")


def unwrapped(text: str) -> str:
    """Put a space for each line break inside a sentence that was wrapped; the length stays.

    A paragraph counts as wrapped if each of its lines is continued (see `is_continued`) or ends a
    sentence. Headings, lists, tables, quotes, code and lines with a hard break (two spaces at the
    end) stay.
    """
    lines = text.split("\n")
    breaks = ["\n"] * len(lines)  # behind each line
    for first, last in _runs(lines):
        width = max(len(line) for line in lines[first:last])
        continued = [is_continued(lines[i], lines[i + 1], width) for i in range(first, last - 1)]
        ended = [_ENDS.search(line) is not None for line in lines[first : last - 1]]
        if width >= _LEAST and all(map(operator.or_, continued, ended)):
            breaks[first : last - 1] = [" " if goes_on else "\n" for goes_on in continued]
    return "".join(line + end for line, end in zip(lines, breaks, strict=True))[:-1]


def is_continued(line: str, following: str, width: int) -> bool:
    """Whether a sentence goes on in the following line of a paragraph whose lines are so wide.

    It does if that begins with a small letter, or if this one ends no sentence and would fill five
    sixths of the width together with the following one's first word.
    """
    if line.endswith("  "):
        return False
    if following.lstrip()[:1].islower():
        return True
    filled = len(line) + 1 + len(following.split(maxsplit=1)[0])
    return filled > width - width // 6 and not _ENDS.search(line)


def _runs(lines: list[str]) -> Iterator[tuple[int, int]]:
    """Start and end of two lines and more that may be one paragraph, or one item of a list."""
    start, fenced = 0, False
    for place, line in enumerate([*lines, ""]):
        fence = _FENCE.match(line) is not None
        alone = fenced or fence or _ALONE.match(line) is not None
        if alone or _BEGINS.match(line):
            if place - start > 1:
                yield start, place
            start = place + alone
        fenced ^= fence
