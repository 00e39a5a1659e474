"""Drafting only while it pays: how much is proposed follows from what was measured.

A pass over a tree takes longer than one over a token, by how much depends on model, machine and
prompt; how many tokens it gives depends on the text. Both are measured while decoding, and the
number of nodes with the most tokens a second is taken, which may be none. Then a small tree is
tried again after 2, 4, 8, ... at most 64 plain steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING

from .tree import EMPTY, Drafter, TokenTree

if TYPE_CHECKING:
    from ..verify import Tally

SIZES = (0, 4, 8, 16, 32, 64)  # nodes that are chosen among
_FIRST = 2  # index of the size tried first
_LONGEST = 64  # most plain steps between two trials
_MARGIN = 1.02  # drafting must give this many times the tokens a second of plain decoding
_NEW_TIME, _NEW_GAIN = 0.2, 0.4  # weights of the newest measurement


class Pace:
    """Seconds of a pass by its number of nodes; shared by the requests of an engine."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seconds: list[float | None] = [None] * len(SIZES)

    def record(self, nodes: int, seconds: float) -> None:
        """Add the measured time of one pass."""
        place = bisect_left(SIZES, nodes)
        if place == len(SIZES):
            return
        with self._lock:
            old = self._seconds[place]
            self._seconds[place] = seconds if old is None else old + _NEW_TIME * (seconds - old)

    @property
    def ready(self) -> bool:
        """Whether a plain pass was measured."""
        return self._seconds[0] is not None

    def costs(self) -> list[float]:
        """Of each size, in plain passes; what is not measured costs as the next smaller size.

        Costs never fall with the size. Without a plain pass to compare with, all are 1.
        """
        with self._lock:
            seconds = list(self._seconds)
        plain = seconds[0]
        if plain is None:
            return [1.0] * len(SIZES)
        costs = [1.0]
        for measured in seconds[1:]:
            costs.append(max(costs[-1], 0.0 if measured is None else measured / plain))
        return costs


class AutoDrafter:
    """Proposes as much of another drafter's tree as pays, down to nothing.

    Args:
        drafter: Guesses best first.
        pace: What passes cost.
        tally: Where verification writes how long its last pass took.
    """

    def __init__(self, drafter: Drafter, pace: Pace, tally: Tally) -> None:
        self.drafter, self.pace, self.tally = drafter, pace, tally
        self._gains = [1.0] + [2.0] * (len(SIZES) - 1)  # tokens a pass by size; hopeful at first
        self._size = _FIRST
        # plain steps left, and those of the last pause; an engine's first step is measured plain
        self._waiting, self._wait = (0 if pace.ready else 1), 1
        self._tree, self._was_cut = EMPTY, False
        self._spent = 0.0  # tally.seconds when the last pass was recorded

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        self._tree = EMPTY
        if self._waiting:
            self._waiting -= 1
            return EMPTY
        whole = self.drafter.propose(context)
        self._tree = whole.cut(nodes=SIZES[self._size])
        self._was_cut = len(self._tree) < len(whole)
        return self._tree

    def observe(self, accepted: Sequence[int]) -> None:
        """Measure the last pass, and choose the next one's size."""
        self.drafter.observe(accepted)
        if self.tally.forwards:
            drafting = self.tally.seconds - self._spent if len(self._tree) else 0.0
            self.pace.record(self.tally.last_nodes, self.tally.last_seconds + drafting)
        self._spent = self.tally.seconds
        if not len(self._tree):
            return
        path = self._tree.follow(accepted)
        for place, size in enumerate(SIZES[: self._size + 1]):
            if place:
                hits = 1 + sum(node < size for node in path)
                self._gains[place] += _NEW_GAIN * (hits - self._gains[place])
        self._choose(more=self._was_cut and len(path) == len(accepted) - 1 and bool(path))

    def _choose(self, more: bool) -> None:
        """The size with the most tokens a second; one larger where a tree ended too soon.

        The larger one is tried even if the present one does not pay: where any tree is dear, long
        copies may pay although short ones do not.
        """
        if more and self._size + 1 < len(SIZES):
            self._wait, self._size = 1, self._size + 1
            return
        costs = self.pace.costs()
        worth = [self._gains[min(place, self._size)] / costs[place] for place in range(len(SIZES))]
        worth[0] = _MARGIN
        best = max(range(self._size + 1), key=lambda place: (worth[place], -place))
        if best == 0:
            self._wait = min(_LONGEST, 2 * self._wait)
            self._waiting, self._size = self._wait, 1
            self._gains[1] = max(self._gains[1], 1.0)
            return
        self._wait, self._size = 1, best


__all__ = ["SIZES", "AutoDrafter", "Pace"]
