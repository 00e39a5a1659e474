"""Prompt lookup: copy what followed the same words earlier (Saxena, 2023).

Answers of RAG quote their passages. The text looked through is the ORIGINAL prompt, also where the
target reads a compressed one, and the answer itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .tree import EMPTY, NODES, TokenTree


class LookupDrafter:
    """Proposes the text behind the longest earlier match of the newest tokens.

    Args:
        prompt: The original prompt as the target's token ids.
        longest: Most tokens compared; a longer match is not looked for.
        shortest: Fewest tokens that must match.
        length: Most tokens copied from one place. A match of m tokens is trusted for 4 m + 4.
        places: Most places copied from; the newest is the best guess.
        nodes: Most nodes of the tree.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        longest: int = 8,
        shortest: int = 1,
        length: int = 24,
        places: int = 2,
        nodes: int = NODES,
    ) -> None:
        self.longest, self.shortest = longest, shortest
        self.length, self.places, self.nodes = length, places, nodes
        self.size = len(prompt)
        self._text = np.empty(2 * self.size + 64, dtype=np.int64)  # (room,), `size` of it used
        self._text[: self.size] = prompt

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`. Costs one pass of numpy over the text."""
        text = self._text[: self.size]
        ends = np.flatnonzero(text[:-1] == context[-1])  # where the newest token stood before
        ends, matched = longest_match(text, ends, context, self.longest)
        if matched < self.shortest or not len(ends):
            return EMPTY
        length = min(self.length, 4 * matched + 4)
        places = ends[::-1][: self.places].tolist()
        return TokenTree.from_paths(
            (text[end + 1 : end + 1 + length].tolist() for end in places), self.nodes
        )

    def observe(self, accepted: Sequence[int]) -> None:
        """Look through the answer too."""
        if self.size + len(accepted) > len(self._text):
            self._text = np.concatenate([self._text, np.empty_like(self._text)])
        self._text[self.size : self.size + len(accepted)] = accepted
        self.size += len(accepted)


def longest_match(
    text: NDArray[np.int64], ends: NDArray[np.int64], context: Sequence[int], longest: int
) -> tuple[NDArray[np.int64], int]:
    """Narrow places that match the newest token down to those that match most tokens before it.

    Args:
        text: (tokens,) what is looked through.
        ends: (places,) ascending indices of the newest token in it.
        context: What ends with that token.
        longest: Most tokens compared.

    Returns:
        The remaining places, and how many tokens match there (0 where `ends` is empty).
    """
    matched = min(1, len(ends))
    while 0 < matched < min(longest, len(context)):
        inside = ends[ends >= matched]
        better = inside[text[inside - matched] == context[-1 - matched]]
        if not len(better):
            break
        ends, matched = better, matched + 1
    return ends, matched
