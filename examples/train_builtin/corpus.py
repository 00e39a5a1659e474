"""Natural sentences from redistributable text: Debian documentation and public-domain novels.

Run `python -m examples.train_builtin.corpus --out .work/corpus`. It downloads the packages below
with `apt-get download` (Debian or Ubuntu), unpacks them without installing anything, and writes
one cleaned sentence a line, `running.txt` in the order of the documents and `sentences.txt` in a
fixed shuffled one.
"""

from __future__ import annotations

import argparse
import html
import logging
import random
import re
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

# package -> (licence, file pattern); every file is only read for its sentences
SOURCES = {
    "debian-handbook": ("GPL-2+ or CC-BY-SA-3.0", "**/en-US/*.html"),
    "debian-policy": ("GPL-2+", "**/policy.html/ch-*.html"),
    "developers-reference": ("GPL-2+", "**/developers-reference/*.html"),
    "debian-reference-en": ("GPL-2+", "**/*.en.html"),
    "debian-faq": ("GPL-2+", "**/FAQ/*.en.html"),
    "installation-guide-amd64": ("GPL-2+", "**/en/*.html"),
    "r-cran-janeaustenr": ("public domain (six novels by Jane Austen)", "**/Rdata.rdb"),
}
SEED = 20261121
_PARAGRAPH = re.compile(r"<(?:p|dd|li)\b[^>]*>(.*?)</(?:p|dd|li)>", re.DOTALL | re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")
_ABBREVIATIONS = ("Mr.", "Mrs.", "Dr.", "e.g.", "i.e.", "St.", "etc.")
_ALLOWED = re.compile(r"[A-Z][A-Za-z0-9 ,.;:'()?!-]+[.?!]")


def download(folder: Path) -> None:
    """Fetch and unpack the packages, each below its own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in SOURCES:
        if (folder / package).exists():
            continue
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        archive = next(folder.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / package)], check=True)


def paragraphs(path: Path) -> Iterator[str]:
    """Plain paragraphs of one file, HTML or serialised R strings."""
    if path.suffix == ".rdb":
        yield from _r_paragraphs(path.read_bytes())
        return
    for raw in _PARAGRAPH.findall(path.read_text(encoding="utf-8", errors="ignore")):
        text = html.unescape(re.sub(r"<[^>]+>", " ", raw))
        yield re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip()


def _r_paragraphs(data: bytes) -> Iterator[str]:
    """Blank-line separated paragraphs of the character vectors in an R data file."""
    position = 0
    while (position := data.find(b"\x78\x9c", position)) >= 0:
        try:
            block = zlib.decompressobj().decompress(data[position:])
        except zlib.error:
            position += 1
            continue
        position += 2
        lines = [
            block[m.end() : m.end() + int.from_bytes(m.group(1), "big")].decode("latin-1")
            for m in re.finditer(rb"\x00[\x00-\x04]\x00\x09(\x00\x00..)", block, re.DOTALL)
        ]
        for paragraph in "\n".join(lines).split("\n\n"):
            yield paragraph.replace("\n", " ").strip()


def sentences(paragraph: str) -> Iterator[str]:
    """Clean sentences of 5 to 24 words, without markup or odd characters."""
    for start in _ABBREVIATIONS:
        paragraph = paragraph.replace(start, start.replace(".", "\0"))
    for sentence in _SENTENCE_END.split(paragraph):
        sentence = sentence.replace("\0", ".").replace("--", ", ").replace("_", "").strip(' "')
        sentence = re.sub(r"\s+", " ", sentence.replace("’", "'")).replace(" ,", ",")
        if 5 <= len(sentence.split()) <= 24 and _ALLOWED.fullmatch(sentence):
            yield sentence


def build(packages: Path, out: Path) -> int:
    """Write `running.txt` and `sentences.txt`; returns the number of sentences."""
    found: dict[str, None] = {}
    for package, (_, pattern) in SOURCES.items():
        before = len(found)
        for path in sorted((packages / package).glob(pattern)):
            for paragraph in paragraphs(path):
                found.update(dict.fromkeys(sentences(paragraph)))
        logger.info("%s: %d sentences", package, len(found) - before)
    shuffled = sorted(found)
    random.Random(SEED).shuffle(shuffled)
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in (("running.txt", list(found)), ("sentences.txt", shuffled)):
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(shuffled)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".work/corpus"))
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    download(out / "packages")
    logger.info("%d sentences in all", build(out / "packages", out))


if __name__ == "__main__":
    main()
