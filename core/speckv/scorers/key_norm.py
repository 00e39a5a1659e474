"""Key norm (arXiv 2406.11430): keys of small L2 norm tend to get much attention, so they stay."""

from __future__ import annotations

import torch

from .view import LayerView


def score(view: LayerView) -> torch.Tensor:
    """Minus the norm of each key."""
    norms: torch.Tensor = torch.linalg.vector_norm(view.key.float(), dim=-1)
    return -norms
