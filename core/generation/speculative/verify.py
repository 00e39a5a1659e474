"""Lossless decoding with drafts: several tokens a forward pass, the same as without them.

One pass reads the newest token and the drafter's tree. Then tokens are chosen one after the other
as in plain decoding, by the same sampler with the same draws, each from the logits of the node
that carries the token before; the walk ends at the first token that no child carries. So greedy
answers are the plain ones, and sampled ones follow the plain distribution (and equal the plain
ones with the same seed) as far as a pass over several tokens gives the same logits as passes over
one: exactly in theory, up to rounding in practice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...runtime.limits import check_deadline
from ...types import Drafting
from .drafters.tree import Drafter
from .tree_attention import TreeReader

Choose = Callable[[torch.Tensor], int]  # (vocabulary,) logits -> token; called once for each token


@dataclass(slots=True)
class Tally:
    """What verification has counted so far, and how long the last pass took."""

    forwards: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0  # spent on proposing and observing
    note: str | None = None  # why nothing is drafted
    last_nodes: int = 0
    last_seconds: float = 0.0

    def value(self) -> Drafting:
        """The counts as a frozen value."""
        return Drafting(
            self.forwards, self.tokens, self.drafted, self.accepted, self.seconds, self.note
        )


@dataclass(frozen=True, slots=True)
class Speculation:
    """A drafter and what is counted of it; both belong to one request."""

    drafter: Drafter
    tally: Tally


def verified_tokens(
    reader: TreeReader,
    choose: Choose,
    speculation: Speculation,
    prompt: Sequence[int],
    first: int,
    limit: int,
) -> Iterator[int]:
    """Decode behind a prompt and its first token; close the iterator to stop.

    Args:
        reader: The target, which has read the prompt.
        choose: The sampler.
        speculation: The drafter, which may guess nothing.
        prompt: Token ids that the target has read.
        first: The first token of the answer, chosen but not read.
        limit: Most tokens to yield.

    Yields:
        The tokens behind `first`.
    """
    drafter, tally = speculation.drafter, speculation.tally
    context, fresh, produced = [*prompt, first], [first], 0
    try:
        while produced < limit:
            check_deadline()
            began = time.perf_counter()
            drafter.observe(fresh)
            fresh = []
            depth = min(limit - produced - 1, reader.room() - 1)
            tree = drafter.propose(context).cut(depth=depth)
            asked = time.perf_counter()
            parents = [-1, *(parent + 1 for parent in tree.parents)]  # node 0: the newest token
            logits = reader.read([context[-1], *tree.tokens], parents)
            token = choose(logits[0])  # waits for the device, so that the time is the pass's
            _count(tally, len(tree), asked - began, time.perf_counter() - asked)
            children, path = tree.children(), [0]
            while True:
                produced += 1
                tally.tokens += 1
                fresh.append(token)
                context.append(token)
                yield token
                child = children.get((path[-1] - 1, token))
                if child is None or produced >= limit:
                    break
                tally.accepted += 1
                path.append(child + 1)
                token = choose(logits[path[-1]])
            reader.keep(path)
    finally:
        if fresh:
            drafter.observe(fresh)


def _count(tally: Tally, nodes: int, proposing: float, reading: float) -> None:
    tally.forwards += 1
    tally.drafted += nodes
    tally.seconds += proposing
    tally.last_nodes, tally.last_seconds = nodes, reading
