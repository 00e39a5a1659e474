"""ADED (arXiv 2407.12021): drafts from an adaptive tri-gram store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from .search import Successors, best_first, puct
from .store import WINDOW, TrigramStore
from .tree import EMPTY, NODES, TokenTree

Search = Literal["puct", "best_first"]
_SEARCHES: Mapping[Search, Callable[[Successors, int, int, int], TokenTree]] = {
    "puct": puct,
    "best_first": best_first,
}


class AdedDrafter:
    """Searches the store for likely continuations, and teaches it what the target says.

    Args:
        store: Read, and updated with the newest 16 tokens at every step.
        prompt: What the target reads; its last tokens are part of the first updates.
        search: "puct" as in the paper, or "best_first", which is several times cheaper.
        nodes: Most nodes of the tree.
    """

    def __init__(
        self,
        store: TrigramStore,
        prompt: Sequence[int],
        *,
        search: Search = "puct",
        nodes: int = NODES,
    ) -> None:
        self.store, self.nodes = store, nodes
        self._search = _SEARCHES[search]
        self._newest = deque(prompt[-WINDOW:], maxlen=WINDOW)

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        if len(context) < 2:
            return EMPTY
        return self._search(self.store.successors, context[-2], context[-1], self.nodes)

    def observe(self, accepted: Sequence[int]) -> None:
        """The online update, over the last 16 tokens, or all that is new where that is more."""
        newest = [*self._newest, *accepted]
        self.store.reinforce(newest[-max(WINDOW, len(accepted) + 2) :])
        self._newest.extend(accepted)
