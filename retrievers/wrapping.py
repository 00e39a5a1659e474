"""Lines that an editor wrapped, joined again: a line break would end a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LEAST = 40  # characters of the longest line of wrapped prose
_FENCE = re.compile(r"\s*(```|~~~)")
_ALONE = re.compile(r"\s*$|\s*(#{1,6}\s|\||\W{3,}$|\.\.)")  # blank, heading, table, rule, directive
# What begins something new: items of lists, quotes, rows of a log, code.
_BEGINS = re.compile(r"\s*([>:*+•·–-]|(\d{1,3}|[A-Za-z])[.)]\s|\d+[-/:.]\d+)|\s{4}|\t")


def unwrapped(text: str) -> str:
    """Put a space for each line break inside a wrapped paragraph; the length stays the same.

    A paragraph counts as wrapped if no line but its last had much room behind it.
    Headings, lists, tables, quotes, code and lines with a hard break (two spaces at the end) stay.
    """
    lines = text.split("\n")
    breaks = ["\n"] * len(lines)  # behind each line
    for first, last in _runs(lines):
        pairs = zip(lines[first : last - 1], lines[first + 1 : last], strict=True)
        width = max(len(line) for line in lines[first:last])
        if width >= _LEAST and all(is_full(line, after, width) for line, after in pairs):
            breaks[first : last - 1] = " " * (last - 1 - first)
    return "".join(line + end for line, end in zip(lines, breaks, strict=True))[:-1]


def is_full(line: str, following: str, width: int) -> bool:
    """Whether a line with the following one's first word fills five sixths of the width."""
    filled = len(line) + 1 + len(following.split(maxsplit=1)[0])
    return filled > width - width // 6 and line[-2:] != "  "


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
