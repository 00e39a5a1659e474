"""One row's tokens as text: what is certain, what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .constrained import Constraint


@dataclass(slots=True)
class RowText:
    """Turns one row's tokens into text as they come, and knows when the row is finished.

    A character whose last bytes never come is left out. Text that may become a stop string is
    held back until that is decided. Where a grammar leaves nothing to say, the row is finished.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    stop: tuple[str, ...]
    limit: int
    constraint: Constraint | None = None
    tokens: int = 0
    finish_reason: str | None = None
    _held: str = ""
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain (often empty)."""
        self.tokens += 1
        if token in self.ends:
            return self._finish("stop")
        self._held += self._stream.step(self.tokenizer, token) or ""
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            return self._finish("stop_string")
        if self.constraint is not None and self.constraint.complete:
            return self._finish("stop")
        if self.tokens >= self.limit:
            return self._finish("length")
        ready = len(self._held) - self._undecided()
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        text, self._held = self._held, ""
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = 0
        for text in self.stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        return longest
