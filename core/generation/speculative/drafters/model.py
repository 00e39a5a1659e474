"""The draft model guesses ahead of the target: a tree of its likeliest continuations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ....errors import ModelError
from ....kv_cache.prefill import from_scratch
from ..tree_attention import TreeReader, obstacle
from .tree import EMPTY, NODES, GrowingTree, TokenTree, best_first


class DraftReader:
    """A draft model that has read what the target has said, and reads guesses behind it.

    Args:
        model: The draft; its tokens must be the target's.
        prompt: (tokens,) int64, what the target reads. It is read here, which takes a while.

    Raises:
        ModelError: The draft cannot read trees.
    """

    def __init__(self, model: PreTrainedModel, prompt: torch.Tensor) -> None:
        start = from_scratch(model, [prompt])
        if (reason := obstacle(model, start.cache)) is not None:
            raise ModelError(f"This draft cannot propose trees: {reason}.")
        with torch.no_grad():
            model.get_decoder()(
                input_ids=start.feed,
                attention_mask=start.mask,
                position_ids=start.positions,
                past_key_values=start.cache,
                use_cache=True,
            )
        self.reader = TreeReader(model, start.cache, start.mask)
        self._children: dict[tuple[int, int], int] = {}  # (parent, token) of what is read -> node
        self._read = 0  # nodes read and not kept

    def catch_up(self, context: Sequence[int], room: int) -> torch.Tensor | None:
        """Read what the target has said since; (vocabulary,) probabilities of what follows.

        None where the draft's window has no room for `room` more tokens.
        """
        unread = list(context[self.reader.length :])
        if self.reader.room() < len(unread) + room:
            return None
        logits = self.reader.read(unread, range(-1, len(unread) - 1))
        self.reader.keep(range(len(unread)))
        return logits[-1].float().softmax(-1)

    def read(self, edges: Sequence[tuple[int, int]]) -> tuple[list[int], torch.Tensor]:
        """Read guesses.

        Args:
            edges: (parent, token) of each; -1 for a guess of the next token, else a number that
                an earlier call returned.

        Returns:
            Their numbers, and (guesses, vocabulary) probabilities of what follows each.
        """
        numbers = list(range(self._read, self._read + len(edges)))
        self._read += len(edges)
        self._children.update(zip(edges, numbers, strict=True))
        logits = self.reader.read([token for _, token in edges], [parent for parent, _ in edges])
        return numbers, logits.float().softmax(-1)

    def observe(self, accepted: Sequence[int]) -> None:
        """Keep the guesses that came true, forget the others; the newest token is read later."""
        path: list[int] = []
        for token in accepted[:-1]:
            found = self._children.get((path[-1] if path else -1, token))
            if found is None:
                break
            path.append(found)
        if self._read:
            self.reader.keep(path)
        self._children, self._read = {}, 0


class ModelDrafter:
    """Grows a tree level by level: of all next tokens the `width` likeliest paths go on.

    Args:
        model: The draft; its tokens must be the target's.
        prompt: (tokens,) int64, what the target reads.
        depth: Most tokens of a path; each costs a pass of the draft.
        width: Paths that go on at each level; 1 for a chain.
        floor: Paths that the draft finds less likely end.
        nodes: Most nodes of the tree.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: torch.Tensor,
        *,
        depth: int = 6,
        width: int = 3,
        floor: float = 0.05,
        nodes: int = NODES,
    ) -> None:
        self.draft = DraftReader(model, prompt)
        self.depth, self.width, self.floor, self.nodes = depth, width, floor, nodes

    def propose(self, context: Sequence[int]) -> TokenTree:
        """See `Drafter.propose`."""
        probabilities = self.draft.catch_up(context, self.depth)
        if probabilities is None:
            return EMPTY
        grown, worth = GrowingTree(self.nodes), list[float]()
        frontier = [(-1, -1, 1.0)]  # number in the draft, node of the tree, probability of the path
        following = probabilities.unsqueeze(0)  # (paths, vocabulary)
        for level in range(self.depth):
            chances = following * torch.tensor([[p] for *_, p in frontier], device=following.device)
            best = chances.flatten().topk(min(self.width, chances.numel()))
            edges, nodes = list[tuple[int, int]](), list[tuple[int, float]]()
            for place, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                number, parent, _ = frontier[place // chances.shape[1]]
                if chance < self.floor or len(grown) >= self.nodes:
                    continue
                token = place % chances.shape[1]
                nodes.append((grown.add(parent, token), chance))
                worth.append(chance)
                edges.append((number, token))
            if not edges or level + 1 == self.depth:
                break
            numbers, following = self.draft.read(edges)
            frontier = [(number, *node) for number, node in zip(numbers, nodes, strict=True)]
        return best_first(grown.tree(), worth)

    def observe(self, accepted: Sequence[int]) -> None:
        """See `Drafter.observe`."""
        self.draft.observe(accepted)
