"""A folder of text files as passages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..core.errors import DraftSieveError
from ..core.types import Passage

SUFFIXES = (".md", ".markdown", ".txt")
LIMIT = 1200  # characters
Bounds = tuple[int, int]  # character start and end (exclusive)

_LINE = re.compile(r"[^\n]*\n?")
_HEADING = re.compile(r"#{1,6}\s")
_FENCES = ("```", "~~~")
_BREAKS = (re.compile(r"\n"), re.compile(r"(?<=[.!?。!?])\s+"), re.compile(r"\s+"))


class FolderError(DraftSieveError, ValueError):
    """A folder has no documents that can be read."""


def read_folder(path: str | Path, *, limit: int = LIMIT) -> list[Passage]:
    """Read every text and Markdown file below a folder.

    Args:
        path: The folder; its subfolders are read too, hidden files and folders are not.
        limit: Most characters of a passage.

    Returns:
        Passages in the order of the files' names. A passage's id is "handbook/leave.md#3", the
        file below the folder and the passage's number in it from 1; its metadata has "source"
        (the file below the folder), "start" and "end" (characters of the file's text).

    Raises:
        FolderError: The folder is missing, is no folder, holds no text, or holds files that are
            not UTF-8 (all of them are named).
    """
    folder = Path(path)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FolderError(f"{str(folder)!r} {state}: give a folder with {_kinds()} files.")
    texts, undecodable = {}, []
    for file in _files(folder):
        source = file.relative_to(folder).as_posix()
        try:
            texts[source] = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            undecodable.append(source)
    if undecodable:
        raise FolderError(
            f"Not UTF-8 text: {', '.join(undecodable)}. Convert or remove what is named here."
        )
    passages = [p for source, text in texts.items() for p in _passages(source, text, limit)]
    if not passages:
        raise FolderError(f"{str(folder)!r} holds no text: put {_kinds()} files into it.")
    return passages


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


def _kinds() -> str:
    return ", ".join(SUFFIXES)


def _files(folder: Path) -> Iterator[Path]:
    """Text files below the folder, hidden ones left out, by name."""
    for file in sorted(folder.rglob("*"), key=lambda f: f.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            yield file


def _passages(source: str, text: str, limit: int) -> Iterator[Passage]:
    for number, (start, end) in enumerate(paragraphs(text, limit=limit), start=1):
        metadata = {"source": source, "start": start, "end": end}
        yield Passage(text[start:end], f"{source}#{number}", metadata)


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
