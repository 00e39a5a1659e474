"""Graph-structured speculative decoding (arXiv 2407.16207): paths that meet again share their rest.

The draft model grows a graph: where a token turns up that was guessed elsewhere, behind the same
token before it, the earlier node's continuations are used again instead of being drafted anew. For
verification the graph is unrolled to a tree, breadth first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from .model import DraftReader
from .tree import EMPTY, NODES, GrowingTree, TokenTree

BRANCHES = 4  # most children of a node
RELATIVE = 0.7  # a child is at least this likely, as a share of the likeliest one
SURE = 0.3  # less likely tokens are kept but not expanded


@dataclass(slots=True, eq=False)
class _Node:
    token: int
    line: tuple[_Node, ...]  # ancestors, root first
    number: int = -1  # in the draft, once read
    children: list[_Node] = field(default_factory=list)


class GraphDrafter:
    """Drafts a graph with the draft model and unrolls it.

    Args:
        model: The draft; its tokens must be the target's.
        prompt: (tokens,) int64, what the target reads.
        depth: Most levels of the graph, each a pass of the draft.
        recent: Ancestors that two nodes of one token must share to be one (r of the paper).
        nodes: Most nodes of the unrolled tree.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: torch.Tensor,
        *,
        depth: int = 12,
        recent: int = 1,
        nodes: int = NODES,
    ) -> None:
        self.draft = DraftReader(model, prompt)
        self.depth, self.recent, self.nodes = depth, recent, nodes

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        probabilities = self.draft.catch_up(context, self.depth)
        if probabilities is None:
            return EMPTY
        root = _Node(context[-1], ())
        known: dict[tuple[int, ...], _Node] = {}
        frontier, following = [root], probabilities.unsqueeze(0)
        for level in range(self.depth):
            fresh = [
                node
                for parent, chances in zip(frontier, following, strict=True)
                for node in self._branch(parent, chances, known)
            ]
            if not fresh or level + 1 == self.depth or len(known) >= self.nodes:
                break
            edges = [(node.line[-1].number, node.token) for node in fresh]
            numbers, following = self.draft.read(edges)
            for node, number in zip(fresh, numbers, strict=True):
                node.number = number
            frontier = fresh
        return _unroll(root, self.nodes, self.depth)

    def observe(self, accepted: Sequence[int]) -> None:
        """See `Drafter.observe`."""
        self.draft.observe(accepted)

    def _branch(
        self, parent: _Node, chances: torch.Tensor, known: dict[tuple[int, ...], _Node]
    ) -> list[_Node]:
        """Give a node its children; returns those that are new and likely enough to go on."""
        best = chances.topk(min(BRANCHES, chances.numel()))  # (branches,)
        grow = []
        line = (*parent.line, parent)
        for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if chance < RELATIVE * float(best.values[0]):
                break
            before = line[len(line) - self.recent :] if self.recent else ()
            identity = (token, *(node.token for node in before))
            found = known.get(identity)
            if found is None or found in line:  # a node is never its own descendant
                found = _Node(token, line)
                known.setdefault(identity, found)
                if chance >= SURE:
                    grow.append(found)
            parent.children.append(found)
        return grow


def _unroll(root: _Node, nodes: int, depth: int) -> TokenTree:
    """The graph as a tree, breadth first."""
    grown, waiting = GrowingTree(nodes), deque([(root, -1, 0)])
    while waiting:
        node, place, level = waiting.popleft()
        if level == depth:
            continue
        for child in node.children:
            under = grown.add(place, child.token)
            if under < 0:
                return grown.tree()
            waiting.append((child, under, level + 1))
    return grown.tree()
