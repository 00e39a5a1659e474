"""Pure functions from scores and a budget to kept token indices (paper Algorithm 2)."""

from __future__ import annotations

import torch


def rank(
    pooled: torch.Tensor,
    scores: torch.Tensor,
    limit: int,
    neighbors: int,
    candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Order tokens by the moment at which SpecPC takes them.

    The `limit` best tokens by pooled score (ties: higher unpooled score, then lower index) each
    bring their neighbours, nearest first and left before right; a token counts once.

    Args:
        pooled: (tokens,) pooled scores.
        scores: (tokens,) scores before pooling.
        limit: How many tokens the caller may take at most.
        neighbors: Tokens a selected one brings, itself included, at least 1.
        candidates: (tokens,) bool, the tokens that compete; None means all.

    Returns:
        (ranked,) int64 distinct indices, best first.
    """
    count = pooled.numel()
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(pooled[by_score], descending=True, stable=True)]
    if candidates is not None:
        order = order[candidates[order]]
    offsets = neighbor_offsets(neighbors).to(pooled.device)
    spread = order[:limit, None] + offsets  # (limit, neighbors)
    ranked = distinct(spread.clamp(0, max(count - 1, 0)).reshape(-1), count)
    return ranked if candidates is None else ranked[candidates[ranked]]


def neighbor_offsets(neighbors: int) -> torch.Tensor:
    """Offsets -((n-1)//2) .. n//2 by distance, left before right at equal distance."""
    offsets = torch.arange(-((neighbors - 1) // 2), neighbors // 2 + 1)
    return offsets[torch.argsort(offsets.abs(), stable=True)]


def distinct(indices: torch.Tensor, count: int) -> torch.Tensor:
    """Drop repeats of indices in 0..count-1, keeping first appearances in order."""
    places = torch.arange(indices.numel(), device=indices.device)
    first = torch.full((count,), indices.numel(), device=indices.device)
    first = first.scatter_reduce(0, indices, places, "amin")
    found = torch.nonzero(first < indices.numel()).squeeze(1)
    return found[torch.argsort(first[found])]


def floor_first(groups: torch.Tensor, floor: int) -> torch.Tensor:
    """Move the first `floor` members of every group to the front; both parts keep their order.

    Args:
        groups: (units,) int64 group of each unit, the most wanted unit first.
        floor: Units that each group is sure of.

    Returns:
        (units,) int64 new order, as places in `groups`.
    """
    order = torch.argsort(groups, stable=True)
    _, sizes = torch.unique_consecutive(groups[order], return_counts=True)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)  # where each one's group begins
    place = torch.empty_like(order)  # (units,) members of the own group in front of it
    place[order] = torch.arange(len(order)) - first
    return torch.argsort((place >= floor).long(), stable=True)


def enough(masses: torch.Tensor, share: float) -> int:
    """How many units, taken in order, hold at least a share of the whole mass.

    Args:
        masses: (units,) not negative, the most wanted unit first.
        share: In (0, 1].
    """
    total = masses.double().cumsum(0)
    if not len(total) or float(total[-1]) <= 0.0:
        return len(total)
    reached = torch.nonzero(total >= share * total[-1]).squeeze(1)
    return int(reached[0]) + 1


def keep_with_window(ranked: torch.Tensor, count: int, window: int, capacity: int) -> torch.Tensor:
    """SpecPC on a bare prompt: the last `window` tokens first, then `ranked`, up to `capacity`.

    Returns:
        (min(count, capacity),) ascending indices.
    """
    newest = torch.arange(count - window, count, device=ranked.device)
    kept = distinct(torch.cat([newest, ranked]), count)[:capacity]
    return kept.sort().values
