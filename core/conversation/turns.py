"""A conversation as turns: what may be shortened, and what is sent instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Keep = Literal["always", "newest", "never"]
Spans = tuple[tuple[int, int], ...]

LEFT_OUT = "[left out as unrelated]"  # stands where nothing of a text was kept


@dataclass(frozen=True, slots=True)
class Turn:
    """A text of a conversation, and whether it may be shortened.

    `keep` is "always", "newest" (whole as long as the older ones can make the room), or "never".
    `note` stands behind the text where it is shortened. `tokens` counts what comes beside the
    text (pictures).
    """

    text: str
    keep: Keep = "always"
    note: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class ShortTurn:
    """What is sent of a turn; sizes in draft tokens, spans in characters of the original text."""

    text: str
    spans: Spans
    tokens: int
    original_tokens: int

    @property
    def shortened(self) -> bool:
        """Whether the text differs from the original."""
        return self.tokens < self.original_tokens


@dataclass(frozen=True, slots=True)
class ShortTurns:
    """A conversation as it is sent; sizes in draft tokens.

    `compressed` counts the texts that this call gave to the draft. `fallback` says why the
    originals came back although they exceed the capacity; it is None otherwise.
    """

    turns: tuple[ShortTurn, ...]
    tokens: int
    original_tokens: int
    compressed: int = 0
    fallback: str | None = None


def total(turns: Iterable[ShortTurn]) -> int:
    """Tokens of what is sent."""
    return sum(turn.tokens for turn in turns)


def with_note(text: str, note: str) -> str:
    """A shortened text with its note, or what stands in its place."""
    return "\n".join(part for part in (text or LEFT_OUT, note) if part)
