"""Where the command line's passages come from: a folder, a file, or standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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


def read_file(name: str) -> tuple[str, list[Passage]]:
    """The text of a file, or of standard input for "-", and its paragraphs as passages."""
    from ...core.types import Passage
    from ...retrievers import paragraphs
    from ...retrievers.documents import PROSE, READERS, decode, read_document
    from ...retrievers.errors import DocumentError
    from ...retrievers.wrapping import unwrapped

    path, label = Path(name), "stdin" if name == "-" else name
    try:
        if path.suffix.lower() in READERS.keys() - set(PROSE):
            text = whole = read_document(path).text
        else:
            whole, _ = decode(sys.stdin.buffer.read() if name == "-" else path.read_bytes())
            text = unwrapped(whole)
    except DocumentError as error:
        raise PromptError(f"{label!r} cannot be read: {error}.") from error
    passages = [
        Passage(text[start:end], f"{label}#{place}", {"start": start, "end": end})
        for place, (start, end) in enumerate(paragraphs(text), start=1)
    ]
    if not passages:
        raise PromptError(f"{label!r} holds no text.")
    return whole, passages


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
