"""SpecPC on bare token ids, as in the paper (arXiv 2506.08373, Algorithm 2): pool, rank, keep.

Prompts with passages go through `pipeline.py`, which ranks only passage tokens and keeps the rest.
"""

from __future__ import annotations

import torch

from ..config import SpecPC
from ..types import Selection
from .fitting import token_budget
from .ranking import distinct, pool, rank


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


def keep_with_window(ranked: torch.Tensor, count: int, window: int, capacity: int) -> torch.Tensor:
    """SpecPC on a bare prompt: the last `window` tokens first, then `ranked`, up to `capacity`.

    Returns:
        (min(count, capacity),) ascending indices.
    """
    newest = torch.arange(count - window, count, device=ranked.device)
    kept = distinct(torch.cat([newest, ranked]), count)[:capacity]
    return kept.sort().values
