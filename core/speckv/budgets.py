"""How many KV entries each layer and each KV head may keep; pure functions.

Every row's budget is C entries a layer and head on average. What is protected (or the window) is
kept everywhere; only the rest of the budget is moved between layers or heads, so that the total
stays the same to the entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def layer_budgets(
    capacity: int, fixed: int, candidates: int, layers: int, slope: float
) -> list[int]:
    """Entries a head of each layer, falling linearly from the first layer to the last.

    As in PyramidKV (arXiv 2406.02069): lower layers spread their attention more. Before rounding
    and limits, entries beyond the fixed ones go from (1 + slope) to (1 - slope) of their mean; its
    beta is 1 / (1 - slope).

    Args:
        capacity: C, the mean over layers.
        fixed: Protected entries of the prompt, kept in every layer; at most C.
        candidates: Entries that compete; no layer can keep more.
        layers: Number of layers that evict.
        slope: 0 for even layers, up to 1.

    Returns:
        (layers,) numbers in fixed .. fixed + candidates; their sum is
        min(C, fixed + candidates) * layers.
    """
    spare = min(capacity - fixed, candidates) * layers
    fall = [1.0 - 2.0 * layer / max(1, layers - 1) for layer in range(layers)]  # 1 .. -1
    weights = [1.0 + slope * f if layers > 1 else 1.0 for f in fall]
    return [fixed + share for share in _divide(spare, weights, candidates)]


def _divide(total: int, weights: Sequence[float], most: int) -> list[int]:
    """Integers of sum `total`, as near to the weights as none above `most` allows."""
    shares = [0] * len(weights)
    open_ = list(range(len(weights)))
    while open_:
        room = sum(weights[i] for i in open_)
        exact = {i: total * (weights[i] / room if room else 1 / len(open_)) for i in open_}
        full = [i for i in open_ if exact[i] >= most]
        if not full:
            break
        for i in full:
            shares[i] = most
        total -= most * len(full)
        open_ = [i for i in open_ if i not in full]
    if not open_:
        return shares
    for i in open_:
        shares[i] = int(exact[i])
    left = total - sum(shares[i] for i in open_)
    for i in sorted(open_, key=lambda i: int(exact[i]) - exact[i])[:left]:
        shares[i] += 1
    return shares


def choose_entries(
    scores: torch.Tensor, fixed: torch.Tensor, budgets: torch.Tensor, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best entries of all heads of a layer together (Ada-KV, arXiv 2407.11550).

    First every head gets its protected entries and a share of its own best ones, then the best of
    what is left, whichever heads they belong to. Equal scores are shared out evenly.

    Args:
        scores: (batch, kv_heads, columns), -inf where an entry cannot be chosen.
        fixed: (batch, columns) bool, entries that every head keeps.
        budgets: (batch,) int64, entries a head on average, fixed ones included.
        floor: Share in 0..1 of the entries beyond the fixed ones that every head is sure of; 1
            gives all heads the same number.

    Returns:
        (batch, kv_heads, longest) int64 columns, ascending, unfilled slots in front; and
        (batch, kv_heads) int64, the filled slots. The latter sum to kv_heads * budget.
    """
    batch, heads, columns = scores.shape
    sure = ((budgets - fixed.sum(1)).double() * floor).round().long()  # (batch,)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(columns, device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    first = fixed.unsqueeze(1) | (rank < sure[:, None, None])
    wanted = scores.masked_fill(first, float("inf"))
    # columns outside, heads inside: a tie over heads is broken in favour of each head in turn
    flat = wanted.transpose(1, 2).reshape(batch, columns * heads)
    best = flat.argsort(dim=-1, descending=True, stable=True)
    taken = torch.arange(columns * heads, device=scores.device) < (budgets * heads).unsqueeze(1)
    chosen = torch.zeros_like(taken).scatter_(1, best, taken)
    kept = chosen.view(batch, columns, heads).transpose(1, 2)  # (batch, kv_heads, columns)
    counts = kept.sum(-1)
    ascending = torch.where(kept, place, -1).sort(-1).values
    return ascending[..., columns - int(counts.max()) :].clamp(min=0), counts
