"""TOVA (arXiv 2401.06104): attention of the last prompt token, mean over all heads of the layer."""

from __future__ import annotations

import torch

from .view import LayerView


def score(view: LayerView) -> torch.Tensor:
    """The same scores for every KV head."""
    last = view.key.shape[2] - 1
    mean = view.attention(last, last + 1).mean(dim=(1, 2))  # (batch, columns)
    return mean.unsqueeze(1).expand(-1, view.key.shape[1], -1)
