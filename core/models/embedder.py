"""Vectors of texts from any embedder, remembered, and how near texts are to a question.

An embedder is a function from texts to vectors, an object that tells documents and questions apart
(`embed_documents` and `embed_query`), or the name of a model that `load_encoder` reads. Vectors may
be rows of anything that torch can take.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from ..errors import DraftSieveError, ModelError
from ..options import named
from ..runtime.limits import check_deadline
from .footprint import explain_out_of_memory, is_out_of_memory
from .shared import shared_encoder

ROOM = 64 << 20  # bytes of vectors that are remembered of an embedder


@runtime_checkable
class DocumentEmbedder(Protocol):
    """An embedder that tells documents and questions apart."""

    def embed_documents(self, texts: list[str]) -> Any:
        """One vector a text."""
        ...

    def embed_query(self, text: str) -> Any:
        """The vector of a question."""
        ...


Function = Callable[[list[str]], Any]  # texts -> one vector a text
Embedder = Function | DocumentEmbedder
_KNOWN: dict[tuple[int, str], TextVectors] = {}  # by the embedder's place in memory


def load_embedder(embedder: Embedder | str | Path) -> Embedder:
    """The embedder itself; a model that is named is loaded, once a process.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelError: It cannot be loaded.
    """
    return shared_encoder(embedder) if isinstance(embedder, str | Path) else embedder


def cosines(embedder: Embedder | str | Path, question: str, texts: Sequence[str]) -> torch.Tensor:
    """How near texts are to a question; vectors are remembered as long as the embedder lives.

    Args:
        embedder: See above. Its calls never overlap.
        question: What is asked.
        texts: What may answer it.

    Returns:
        (texts,) float32 cosines.

    Raises:
        ModelError: The embedder fails, or gives no vectors that can be compared.
    """
    found = load_embedder(embedder)
    return (_vectors_of(found) or TextVectors()).cosines(found, question, texts)


def embed(embedder: Embedder | str | Path, texts: Sequence[str]) -> torch.Tensor:
    """Vectors of documents, (texts, width) float32 of length one; none is remembered.

    Raises:
        ModelError: As for `cosines`.
    """
    rows = _embedded(load_embedder(embedder), list(texts), False, None) if texts else []
    return torch.stack(rows) if rows else torch.empty(0, 0)


def remember(embedder: Embedder | str | Path, vectors: Mapping[str, torch.Tensor]) -> None:
    """Tell `cosines` what an embedder gives for some texts: (width,) float32 of length one each."""
    if vectors and (own := _vectors_of(load_embedder(embedder))) is not None:
        own.add(vectors)


def _vectors_of(embedder: Embedder) -> TextVectors | None:
    """What is remembered of an embedder; None where nothing may be."""
    owner = getattr(embedder, "__self__", embedder)  # bound methods are new objects at every look
    key = id(owner), "" if owner is embedder else getattr(embedder, "__qualname__", "")
    if key not in _KNOWN:
        try:
            weakref.finalize(owner, _KNOWN.pop, key, None).atexit = False
        except TypeError:  # it cannot be watched, so nothing may be kept for it
            return None
    return _KNOWN.setdefault(key, TextVectors())


class TextVectors:
    """Vectors of one embedder by text, those unused for longest forgotten first.

    Args:
        room: Most bytes of vectors; None for no limit.
    """

    def __init__(self, room: int | None = ROOM) -> None:
        self._room, self._lock = room, Lock()
        self._rows: OrderedDict[tuple[bool, str], torch.Tensor] = OrderedDict()

    def cosines(self, embedder: Embedder, question: str, texts: Sequence[str]) -> torch.Tensor:
        """`cosines` with these vectors; the embedder must always be the same."""
        with self._lock:
            documents = self._find(embedder, texts, asked=False)  # (texts, width)
            (row,) = self._find(embedder, [question], asked=isinstance(embedder, DocumentEmbedder))
        return documents @ row if texts else torch.empty(0)

    def add(self, vectors: Mapping[str, torch.Tensor]) -> None:
        """Take documents' vectors that somebody else has kept."""
        with self._lock:
            self._rows.update({(False, text): row for text, row in vectors.items()})

    def _find(self, embedder: Embedder, texts: Sequence[str], *, asked: bool) -> torch.Tensor:
        """(texts, width) unit rows; only texts without one are embedded, each once."""
        known = {text: self._rows.get((asked, text)) for text in texts}
        missing = [text for text, row in known.items() if row is None]
        if missing:
            width = next((len(row) for row in self._rows.values()), None)
            known.update(zip(missing, _embedded(embedder, missing, asked, width), strict=True))
        rows = {text: row for text, row in known.items() if row is not None}
        for text, row in rows.items():
            self._rows[asked, text] = row
            self._rows.move_to_end((asked, text))
        while self._room is not None and self._bytes() > self._room:
            self._rows.popitem(last=False)
        return torch.stack([rows[text] for text in texts]) if texts else torch.empty(0, 0)

    def _bytes(self) -> int:
        return sum(row.nbytes for row in [*self._rows.values()][:1]) * len(self._rows)


def _embedded(
    embedder: Embedder, texts: list[str], asked: bool, width: int | None
) -> list[torch.Tensor]:
    """The vectors of texts, (width,) float32 of length one each."""
    check_deadline()
    with explain_out_of_memory(f"{len(texts)} texts were embedded"):
        try:
            if not isinstance(embedder, DocumentEmbedder):
                given = embedder(texts)
            elif asked:
                given = [embedder.embed_query(text) for text in texts]
            else:
                given = embedder.embed_documents(texts)
        except DraftSieveError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _wrong(embedder, f"failed: {type(error).__name__}: {error}") from error
    rows = _rows(embedder, given)
    if len(rows) != len(texts):
        raise _wrong(embedder, f"gave {len(rows)} vectors for {len(texts)} texts")
    widths = sorted({len(row) for row in rows} | ({width} if width is not None else set()))
    if len(widths) > 1:
        raise _wrong(embedder, f"gives vectors of different widths: {widths}")
    matrix = torch.stack(rows)  # (texts, width)
    lengths = matrix.norm(dim=1)
    for text, length in zip(texts, lengths.tolist(), strict=True):
        if not 0 < length < torch.inf:  # NaN is neither
            what = "zeros" if length == 0 else "values that are not finite"
            raise _wrong(embedder, f"gave a vector of {what} for the text {text[:60]!r}")
    return [row.clone() for row in matrix / lengths[:, None]]


def _rows(embedder: Embedder, given: Any) -> list[torch.Tensor]:
    """What an embedder gave, as (width,) float32 on the CPU each."""
    try:
        rows = [
            torch.as_tensor(row if isinstance(row, torch.Tensor) else np.asarray(row))
            .detach()
            .to("cpu", torch.float32)
            for row in given
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong(embedder, f"gave {type(given).__name__}, no rows of numbers") from error
    if any(row.dim() != 1 for row in rows):
        shapes = sorted({tuple(row.shape) for row in rows})
        raise _wrong(embedder, f"gave rows of the shapes {shapes} in place of one vector a text")
    return rows


def _wrong(embedder: Embedder, what: str) -> ModelError:
    return ModelError(
        f"The embedder {named(embedder)} {what}. It must give one vector of numbers for each text, "
        "all of one width."
    )
