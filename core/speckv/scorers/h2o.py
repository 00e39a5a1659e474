"""H2O (arXiv 2306.14048): attention accumulated over all prompt queries, mean over the group.

Computed in blocks of queries, so that no N x N matrix ever exists.
"""

from __future__ import annotations

import torch

from ...errors import ModelError
from .view import LayerView

BLOCK = 256  # queries


def score(view: LayerView) -> torch.Tensor:
    """Sum of what each key got from every real query at or after it."""
    batch, kv_heads, columns, _ = view.key.shape
    if view.begin > 0:
        raise ModelError("h2o needs the attention of all queries: it does not work in a session.")
    total = torch.zeros(batch, kv_heads, columns, device=view.key.device)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        real = view.real[:, None, first:last, None]
        block = view.per_kv_head(view.attention(first, last) * real)
        total += block.sum(2)
    return total
