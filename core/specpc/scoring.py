"""Pure tensor functions from attention to one score per prompt token (paper Algorithm 2)."""

from __future__ import annotations

import torch

from ..config import Reduction


def row_weights(lengths: torch.Tensor, window: int, weighted: bool) -> torch.Tensor:
    """Weights of the last `window` query rows of left-padded prompts.

    The W = min(window, length) real rows of a prompt get j / (W - 1) from the oldest (0) to the
    newest (1) if weighted, else 1; rows that are padding get 0.

    Args:
        lengths: (batch,) real tokens a row.
        window: Number of rows read.
        weighted: SpecPC's `weighted_query`.

    Returns:
        (batch, window) float32.
    """
    real = lengths.clamp(max=window).unsqueeze(1)  # (batch, 1)
    place = torch.arange(window, device=lengths.device) - (window - real)  # (batch, window)
    weights = torch.where(real > 1, place / (real - 1).clamp(min=1), 1.0) if weighted else 1.0
    return (place >= 0).float() * weights


def reduce_rows(probabilities: torch.Tensor, weights: torch.Tensor, how: Reduction) -> torch.Tensor:
    """Merge heads and rows of one layer: (batch, heads, rows, keys) -> (batch, keys).

    "mean" is a plain sum, as in the authors' code: the number of terms is the same for all tokens.
    "mean-max" is the mean over heads, then the maximum over rows.
    """
    weighted = probabilities * weights[:, None, :, None]
    if how == "mean-max":
        return weighted.mean(1).amax(1)
    return weighted.amax(dim=(1, 2)) if how == "max" else weighted.sum(dim=(1, 2))


def reduce_heads(
    probabilities: torch.Tensor, weights: torch.Tensor, heads: torch.Tensor
) -> torch.Tensor:
    """The strongest weighted row of each head, then the heads' sum by learned weights.

    Args:
        probabilities: (batch, heads, rows, keys) of one layer.
        weights: (batch, rows) of the rows.
        heads: (heads,) of the heads, any sign.

    Returns:
        (batch, keys) float32.
    """
    strongest = (probabilities * weights[:, None, :, None]).amax(2)  # (batch, heads, keys)
    return torch.einsum("bhk,h->bk", strongest, heads)
