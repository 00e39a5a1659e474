"""Drafting only while it pays: how much is proposed follows from what was measured.

A pass over a tree takes longer than one over a token, by how much depends on model, machine and
prompt; how many tokens it gives depends on the text. Both are measured, and the number of nodes
with the most tokens a second is taken, which may be none. While nothing is drafted, guesses are
still made now and then and compared with what the target says, without letting it read them: this
costs a third of a hundredth of the time, and drafting begins as soon as it would have paid.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil
from threading import Lock
from typing import TYPE_CHECKING

from .tree import EMPTY, Drafter, TokenTree

if TYPE_CHECKING:
    from ..verify import Tally

SIZES = (0, 4, 8, 16, 32, 64)  # nodes that are chosen among
_HOPE = 2.0  # tokens a pass of an engine's first request, before anything is known
_MARGIN = 1.02  # drafting must give this many times the tokens a second of plain decoding
_NEW_TIME, _NEW_GAIN = 0.2, 0.15  # weights of the newest measurement
_NEW_HABIT = 0.05  # weight of the newest gain in what later requests start from
_FORGET = 0.001  # of what a tree costs more than nothing, at each plain pass
_TOGETHER = 32  # tokens of plain passes that the drafter is told together
_WATCHED = 2  # right guesses after which watching has seen enough
_WATCHING = 0.003  # share of the time that watching may take


class Pace:
    """What passes cost and trees gave, by number of nodes; shared by the requests of an engine."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seconds: list[float | None] = [None] * len(SIZES)
        self._warm = [True] + [False] * (len(SIZES) - 1)
        self._habit = [1.0] + [_HOPE] * (len(SIZES) - 1)

    def record(self, nodes: int, seconds: float) -> None:
        """Add the measured time of one pass; the first one over a tree of its size only warms up.

        Times of trees drift towards that of a plain pass while there are plain passes only, so that
        a pass slow by accident does not rule out drafting for good.
        """
        place = bisect_left(SIZES, nodes)
        if place == len(SIZES):
            return
        with self._lock:
            if not self._warm[place]:
                self._warm[place] = True
                return
            old = self._seconds[place]
            self._seconds[place] = seconds if old is None else old + _NEW_TIME * (seconds - old)
            if place == 0:
                for size, measured in enumerate(self._seconds[1:], start=1):
                    if measured is not None:
                        self._seconds[size] = measured + _FORGET * (seconds - measured)

    def learn(self, gains: Sequence[float]) -> None:
        """Add what one tree gave, by the number of its nodes that were looked at."""
        with self._lock:
            for place, gain in enumerate(gains):
                self._habit[place] += _NEW_HABIT * (gain - self._habit[place])

    def habit(self) -> list[float]:
        """Tokens a pass to expect of each size."""
        with self._lock:
            return list(self._habit)

    @property
    def plain(self) -> float | None:
        """Seconds of a plain pass; None before one was measured."""
        return self._seconds[0]

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
        self._gains = pace.habit()  # tokens a pass by size
        self._whole, self._shown = EMPTY, EMPTY  # the newest guess, and what the target read of it
        self._said: list[int] = []  # what it said since
        self._unseen: list[int] = []  # what the drafter was not told yet
        self._asked, self._rest = False, 0  # whether this step guesses; plain steps before the next
        self._spent = 0.0  # tally.seconds when the last pass was recorded
        # an engine's first step is measured plain
        self._size = 0 if pace.plain is None else self._best(pace.costs())

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        self._asked = not self._rest and not len(self._whole)
        if not self._asked:
            self._rest, self._shown = max(0, self._rest - 1), EMPTY
            return EMPTY
        self._tell()
        self._whole, self._said = self.drafter.propose(context), []
        self._shown = self._whole.cut(nodes=SIZES[self._size])
        return self._shown

    def observe(self, accepted: Sequence[int]) -> None:
        """Measure the last pass, and choose the next one's size."""
        self._unseen += accepted
        if self._size or len(self._unseen) >= _TOGETHER:
            self._tell()
        spent, self._spent = self.tally.seconds - self._spent, self.tally.seconds
        if self.tally.forwards:
            drafting = spent if len(self._shown) else 0.0
            self.pace.record(self.tally.last_nodes, self.tally.last_seconds + drafting)
        if self._asked and self._size == 0 and self.pace.plain:
            self._rest = ceil(spent / (_WATCHING * self.pace.plain)) - 1
        if len(self._whole):
            self._said += accepted
            self._judge()

    def _tell(self) -> None:
        """Let the drafter observe. Without guesses that can wait a few tokens, to save time."""
        if self._unseen:
            self.drafter.observe(self._unseen)
            self._unseen = []

    def _judge(self) -> None:
        """What the newest guess gave by size, once that is known."""
        path = self._whole.follow(self._said)
        open_end = len(path) == len(self._said)  # so far all of it came true
        if not len(self._shown) and open_end and len(path) < _WATCHED:
            return
        known = self._size if len(self._shown) and open_end else len(SIZES) - 1
        hits = [1.0 + sum(node < size for node in path) for size in SIZES[: known + 1]]
        for place, hit in enumerate(hits):
            self._gains[place] += _NEW_GAIN * (hit - self._gains[place])
        self.pace.learn(hits)
        more = len(self._shown) > 0 and len(self._shown) < len(self._whole)
        more = more and len(path) >= len(self._said) - 1 > 0
        self._whole = EMPTY
        self._choose(more)

    def _choose(self, more: bool) -> None:
        """The size with the most tokens a second; one larger where a tree ended too soon.

        The larger one is tried even if the present one does not pay: where any tree is dear, long
        copies may pay although short ones do not.
        """
        if more and self._size + 1 < len(SIZES):
            self._size += 1
            return
        self._size = self._best(self.pace.costs())
        if self._size:
            self._rest = 0

    def _best(self, costs: Sequence[float]) -> int:
        worth = [gain / cost for gain, cost in zip(self._gains, costs, strict=True)]
        worth[0] = _MARGIN
        return max(range(len(SIZES)), key=lambda place: (worth[place], -place))


__all__ = ["SIZES", "AutoDrafter", "Pace"]
