"""BM25 over passages, by bm25s: words in common, rare words count more (Robertson et al., 1994)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from ..core.errors import PromptError
from ..core.specpc.bm25 import words
from ..core.types import Passage
from .errors import FolderError
from .extras import require

_PASSAGES, _OPTIONS, _FORMAT = "passages.jsonl", "index.json", 2


class Bm25Options(TypedDict, total=False):
    """The keyword arguments of `Bm25Index`."""

    k1: float
    b: float
    stopwords: Collection[str]
    progress: bool


class Bm25Index:
    """An index of passages in memory; searching does not change it, so threads may share it.

    Args:
        passages: What can be found.
        k1: How fast repeated words stop counting.
        b: How much long passages are held back, from 0 to 1.
        stopwords: Words left out, written in any case and cut as texts are (`words`).
        progress: Show bm25s' progress bars while indexing.

    Raises:
        MissingExtraError: bm25s is not installed.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        k1: float = 1.5,
        b: float = 0.75,
        stopwords: Collection[str] = (),
        progress: bool = False,
    ) -> None:
        engine = _bm25s()
        self._passages = tuple(passages)
        self._stopwords = frozenset(word for text in stopwords for word in words(text))
        self._vocabulary: dict[str, int] = {}
        tokens = [self._number(passage.text) for passage in self._passages]
        self._bm25: Any = None
        if self._vocabulary:
            self._bm25 = engine.BM25(k1=k1, b=b, method="lucene", backend="numpy")
            self._bm25.index(
                (tokens, self._vocabulary), create_empty_token=False, show_progress=progress
            )

    @classmethod
    def from_texts(cls, texts: Sequence[str], **options: Unpack[Bm25Options]) -> Bm25Index:
        """Index texts; their ids are their places from "1" on. Options as for the class."""
        return cls([Passage(text, str(n)) for n, text in enumerate(texts, start=1)], **options)

    @classmethod
    def from_passages(
        cls, passages: Sequence[Passage], **options: Unpack[Bm25Options]
    ) -> Bm25Index:
        """Index passages. Options as for the class."""
        return cls(passages, **options)

    def save(self, folder: str | Path) -> None:
        """Write the index to a folder as JSON and plain arrays (no pickle).

        Args:
            folder: Made if it is missing; an index in it is replaced.

        Raises:
            FolderError: A passage's metadata cannot be written as JSON.
        """
        lines = [_line(passage) for passage in self._passages]
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / _OPTIONS).unlink(missing_ok=True)  # without it a half-written folder is no index
        (path / _PASSAGES).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if self._bm25 is not None:
            self._bm25.save(path, allow_pickle=False, show_progress=False)
        options = {
            "format": _FORMAT,
            "passages": len(lines),
            "words": len(self._vocabulary),
            "stopwords": sorted(self._stopwords),
        }
        (path / _OPTIONS).write_text(json.dumps(options), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Bm25Index:
        """Read an index that `save` wrote, without indexing anew.

        Args:
            folder: Where it was saved.

        Raises:
            FolderError: The folder holds no index, or a damaged one.
            MissingExtraError: bm25s is not installed.
        """
        engine, path = _bm25s(), Path(folder)
        try:
            options = json.loads((path / _OPTIONS).read_text(encoding="utf-8"))
            if options["format"] != _FORMAT:
                raise FolderError(
                    f"The index in {str(folder)!r} has format {options['format']}, this version "
                    f"reads {_FORMAT}: index the passages again."
                )
            lines = (path / _PASSAGES).read_text(encoding="utf-8").splitlines()
            index = cls([], stopwords=options["stopwords"])
            index._passages = tuple(Passage(**json.loads(line)) for line in lines)
            if options["words"]:
                index._bm25 = engine.BM25.load(
                    path, allow_pickle=False, show_progress=False, backend="numpy"
                )
                index._vocabulary = index._bm25.vocab_dict
            if (len(lines), len(index._vocabulary)) != (options["passages"], options["words"]):
                raise ValueError("its files do not belong together")
        except FolderError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(
                f"The folder {str(folder)!r} holds no whole index ({error}): save one with "
                "Bm25Index.save."
            ) from error
        return index

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, question: str, k: int = 5) -> list[tuple[Passage, float]]:
        """Find the passages that share the most telling words with a question.

        Args:
            question: Any text.
            k: Most passages returned; more than there are returns all of them.

        Returns:
            Passages with their scores, best first, equal scores in the order of indexing.
            Passages without any word of the question score 0 and fill up to k.

        Raises:
            PromptError: k is below 1.
        """
        if k < 1:
            raise PromptError(f"k is {k}: ask for at least one passage.")
        scores = self._scores(question)  # (passages,) float32
        order = np.argsort(-scores, kind="stable")[:k]
        return [(self._passages[index], float(scores[index])) for index in order]

    def _scores(self, question: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        known = [self._vocabulary[w] for w in self._words(question) if w in self._vocabulary]
        if not known:
            return np.zeros(len(self._passages), dtype=np.float32)
        scores: np.ndarray[tuple[int], np.dtype[np.float32]] = self._bm25.get_scores_from_ids(known)
        return scores

    def _number(self, text: str) -> list[int]:
        """Word numbers of a text; new words join the vocabulary."""
        return [self._vocabulary.setdefault(w, len(self._vocabulary)) for w in self._words(text)]

    def _words(self, text: str) -> list[str]:
        return [word for word in words(text) if word not in self._stopwords]


def _line(passage: Passage) -> str:
    """A passage as one line of JSON; ASCII, so that no character of it ends the line."""
    try:
        value = {"text": passage.text, "id": passage.id, "metadata": dict(passage.metadata)}
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FolderError(
            f"The metadata of passage {passage.id!r} is no JSON ({error}): use strings, numbers, "
            "lists and dicts."
        ) from error


def _bm25s() -> Any:
    """bm25s, without the debug level that it gives its logger when it is first imported."""
    require("bm25s", "retrieval", "Bm25Index")
    fresh = "bm25s" not in sys.modules
    import bm25s

    if fresh:
        logging.getLogger("bm25s").setLevel(logging.NOTSET)
    return bm25s
