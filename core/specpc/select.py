"""SpecPC, prompt compression by draft attention (arXiv 2506.08373, Algorithm 2).

read -> pool -> rank -> keep. `select` is the paper's method on bare token ids; prompts with
passages go through `compressor.py`, which ranks only passage tokens and keeps the rest.
"""

from __future__ import annotations

import torch

from ..config import SpecPC
from ..types import Selection
from .scoring import pool
from .selection import keep_with_window, rank


def select(scores: torch.Tensor, options: SpecPC) -> Selection:
    """Choose the tokens of a bare prompt that reach the target.

    The newest W tokens always stay, then the best-scored tokens with their neighbours. W is cut
    to the capacity and to the prompt; a ratio counts all tokens.

    Args:
        scores: (tokens,) float32 from `read_draft`.
        options: Budget, pooling and neighbours.

    Returns:
        Ascending kept indices, min(tokens, capacity) of them, and the pooled scores.
    """
    count = scores.numel()
    capacity = token_budget(options, count)
    pooled = pool(scores, options.kernel_size, options.pool)
    if capacity >= count:
        return Selection(torch.arange(count), pooled)
    window = min(options.window_size, capacity, count)
    ranked = rank(pooled, scores, capacity, options.neighbors)
    return Selection(keep_with_window(ranked, count, window, capacity), pooled)


def token_budget(options: SpecPC, count: int) -> int:
    """The one place where a budget becomes an integer: `capacity`, or a share of `count`."""
    if options.ratio is None:
        assert options.capacity is not None  # the options' validator sets one of the two
        return options.capacity
    return max(1, round(count * options.ratio))
