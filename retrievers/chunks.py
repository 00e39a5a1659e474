"""A text cut into chunks of whole paragraphs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .errors import FolderError

LIMIT = 1200  # characters
Bounds = tuple[int, int]  # character start and end (exclusive)

_LINE = re.compile(r"[^\n]*\n?")
_HEADING = re.compile(r"#{1,6}\s")
_FENCES = ("```", "~~~")
_BREAKS = (re.compile(r"\n"), re.compile(r"(?<=[.!?。\uff01\uff1f])\s+"), re.compile(r"\s+"))


def paragraphs(text: str, *, limit: int = LIMIT) -> list[Bounds]:
    """Cut a text into chunks of whole paragraphs.

    A Markdown heading starts a new chunk and stays with what follows it. Neighbouring paragraphs
    share a chunk while they fit. A longer paragraph is cut at a line break, else at the end of a
    sentence, else at a space, else anywhere.

    Args:
        text: Any text.
        limit: Most characters of a chunk.

    Returns:
        Character spans, ascending, without surrounding whitespace; together they hold every
        other character.

    Raises:
        FolderError: The limit is below 1.
    """
    if limit < 1:
        raise FolderError(f"The limit is {limit} characters: give at least 1.")
    chunks: list[Bounds] = []
    previous_is_heading = False
    for start, end, is_heading in _blocks(text):
        joins = chunks and end - chunks[-1][0] <= limit
        if joins and (previous_is_heading or not is_heading):
            chunks[-1] = (chunks[-1][0], end)
        else:
            chunks.extend(_cut(text, start, end, limit))
        previous_is_heading = is_heading
    return chunks


def _blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """Paragraphs as start, end, and whether it is a heading; fenced code is one paragraph."""
    start = end = -1
    fenced = False
    for line in _LINE.finditer(text):
        words = line.group().strip()
        is_heading = not fenced and _HEADING.match(words) is not None
        if start >= 0 and (is_heading or not (words or fenced)):
            yield start, end, False
            start = -1
        first = line.start() + line.group().find(words)
        if is_heading:
            yield first, first + len(words), True
        elif words:
            start, end = first if start < 0 else start, first + len(words)
        fenced ^= words.startswith(_FENCES)
    if start >= 0:
        yield start, end, False


def _cut(text: str, start: int, end: int, limit: int) -> Iterator[Bounds]:
    """Spans of at most `limit` characters that hold all but whitespace of text[start:end]."""
    while end - start > limit:
        first, after = _last_break(text, start, start + limit)
        yield start, first
        start = after
    if start < end:
        yield start, end


def _last_break(text: str, start: int, stop: int) -> Bounds:
    """Where a chunk of text[start:stop] ends, and where the next one begins."""
    for pattern in _BREAKS:
        found = [m for m in pattern.finditer(text, start, stop + 1) if m.start() > start]
        if found:
            first = start + len(text[start : found[-1].start()].rstrip())
            return first, _skip_spaces(text, found[-1].end())
    return stop, stop


def _skip_spaces(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start
