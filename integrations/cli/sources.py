"""Where the command line's passages come from: a folder, a file, or standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.errors import PromptError

if TYPE_CHECKING:
    from ...core.types import CompressedContext, Passage


def retrieve(arguments: argparse.Namespace) -> list[Passage]:
    """The best passages of a folder by BM25, best first; those without a common word are out."""
    from ...retrievers import Bm25Index, read_folder

    index = Bm25Index.from_passages(read_folder(arguments.docs))
    found = index.search(arguments.question, arguments.top_k)
    passages = [passage for passage, score in found if score > 0]
    if not passages:
        raise PromptError(
            f"No passage below {str(arguments.docs)!r} shares a word with the question."
        )
    return passages


def plain_text(name: str) -> str:
    """The text of a file as it stands there, or of standard input for "-"."""
    from ...retrievers.documents import decode

    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    with _naming(name):
        return decode(data)[0]


def read_file(name: str) -> tuple[str, list[Passage]]:
    """The text of a file of any kind that is read, and its paragraphs as passages."""
    from ...core.types import Passage
    from ...retrievers import paragraphs
    from ...retrievers.documents import PROSE, READERS, read_document
    from ...retrievers.wrapping import unwrapped

    if Path(name).suffix.lower() in READERS.keys() - set(PROSE):
        with _naming(name):
            text = whole = read_document(Path(name)).text
    else:
        whole = plain_text(name)
        text = unwrapped(whole)
    label = _label(name)
    passages = [
        Passage(text[start:end], f"{label}#{place}", {"start": start, "end": end})
        for place, (start, end) in enumerate(paragraphs(text), start=1)
    ]
    if not passages:
        raise PromptError(f"{label!r} holds no text.")
    return whole, passages


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say of which file an error speaks."""
    from ...retrievers.errors import DocumentError

    try:
        yield
    except DocumentError as error:
        raise PromptError(f"{_label(name)!r} cannot be read: {error}.") from error


def _label(name: str) -> str:
    return "stdin" if name == "-" else name


def reassemble(whole: str, passages: Sequence[Passage], context: CompressedContext) -> str:
    """A file's shortened passages with the white space that stood between them."""
    if not context.stats.compressed:
        return whole.rstrip("\n")
    result, previous = "", -1
    for place, passage in zip(context.indices, context.passages, strict=True):
        if not passage.text:
            continue
        if previous >= 0:
            first, last = passages[previous].metadata["end"], passages[place].metadata["start"]
            result += whole[first:last] if place == previous + 1 else "\n\n"
        result, previous = result + passage.text, place
    return result
