"""SpecPrefill's rule (arXiv 2502.02789): chunks that the draft's lookahead attends to.

The draft guesses eight tokens. At each step the attention of the newest query over the prompt is
averaged over 13 neighbours, its maximum over layers and heads is taken, and the mean over steps is
the score of a token; the chunks of 32 tokens with the highest mean stay, at their original
positions. Here only passages compete, and the last prompt token is the first of the queries.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..errors import ModelError
from ..kv_cache.greedy import guess
from ..models.attention_capture import AttentionCall, observing
from ..prompt.encoder import PromptTokens
from .baselines import Kept

LOOKAHEAD, KERNEL, CHUNK = 8, 13, 32


def read(model: PreTrainedModel, ids: torch.Tensor, lookahead: int = LOOKAHEAD) -> torch.Tensor:
    """Importance of every prompt token.

    Args:
        model: The draft.
        ids: (tokens,) int64.
        lookahead: Tokens guessed; an end token stops.

    Returns:
        (tokens,) float32.
    """
    steps = _Steps(ids.numel())
    with torch.no_grad(), observing(model, steps):
        guess(model, ids.unsqueeze(0), lookahead)
    if not steps.scores:
        raise ModelError("No attention layer of the draft could be observed: choose another draft.")
    return torch.stack(steps.scores).mean(0)


def keep_chunks(tokens: PromptTokens, scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Which tokens stay: all that is protected, and the best chunks of passages.

    Args:
        tokens: The prompt.
        scores: (tokens,) float32.
        budget: Most passage tokens; a chunk that does not fit is passed over.

    Returns:
        (tokens,) bool.
    """
    competing = ~tokens.protected
    size = len(tokens)
    chunk = torch.arange(size) // CHUNK
    count = torch.zeros(int(chunk[-1]) + 1).index_add(0, chunk, competing.float())
    total = torch.zeros_like(count).index_add(0, chunk, scores * competing)
    means = torch.where(count > 0, total / count.clamp(min=1), -1.0)
    kept = tokens.protected.clone()
    left = budget
    for index in means.argsort(descending=True, stable=True).tolist():
        if 0 < count[index] <= left:
            kept |= chunk == index
            left -= int(count[index])
    return kept


def kept_characters(tokens: PromptTokens, kept: torch.Tensor, passages: int) -> Kept:
    """The characters of every passage that kept tokens stand for."""
    spans: list[set[tuple[int, int]]] = [set() for _ in range(passages)]
    for place in torch.nonzero(kept & ~tokens.protected).squeeze(1).tolist():
        spans[int(tokens.passage[place])].add((int(tokens.start[place]), int(tokens.end[place])))
    return tuple(tuple(sorted(own)) for own in spans)


class _Steps:
    """Attention callback: one score per prompt token and draft step."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.scores: list[torch.Tensor] = []  # a step each, (prompt,)
        self.layer = -1
        self.seen = prompt

    def __call__(self, call: AttentionCall) -> None:
        if call.layer <= self.layer or not self.scores:  # the first layer of a new step
            self.seen = self.prompt + len(self.scores)
            self.scores.append(torch.zeros(self.prompt))
        self.layer = call.layer
        padding = torch.ones((1, self.seen), dtype=torch.bool, device=call.key.device)
        probabilities, first = call.probabilities(padding, rows=1, before=self.prompt)
        smooth = functional.avg_pool1d(  # (heads, 1, keys)
            probabilities[0], KERNEL, stride=1, padding=KERNEL // 2
        )
        best = smooth[:, 0].amax(0).cpu()  # (keys,)
        inside = best[: self.prompt - first]
        part = self.scores[-1][first : first + len(inside)]
        part.copy_(torch.maximum(part, inside))
