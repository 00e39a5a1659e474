"""The draft's guessed answer, which SpecKV has made anyway, as a chain of guesses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .lookup import longest_match
from .tree import EMPTY, TokenTree


class LookaheadDrafter:
    """Follows a guessed answer; where the target leaves it, it is taken up again at the next match.

    Args:
        guess: The draft's answer as the target's token ids.
        length: Most tokens proposed at once.
        longest: Most tokens compared to find the place in the guess.
    """

    def __init__(self, guess: Sequence[int], *, length: int = 16, longest: int = 8) -> None:
        self.guess = np.asarray(guess, dtype=np.int64)  # (guessed,)
        self.length, self.longest = length, longest
        self.said = 0  # tokens of the answer so far

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        answer = context[len(context) - min(self.said, self.longest) :]
        if not answer:
            return TokenTree.chain(self.guess[: self.length].tolist())
        ends = np.flatnonzero(self.guess[:-1] == answer[-1])
        ends, matched = longest_match(self.guess, ends, answer, self.longest)
        if not matched:
            return EMPTY
        nearest = int(ends[np.abs(ends - (self.said - 1)).argmin()])
        return TokenTree.chain(self.guess[nearest + 1 : nearest + 1 + self.length].tolist())

    def observe(self, accepted: Sequence[int]) -> None:
        """Count what has been said."""
        self.said += len(accepted)
