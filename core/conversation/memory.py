"""What became of each text of a conversation, by content, so that it is shortened once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock

from .turns import ShortTurn, Turn


class TurnMemory:
    """Remembers the form in which texts were sent. Safe to use from several threads at once.

    Args:
        stable_prefix: A form belongs to a text and all that stands before it; otherwise to a text
            and the question for which it was shortened.
        most: Most forms kept; those unused for longest are forgotten.
    """

    def __init__(self, *, stable_prefix: bool, most: int) -> None:
        self._stable, self._most = stable_prefix, most
        self._forms: OrderedDict[bytes, ShortTurn] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._forms)

    def keys(self, question: str, turns: Sequence[Turn], places: Sequence[int]) -> list[bytes]:
        """Under which keys the turns at some places are remembered."""
        if not self._stable:
            return [digest([question, turns[i].text, turns[i].note]) for i in places]
        chain, ends = b"", []
        for turn in turns:
            chain = digest([chain.hex(), turn.text])
            ends.append(chain)
        return [ends[i] for i in places]

    def recall(self, keys: Mapping[int, bytes]) -> dict[int, ShortTurn]:
        """The remembered forms, by place."""
        with self._lock:
            found = {i: self._forms[key] for i, key in keys.items() if key in self._forms}
            for index in found:
                self._forms.move_to_end(keys[index])
        return found

    def store(self, forms: Mapping[bytes, ShortTurn]) -> None:
        """Remember forms, and forget old ones beyond the most."""
        with self._lock:
            self._forms.update(forms)
            while len(self._forms) > self._most:
                self._forms.popitem(last=False)


def digest(texts: Sequence[str]) -> bytes:
    """SHA-256 of texts, told apart."""
    sha = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        sha.update(len(raw).to_bytes(8, "big") + raw)
    return sha.digest()
