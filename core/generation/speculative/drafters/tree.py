"""What a drafter proposes, and what it is told: the contract of every file in this folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

NODES = 64  # nodes of a tree unless told otherwise, as in ADED (arXiv 2407.12021)


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Guessed continuations of a context, merged where they begin alike.

    Nodes stand best first and every node behind its parent, so that any number of first nodes is
    a tree too. Siblings carry different tokens.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()  # index of the node before; -1: the last token of the context
    depths: tuple[int, ...] = ()  # 1 for a guess of the next token, 2 for the one behind it, ...

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> TokenTree:
        """A single continuation."""
        size = len(tokens)
        return cls(tuple(tokens), tuple(range(-1, size - 1)), tuple(range(1, size + 1)))

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]], nodes: int = NODES) -> TokenTree:
        """Merge continuations, best first, until `nodes` nodes are used."""
        grown = GrowingTree(nodes)
        for path in paths:
            node = -1
            for token in path:
                if (node := grown.add(node, token)) < -1:
                    return grown.tree()
        return grown.tree()

    def cut(self, *, nodes: int | None = None, depth: int | None = None) -> TokenTree:
        """The first `nodes` nodes, without those deeper than `depth`."""
        short = self
        if nodes is not None and nodes < len(self):
            nodes = max(0, nodes)
            short = TokenTree(self.tokens[:nodes], self.parents[:nodes], self.depths[:nodes])
        if depth is None or max(short.depths, default=0) <= depth:
            return short
        kept = [node for node, own in enumerate(short.depths) if own <= depth]
        place = {-1: -1} | {node: new for new, node in enumerate(kept)}
        return TokenTree(
            tuple(short.tokens[node] for node in kept),
            tuple(place[short.parents[node]] for node in kept),
            tuple(short.depths[node] for node in kept),
        )

    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node."""
        edges = zip(self.parents, self.tokens, strict=True)
        return {edge: node for node, edge in enumerate(edges)}

    def follow(self, tokens: Iterable[int]) -> list[int]:
        """The nodes that carry `tokens` one after the other, as far as the tree goes."""
        children, path, node = self.children(), [], -1
        for token in tokens:
            found = children.get((node, token))
            if found is None:
                break
            path.append(node := found)
        return path


EMPTY = TokenTree()


class GrowingTree:
    """Nodes on their way to a `TokenTree`."""

    def __init__(self, nodes: int) -> None:
        self.limit = nodes
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, parent: int, token: int) -> int:
        """The node of `token` below `parent`, new or not; -2 if there is no room for it."""
        found = self._children.get((parent, token))
        if found is not None:
            return found
        if len(self._tokens) >= self.limit:
            return -2
        node = self._children[parent, token] = len(self._tokens)
        self._tokens.append(token)
        self._parents.append(parent)
        self._depths.append(1 if parent < 0 else self._depths[parent] + 1)
        return node

    def tree(self) -> TokenTree:
        """What has grown so far."""
        return TokenTree(tuple(self._tokens), tuple(self._parents), tuple(self._depths))


class Drafter(Protocol):
    """Guesses what the target will say. Lives as long as one request and one thread at a time."""

    def propose(self, context: Sequence[int]) -> TokenTree:
        """Guess continuations of what the target has read and said.

        Args:
            context: Prompt and answer so far as the target's token ids, the newest token last. A
                live view: read it, do not keep or change it.

        Returns:
            A tree, empty where there is nothing to guess from.
        """

    def observe(self, accepted: Sequence[int]) -> None:
        """Learn what the target said next: called after each of its steps, in order.

        Args:
            accepted: At least one token: the guesses that were right, and the one behind them.
        """


class UnionDrafter:
    """Several drafters under one node budget; their best nodes take turns.

    Args:
        drafters: In order of preference.
        nodes: Most nodes of the merged tree.
    """

    def __init__(self, drafters: Sequence[Drafter], nodes: int = NODES) -> None:
        self.drafters, self.nodes = drafters, nodes

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        trees = [drafter.propose(context) for drafter in self.drafters]
        trees = [tree for tree in trees if len(tree)]
        if len(trees) == 1:
            return trees[0].cut(nodes=self.nodes)
        return merge(trees, self.nodes)

    def observe(self, accepted: Sequence[int]) -> None:
        """See `Drafter.observe`."""
        for drafter in self.drafters:
            drafter.observe(accepted)


def merge(trees: Sequence[TokenTree], nodes: int = NODES) -> TokenTree:
    """One tree of several: first nodes first, taking turns, until `nodes` nodes are used."""
    grown = GrowingTree(nodes)
    places: list[dict[int, int]] = [{-1: -1} for _ in trees]
    for node in range(max(map(len, trees), default=0)):
        for tree, place in zip(trees, places, strict=True):
            if node >= len(tree):
                continue
            place[node] = grown.add(place[tree.parents[node]], tree.tokens[node])
            if place[node] < 0:
                return grown.tree()
    return grown.tree()


def best_first(tree: TokenTree, worth: Sequence[float]) -> TokenTree:
    """Sort nodes by worth, descending; no node may be worth more than its parent."""
    order = sorted(range(len(tree)), key=lambda node: (-worth[node], tree.depths[node], node))
    place = {-1: -1} | {node: new for new, node in enumerate(order)}
    return replace(
        tree,
        tokens=tuple(tree.tokens[node] for node in order),
        parents=tuple(place[tree.parents[node]] for node in order),
        depths=tuple(tree.depths[node] for node in order),
    )
