"""Two ways to grow a tree from tri-grams: ADED's PUCT search, and plain best-first expansion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import log, sqrt
from random import Random

from .tree import NODES, GrowingTree, TokenTree

Following = tuple[tuple[int, float], ...]  # (token, weight) each, heaviest first
Successors = Callable[[int, int], Following]  # of a pair of tokens

ITERATIONS = 150
PATHS = 24  # most visited paths that are kept
C1, C2 = 32.0, 8.0  # exploration constants of the published code
ROLLOUT = 3  # tokens behind the root that a rollout looks at


@dataclass(slots=True)
class _Node:
    """A guessed token in the search; `path` are the tokens from the root to it."""

    first: int
    second: int
    path: tuple[int, ...]
    reached: float = 0.0  # weights of the tri-grams along the path
    prior: float = 0.0
    visits: int = 0
    score: float = 0.0
    children: list[_Node] = field(default_factory=list)
    tried: int = 0  # children that were visited, from the first on
    expanded: bool = False


def puct(
    successors: Successors, first: int, second: int, nodes: int = NODES, seed: int = 0
) -> TokenTree:
    """Monte Carlo tree search (ADED section 3.2): 150 rollouts, 24 paths of at most 4 tokens.

    A child is chosen by Q + (c1 + ln((N + c2 + 1) / c2)) P sqrt(N) / (1 + n), unvisited ones
    first; a rollout's value is 1 plus the weights of its tri-grams. The published code looks up
    another tri-gram than the one passed, which makes all values alike; this one does not.

    Args:
        successors: The store's, or anything like it.
        first: The context's token before the last.
        second: Its last token.
        nodes: Most nodes of the tree.
        seed: Of the rollouts. What is drafted never changes what is answered.
    """
    known: dict[tuple[int, int], Following] = {}

    def after(one: int, two: int) -> Following:
        found = known.get((one, two))
        if found is None:
            found = known[one, two] = successors(one, two)
        return found

    random, root = Random(seed), _Node(first, second, ())
    found: list[_Node] = []
    for _ in range(ITERATIONS):
        trail = [root]
        while trail[-1].expanded and trail[-1].children:
            trail.append(_choose(trail[-1]))
        if not trail[-1].expanded:
            leaf = trail[-1]
            _expand(leaf, after)
            found.extend(leaf.children)
            if leaf.children:
                trail.append(_choose(leaf))
        value = 1.0 + _rollout(trail[-1], after, random)
        for node in trail:
            node.visits += 1
            node.score += value
    visited = sorted((n for n in found if n.visits), key=lambda n: (-n.visits, -n.reached))
    return TokenTree.from_paths(_extended(visited[:PATHS], after), nodes)


def _choose(node: _Node) -> _Node:
    if node.tried < len(node.children):
        node.tried += 1
        return node.children[node.tried - 1]
    growth = (C1 + log((node.visits + C2 + 1) / C2)) * sqrt(node.visits)
    best, most = node.children[0], -1.0
    for child in node.children:
        visits = child.visits
        worth = child.score / visits + growth * child.prior / (1 + visits)
        if worth > most:
            best, most = child, worth
    return best


def _expand(node: _Node, after: Successors) -> None:
    node.expanded = True
    if len(node.path) < ROLLOUT:
        node.children = [
            _Node(node.second, token, (*node.path, token), node.reached + weight, weight)
            for token, weight in after(node.first, node.second)
        ]


def _rollout(node: _Node, after: Successors, random: Random) -> float:
    """Weights along the path to the node, and along a random walk from it."""
    total, first, second = node.reached, node.first, node.second
    for _ in range(ROLLOUT - len(node.path)):
        following = after(first, second)
        if not following:
            break
        rest = random.random() * sum(weight for _, weight in following)
        for token, weight in following:
            rest -= weight
            if rest <= 0:
                total, first, second = total + weight, second, token
                break
    return total


def _extended(nodes: list[_Node], after: Successors) -> Iterator[tuple[int, ...]]:
    """Each path with the single heaviest token behind it."""
    for node in nodes:
        following = after(node.first, node.second)
        yield (*node.path, following[0][0]) if following else node.path


def best_first(
    successors: Successors,
    first: int,
    second: int,
    nodes: int = NODES,
    depth: int = 8,
    floor: float = 0.05,
) -> TokenTree:
    """The nodes with the largest product of shares, a node's share being of its siblings' weight.

    Args:
        successors: The store's, or anything like it.
        first: The context's token before the last.
        second: Its last token.
        nodes: Most nodes of the tree.
        depth: Most tokens of a path.
        floor: Least share of a node; what is less likely costs the target more than it gives.
    """
    tree, order = GrowingTree(nodes), count()
    heap: list[tuple[float, int, int, int, int, int]] = []  # -share, order, parent, depth, pair

    def push(share: float, parent: int, level: int, one: int, two: int) -> None:
        following = successors(one, two)
        scale = share / (sum(weight for _, weight in following) or 1.0)
        for token, weight in following:
            if weight * scale < floor or weight <= 0:
                break  # the others are lighter
            heappush(heap, (-weight * scale, next(order), parent, level, two, token))

    push(1.0, -1, 1, first, second)
    while heap and len(tree) < nodes:
        share, _, parent, level, one, two = heappop(heap)
        node = tree.add(parent, two)
        if level < depth and share < -floor:
            push(-share, node, level + 1, one, two)
    return tree.tree()
