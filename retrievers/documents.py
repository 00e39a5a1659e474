"""A file as text, by what its name ends with."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path

from .errors import DocumentError
from .extras import require
from .wrapping import is_continued, unwrapped

FALLBACK = "cp1252"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}
_UNREAD = ("script", "style", "template", "noscript", "nav")  # of a web page


@dataclass(frozen=True, slots=True)
class Document:
    """The text of a file, with "\\n" for every line end.

    `pages` are the characters where the pages of a PDF start, `encoding` is what the file was
    decoded with.
    """

    text: str
    pages: Sequence[int] = ()
    encoding: str = "utf-8"


def read_document(path: Path) -> Document:
    """Read one file, see `read_folder` for the kinds and their encodings.

    Raises:
        DocumentError: The file is broken, locked, or no text.
        MissingExtraError: Its kind needs a package that is not installed.
    """
    return READERS[path.suffix.lower()](path)


def decode(data: bytes) -> tuple[str, str]:
    """Text and its encoding: UTF-8, UTF-16 where it says so, else Windows-1252.

    Raises:
        DocumentError: It is none of these.
    """
    if data.startswith(_UTF16):
        encodings = ["utf-16"]
    else:
        encodings = [] if b"\0" in data else ["utf-8-sig", FALLBACK]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return text.replace("\r\n", "\n").replace("\r", "\n"), encoding
    raise DocumentError("it is no text in UTF-8, UTF-16 or Windows-1252")


def _prose(path: Path) -> Document:
    text, encoding = decode(path.read_bytes())
    return Document(unwrapped(text), encoding=encoding)


def _web_page(path: Path) -> Document:
    """Headings, lists and tables as Markdown; links and pictures leave their text."""
    require("markdownify", "retrieval", "reading HTML")
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    page = BeautifulSoup(path.read_bytes(), "html.parser")  # finds the encoding that it declares
    for tag in page(_UNREAD):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style="atx",
        strip=["a", "img"],
        escape_asterisks=False,
        escape_underscores=False,
        wrap=True,  # a paragraph on one line
        wrap_width=None,
    )
    return Document(str(converter.convert_soup(page)))


def _pdf(path: Path) -> Document:
    require("pypdf", "docs-pdf", "reading PDF")
    from pypdf import PdfReader

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("it is locked with a password")
        texts = (page.extract_text().translate(_LIGATURES) for page in reader.pages)
        pages = [_reflowed(text) for text in texts]
    except DocumentError:
        raise
    except Exception as error:
        raise DocumentError(f"the PDF is broken ({type(error).__name__}: {error})") from error
    starts = accumulate((len(page) + 2 for page in pages[:-1]), initial=0)
    return Document("\n\n".join(pages), tuple(starts))


def _reflowed(page: str) -> str:
    """A page's lines joined where a sentence goes on, words that were divided in one piece."""
    lines = [line.strip() for line in page.split("\n")]
    width = max(map(len, lines))
    text = ""
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        joins = after and line and is_continued(line, after, width)
        divided = joins and line[-1] == "-" and after[0].islower()
        text += line[:-1] if divided else line + (" " if joins else "\n")
    return text.strip()


def _table(path: Path) -> Document:
    """A paragraph a row, "column: value; ...", so that each row explains itself."""
    text, encoding = decode(path.read_bytes())
    try:
        delimiter = csv.Sniffer().sniff(text[:4096], delimiters=",;\t|").delimiter
    except csv.Error:  # one column
        delimiter = ","
    try:
        names, *rows = list(csv.reader(io.StringIO(text), delimiter=delimiter)) or [[]]
    except csv.Error as error:
        raise DocumentError(f"the table is broken ({error})") from error
    return Document(
        _paragraphs(zip_longest(names, row, fillvalue="") for row in rows), encoding=encoding
    )


def _json(path: Path) -> Document:
    """A paragraph a record: an element of the list, or an entry of the object."""
    text, encoding = decode(path.read_bytes())
    try:
        if path.suffix.lower() == ".jsonl":
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"the JSON is broken ({error})") from error
    records = [{k: v} for k, v in value.items()] if isinstance(value, dict) else value
    if not isinstance(records, list):
        records = [records]
    return Document(_paragraphs(_leaves("", record) for record in records), encoding=encoding)


def _leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The values of nested objects and lists under dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for inner in value:
            yield from _leaves(name, inner)
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value))
    elif value is not None:
        yield name, str(value)


def _paragraphs(records: Iterable[Iterable[tuple[str, str]]]) -> str:
    rows = (
        "; ".join(
            f"{name.strip()}: {' '.join(value.split())}" if name.strip() else value
            for name, value in record
            if value.strip()
        )
        for record in records
    )
    return "\n\n".join(row for row in rows if row)


PROSE = (".txt", ".md", ".markdown", ".rst")
READERS: Mapping[str, Callable[[Path], Document]] = {
    **dict.fromkeys(PROSE, _prose),
    **dict.fromkeys((".html", ".htm"), _web_page),
    **dict.fromkeys((".csv", ".tsv"), _table),
    **dict.fromkeys((".json", ".jsonl"), _json),
    ".pdf": _pdf,
}
