"""A bounded memory of which token follows which two (ADED's "LLM representative", 2407.12021).

A set-associative table in numpy: a pair of tokens belongs to one set of 8 places. Where all are
taken, the pair that was touched longest ago makes room; where all 12 successors of a pair are
taken, the lightest one does. The size is fixed when the store is made.

A store remembers text: whoever gets its file, or drafts made from it, can learn what was said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ....errors import ModelError

WAYS = 8  # pairs a set holds
SUCCESSORS = 12  # tokens remembered behind a pair, as in the published code
BOOST = 0.04  # weight of one online update (section 3, "recency")
MOST = 3.0  # no weight is larger
WINDOW = 16  # newest tokens that an online update reads
_LOCATED = 1024  # tri-grams whose place is remembered
_FORMAT = "draftsieve-trigrams-1"
_PAIR = np.dtype(
    [
        ("keys", np.int64),  # first token * 2^32 + second + 1; 0: free
        ("touched", np.int64),  # the clock when it was used last
        ("totals", np.float32),  # times the pair was learnt
        ("tokens", np.int32, (SUCCESSORS,)),  # successor + 1; 0: free
        ("counts", np.float32, (SUCCESSORS,)),
        ("boosts", np.uint8, (SUCCESSORS,)),  # online updates that saw it
    ]
)


class TrigramStore:
    """Tri-grams of documents and past answers; safe to use from several threads.

    A successor's weight is its share among all that followed the pair in what was learnt, plus
    0.04 for each time an online update saw it, at most 3. Weights are scores, no probabilities.

    Args:
        pairs: Pairs of tokens it has room for, rounded up to a power of two; 128 bytes each.
        vocabulary: The tokenizer's `vocabulary_fingerprint`, "" if it does not matter.
    """

    def __init__(self, pairs: int = 1 << 18, vocabulary: str = "") -> None:
        self.sets = 1 << max(0, (max(1, pairs) - 1).bit_length() - (WAYS - 1).bit_length())
        self.vocabulary = vocabulary
        self._lock = Lock()
        self._clock = 0  # grows with every touch
        # one record a pair, so that all of it lies together in memory; fresh pages of zeros take
        # no memory before they are written
        self._table = np.zeros(self.sets * WAYS, _PAIR)
        self._keys, self._touched = self._table["keys"], self._table["touched"]
        self._totals, self._tokens = self._table["totals"], self._table["tokens"]
        self._counts, self._boosts = self._table["counts"], self._table["boosts"]
        self._located: dict[tuple[int, int], tuple[int, int]] = {}  # where tri-grams were lately

    def __len__(self) -> int:
        """Pairs it holds."""
        return int(np.count_nonzero(self._keys))

    @property
    def bytes(self) -> int:
        """Size when full; less is in use while it is filling."""
        return int(self._table.nbytes)

    def successors(self, first: int, second: int) -> tuple[tuple[int, float], ...]:
        """What followed a pair: (token, weight), heaviest first."""
        key = _key(first, second)
        with self._lock:
            row = self._find(key)
            if row < 0:
                return ()
            weights = self._weights(row)
            tokens: list[int] = self._tokens[row].tolist()
        heaviest = sorted(zip(weights, tokens, strict=False), key=lambda pair: (-pair[0], pair[1]))
        return tuple((token - 1, weight) for weight, token in heaviest)

    def learn(self, tokens: Sequence[int]) -> None:
        """Count the tri-grams of a text; texts below 3 tokens hold none.

        Args:
            tokens: Token ids of one document or answer.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if len(ids) < 3:
            return
        keys, thirds = (ids[:-2] << 32) + ids[1:-1] + 1, ids[2:]
        order = np.lexsort((thirds, keys))
        keys, thirds = keys[order], thirds[order]
        changes = [np.diff(part, prepend=-1) != 0 for part in (keys, thirds)]
        starts = np.flatnonzero(changes[0] | changes[1])  # of each different tri-gram
        keys, thirds, times = keys[starts], thirds[starts], np.diff(starts, append=len(ids) - 2)
        borders = np.append(np.flatnonzero(np.diff(keys, prepend=-1)), len(keys)).tolist()
        for start, end in pairwise(borders):
            with self._lock:  # per pair: a long document keeps nobody waiting
                self._count(int(keys[start]), thirds[start:end], times[start:end])

    def reinforce(self, window: Sequence[int]) -> None:
        """The online update: each tri-gram of the newest tokens gains 0.04.

        Args:
            window: The newest tokens, 16 in the paper.
        """
        with self._lock:
            for gram in zip(window, window[1:], window[2:], strict=False):
                row, place = self._locate(*gram)
                if self._boosts[row, place] < round(MOST / BOOST):
                    self._boosts[row, place] += 1

    def save(self, path: str | Path) -> None:
        """Write the store into one safetensors file: numbers only, no code."""
        with self._lock:
            rows = np.flatnonzero(self._keys)
            arrays = {name: self._table[name][rows] for name in _PAIR.names or ()}
            about = {"sets": self.sets, "clock": self._clock, "vocabulary": self.vocabulary}
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": _FORMAT, "about": json.dumps(about)}
        save_file({**arrays, "rows": rows}, file, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> TrigramStore:
        """Read what `save` wrote.

        Raises:
            ModelError: The file is missing or holds no store.
        """
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{str(path)!r} cannot be read as a draft store: {error}.") from error
        if metadata.get("format") != _FORMAT:
            raise ModelError(
                f"{str(path)!r} holds no draft store: make one with 'draftsieve drafts build'."
            )
        about = json.loads(metadata["about"])
        store = cls(about["sets"] * WAYS, about["vocabulary"])
        store._clock = about["clock"]
        for name in _PAIR.names or ():
            store._table[name][arrays["rows"]] = arrays[name]
        return store

    def _weights(self, row: int) -> list[float]:
        """Weights of a pair's successors; plain numbers, for numpy is slow with so few."""
        total = max(float(self._totals[row]), 1.0)
        used = _used(self._tokens[row].tolist())
        counts: list[float] = self._counts[row, :used].tolist()
        boosts: list[int] = self._boosts[row, :used].tolist()
        pairs = zip(counts, boosts, strict=True)
        return [min(count / total + BOOST * boost, MOST) for count, boost in pairs]

    def _first_row(self, key: int) -> int:
        """First row of the key's set (Fibonacci hashing)."""
        return ((key * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 20) % self.sets * WAYS

    def _find(self, key: int) -> int:
        """The row of a pair, -1 if there is none."""
        first = self._first_row(key)
        keys: list[int] = self._keys[first : first + WAYS].tolist()
        return first + keys.index(key) if key in keys else -1

    def _locate(self, first: int, second: int, third: int) -> tuple[int, int]:
        """Row and place of a tri-gram, new or not. Windows overlap: most were located before."""
        key = _key(first, second)
        found = self._located.get((key, third))
        if found is not None:
            row, place = found
            if self._keys[row] == key and self._tokens[row, place] == third + 1:
                self._clock += 1
                self._touched[row] = self._clock
                return found
        if len(self._located) >= _LOCATED:
            self._located.clear()
        row = self._claim(key)
        found = self._located[key, third] = row, self._place(row, third)
        return found

    def _claim(self, key: int) -> int:
        """The row of a pair; a new pair takes a free row, else the one touched longest ago."""
        self._clock += 1
        row = self._find(key)
        if row < 0:
            first = self._first_row(key)
            row = first + int(self._touched[first : first + WAYS].argmin())  # free rows: 0
            self._table[row] = np.zeros((), _PAIR)
            self._keys[row] = key
        self._touched[row] = self._clock
        return row

    def _place(self, row: int, token: int) -> int:
        """Where a successor stands; a new one takes a free place, else the lightest one's."""
        tokens: list[int] = self._tokens[row].tolist()
        if token + 1 in tokens:
            return tokens.index(token + 1)
        place = _used(tokens)
        if place == SUCCESSORS:
            weights = self._weights(row)
            place = weights.index(min(weights))
        self._tokens[row, place] = token + 1
        self._counts[row, place] = self._boosts[row, place] = 0
        return place

    def _count(self, key: int, successors: NDArray[np.int64], times: NDArray[np.int64]) -> None:
        row = self._claim(key)
        self._totals[row] += times.sum()
        heaviest = np.argsort(-times, kind="stable")[:SUCCESSORS]
        for place in heaviest[::-1].tolist():  # the heaviest last: nothing lighter replaces it
            self._counts[row, self._place(row, int(successors[place]))] += times[place]


def _key(first: int, second: int) -> int:
    return (first << 32) + second + 1


def _used(tokens: list[int]) -> int:
    """How many places of a pair are taken; they fill from the first on."""
    return tokens.index(0) if 0 in tokens else SUCCESSORS


def build_store(
    texts: Iterable[Sequence[int]], *, pairs: int = 1 << 18, vocabulary: str = ""
) -> TrigramStore:
    """A store of documents or past answers.

    Args:
        texts: Token ids of each text, made by the target's tokenizer.
        pairs: As for `TrigramStore`.
        vocabulary: As for `TrigramStore`.
    """
    store = TrigramStore(pairs, vocabulary)
    for tokens in texts:
        store.learn(tokens)
    return store


def vocabulary_fingerprint(vocabulary: dict[str, int]) -> str:
    """Tells tokenizers apart: a store of one is of no use to another.

    Args:
        vocabulary: What `tokenizer.get_vocab()` returns.
    """
    listed = json.dumps(sorted(vocabulary.items()), ensure_ascii=True)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]
