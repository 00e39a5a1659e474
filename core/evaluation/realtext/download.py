"""The published files of the sets: fetched from their publishers, checked, and never shipped."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError

SECONDS = 60  # that a publisher may stay silent


@dataclass(frozen=True, slots=True)
class Download:
    """A file of one commit of its publisher's, and what makes it the file that is read.

    `url` names the commit, so that `sha256` (of the file as it is published) cannot change.
    """

    url: str
    sha256: str
    convert: Callable[[bytes], bytes] = bytes


def fetch(source: Download, path: Path) -> None:
    """Download a file and put it in its place, whole or not at all.

    Args:
        source: Where it is published.
        path: Where it shall be; its folder is made.

    Raises:
        ConfigError: It cannot be had, or is not the file it was.
    """
    try:
        with urllib.request.urlopen(source.url, timeout=SECONDS) as answer:
            data: bytes = answer.read()
    except OSError as error:
        raise ConfigError(
            f"{source.url} cannot be downloaded ({error}): fetch it where there is a network, and "
            f"put it at {str(path)!r}."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != source.sha256:
        raise ConfigError(
            f"{source.url} has the sha256 {found} instead of {source.sha256}: it is not the file "
            "that was checked, so it is not used."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(source.convert(data))
    part.replace(path)


def gold_passages(data: bytes) -> bytes:
    """The lines of `nq-open-oracle.jsonl.gz` as question, answers, title and text."""
    lines = []
    for line in gzip.decompress(data).decode("utf-8").splitlines():
        row = json.loads(line)
        (gold,) = row["ctxs"]
        found = {"question": row["question"], "answers": row["answers"]}
        found |= {"title": gold["title"], "text": gold["text"]}
        lines.append(json.dumps(found, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")
