"""Attention from the last prompt tokens and the lookahead.

With the draft's lookahead this is SpecKV (arXiv 2506.08373, Algorithm 1), without one SnapKV's rule
(arXiv 2404.14469), with pseudo tokens from the compressed target LAQ's (arXiv 2505.20334).
"""

from __future__ import annotations

import torch

from .view import LayerView


def score(view: LayerView) -> torch.Tensor:
    """Best or mean attention over the observing rows and the heads of the group."""
    probabilities = view.attention(view.queries - view.rows, view.queries)
    grouped = view.per_kv_head(probabilities * view.observes[:, None, :, None])
    if view.reduction == "max":
        return grouped.amax(2)
    terms = view.observes.sum(1) * (grouped.shape[2] // view.rows)  # (batch,)
    return grouped.sum(2) / terms[:, None, None]
