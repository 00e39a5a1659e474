"""Vectors of passages' sentences beside what the draft read, so that a question embeds itself only.

A sentence takes a byte a number and a scale. Which embedder made them is told by what it makes of a
fixed text, kept with them, so that no other one's are mixed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional

from ...errors import StoreError
from ...models.embedder import Embedder, embed, load_embedder
from ...store.codec import decode, encode
from ...store.entries import Entry
from ...store.shards import Shards
from ..units import unit_spans

FOLDER = "sentences"
PROBE = "What does a passage say that a question asks?"
_SAME = 0.99  # cosine of what one embedder makes of one text on two machines


class StoredVectors:
    """Sentence vectors of one embedder by passage.

    Args:
        path: The store's folder; None for one in memory.
        embedder: See `embedder.py`.

    Raises:
        StoreError: The folder holds another embedder's vectors.
        ModelError: The embedder fails.
    """

    def __init__(self, path: Path | None, embedder: Embedder | str | Path) -> None:
        self.embedder = load_embedder(embedder)
        probe = embed(self.embedder, [PROBE])
        about = {"format": 1, "width": probe.shape[1]}
        self.shards = Shards.open(None if path is None else path / FOLDER, about)
        kept = self.shards.get([PROBE]).get(PROBE)
        if kept is None:
            self.shards.put([Entry(PROBE, 1, encode(probe.unsqueeze(1), "int8"))])
        elif float((_rows(kept) * probe).sum()) < _SAME:
            raise StoreError(
                f"The sentence vectors in {str(path)!r} were made by another embedder: open the "
                "store with that one, or index the passages again into a store of its own."
            )

    def add(self, names: Sequence[str], texts: Sequence[str]) -> None:
        """Embed the sentences of passages that are not there yet."""
        known = self.shards.has(names)
        new = {n: t for n, t in zip(names, texts, strict=True) if n not in known}
        sentences = {name: _sentences(text) for name, text in new.items()}
        every = [sentence for own in sentences.values() for sentence in own]
        if every:
            self.shards.put(_entries(sentences, embed(self.embedder, every)))

    def known(self, names: Sequence[str], texts: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """(width,) float32 of length one, for each sentence of the passages that are there."""
        entries = self.shards.get(names)
        found: dict[str, torch.Tensor] = {}
        for name, text in zip(names, texts, strict=True):
            if (entry := entries.get(name)) is None:
                continue
            found.update(zip(_sentences(text), _rows(entry), strict=True))
        return found


def has_vectors(path: Path | None) -> bool:
    """Whether there are sentence vectors in a store's folder."""
    return path is not None and (path / FOLDER).is_dir()


@contextmanager
def vectors_in(path: Path | None) -> Iterator[Shards | None]:
    """The vectors in a store's folder, whichever embedder made them; None where there are none."""
    about = Shards.made_with(path / FOLDER) if path is not None and has_vectors(path) else {}
    if path is None or not about:
        yield None
        return
    with Shards.open(path / FOLDER, about) as shards:
        yield shards


def _rows(entry: Entry) -> torch.Tensor:
    """(sentences, width) float32 of length one."""
    return functional.normalize(decode(entry.tensors, "int8", slice(None))[:, 0], dim=1)


def _sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in unit_spans(text, "sentence")]


def _entries(sentences: Mapping[str, list[str]], rows: torch.Tensor) -> Iterator[Entry]:
    first = 0
    for name, own in sentences.items():
        if own:
            packed = encode(rows[first : first + len(own)].unsqueeze(1), "int8")
            yield Entry(name, len(own), packed)
        first += len(own)
