"""A folder of documents as passages."""

from __future__ import annotations

import logging
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import MissingExtraError
from ..core.types import Passage
from .chunks import LIMIT, paragraphs
from .documents import FALLBACK, READERS, Document, read_document
from .errors import DocumentError, FolderError

logger = logging.getLogger(__name__)
_NAMED = 3  # files that a warning names


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not read: its place below the folder, and why."""

    source: str
    reason: str


def read_folder(
    path: str | Path, *, limit: int = LIMIT, on_skip: Callable[[Skipped], object] | None = None
) -> list[Passage]:
    """Read the documents below a folder.

    Plain text, Markdown and reStructuredText stay as they are, but for the line breaks inside a
    wrapped paragraph, which become spaces. HTML becomes Markdown (extra `[retrieval]`), a row of a
    CSV or TSV table and a record of a JSON or JSONL file a paragraph of "name: value" pairs, PDF
    its text (extra `[docs-pdf]`). Text is UTF-8, UTF-16 with a byte order mark, or else taken for
    Windows-1252, with a logged warning; a web page may name its encoding.

    Args:
        path: The folder; its subfolders are read too, hidden files and folders are not.
        limit: Most characters of a passage.
        on_skip: Called with every file that is not read: of another kind, broken, locked, without
            text, or of a kind whose extra is not installed. None logs them: one warning for each
            kind and reason, every file at level INFO.

    Returns:
        Passages in the order of the files' names. A passage's id is "handbook/leave.md#3", the
        file below the folder and the passage's number in it from 1; its metadata has "source"
        (the file below the folder), "start" and "end" (characters of the file's text, or of the
        text it became), and for a PDF "page", from 1, on which it starts.

    Raises:
        FolderError: The folder is missing, is no folder, or holds no text.
    """
    folder = Path(path)
    if not folder.is_dir():
        state = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FolderError(f"{str(folder)!r} {state}: give a folder with {_kinds()} files.")
    passages: list[Passage] = []
    skipped: list[Skipped] = []
    guessed: list[str] = []
    for file in _files(folder):
        source = file.relative_to(folder).as_posix()
        try:
            document = _read(file)
        except (DocumentError, MissingExtraError, OSError) as error:
            skipped.append(Skipped(source, str(error)))
            continue
        passages += _passages(source, document, limit)
        if document.encoding == FALLBACK:
            guessed.append(source)
    if guessed:
        logger.warning("Not UTF-8 and taken for Windows-1252: %s.", _some(guessed))
    if not passages:
        found = " ".join(["", *_told(skipped)])
        raise FolderError(f"{str(folder)!r} holds no text: put {_kinds()} files into it.{found}")
    if on_skip is None:
        _log(skipped)
    else:
        for each in skipped:
            on_skip(each)
    return passages


def _kinds() -> str:
    return ", ".join(READERS)


def _files(folder: Path) -> Iterator[Path]:
    """Files below the folder, hidden ones left out, by name."""
    for file in sorted(folder.rglob("*"), key=lambda f: f.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file():
            yield file


def _read(file: Path) -> Document:
    if file.suffix.lower() not in READERS:
        raise DocumentError("there is no reader for this kind")
    document = read_document(file)
    if not document.text.strip():
        scan = " (a scan?)" if document.pages else ""
        raise DocumentError(f"there is no text in it{scan}")
    return document


def _passages(source: str, document: Document, limit: int) -> Iterator[Passage]:
    for number, (start, end) in enumerate(paragraphs(document.text, limit=limit), start=1):
        metadata: dict[str, str | int] = {"source": source, "start": start, "end": end}
        if document.pages:
            metadata["page"] = bisect(document.pages, start)
        yield Passage(document.text[start:end], f"{source}#{number}", metadata)


def _log(skipped: Sequence[Skipped]) -> None:
    for sentence in _told(skipped):
        logger.warning("%s", sentence)
    for each in skipped:
        logger.info("Not read: %s (%s).", each.source, each.reason)


def _told(skipped: Sequence[Skipped]) -> Iterator[str]:
    """A sentence for the files of each kind and reason."""
    groups = defaultdict(list)
    for each in skipped:
        groups[Path(each.source).suffix.lower(), each.reason].append(each.source)
    for (suffix, reason), sources in groups.items():
        count = f"{len(sources)} {suffix or 'other'} file{'s' if len(sources) > 1 else ''}"
        yield f"{count} not read: {reason}: {_some(sources)}."


def _some(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - _NAMED} more" if len(sources) > _NAMED else ""
    return ", ".join(sources[:_NAMED]) + more
