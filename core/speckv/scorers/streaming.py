"""StreamingLLM (arXiv 2309.17453): the first tokens and the newest ones, whatever they say."""

from __future__ import annotations

import torch

from .view import LayerView

SINKS = 4


def score(view: LayerView) -> torch.Tensor:
    """The first four tokens of a prompt first, then the newest."""
    place = view.real.long().cumsum(-1) - 1  # (batch, columns) position in the row's own prompt
    sinks = (place < SINKS) & view.real
    values = torch.where(sinks, place + view.real.shape[1], place).float()
    return values.unsqueeze(1).expand(-1, view.key.shape[1], -1)
