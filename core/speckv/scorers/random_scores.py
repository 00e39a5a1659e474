"""Random entries, seeded per layer: the floor that every method has to beat."""

from __future__ import annotations

import torch

from .view import LayerView


def score(view: LayerView) -> torch.Tensor:
    """Uniform scores that depend only on the seed, the layer and the place in the row's prompt."""
    kv_heads, columns = view.key.shape[1:3]
    generator = torch.Generator().manual_seed(view.seed * 1009 + view.layer)
    draws = torch.rand(columns, kv_heads, generator=generator).to(view.key.device)
    place = (view.real.long().cumsum(-1) - 1).clamp(min=0)  # (batch, columns)
    return draws[place].transpose(1, 2)
