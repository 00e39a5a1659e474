"""Kept tokens that the target reads at the positions they had (SpecPrefill, arXiv 2502.02789)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from ..errors import ModelError
from ..kv_cache.layers import StoppableCache
from ..kv_cache.prefill import Start, pad_left
from ..prompt.encoder import PromptTokens


def kept_places(tokens: PromptTokens, kept: Iterable[tuple[int, int, int]]) -> torch.Tensor:
    """Where the tokens of kept characters stand in a prompt, and all that is protected.

    Args:
        tokens: The whole prompt.
        kept: (passage, start, end) characters of the passages.

    Returns:
        (kept,) int64 ascending.
    """
    stays = tokens.protected.clone()  # (tokens,)
    for passage, start, end in kept:
        stays |= (tokens.passage == passage) & (tokens.start < end) & (tokens.end > start)
    return torch.nonzero(stays).squeeze(1)


def start_at(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], places: Sequence[torch.Tensor | None]
) -> Start:
    """An empty cache and left-padded prompts, each token at a position of its own.

    Args:
        model: The target.
        prompts: (tokens,) int64 each.
        places: (tokens,) int64 positions of each prompt, ascending; None for 0, 1, 2, ...

    Raises:
        ModelError: The model's attention takes gaps between positions for borders of texts.
    """
    if "flash" in (own := str(model.config._attn_implementation)):
        raise ModelError(
            f'positions="keep" cannot be read with {own}: load the target with sdpa or eager.'
        )
    ids, mask = pad_left(prompts, model.device)
    each = [
        torch.arange(prompt.numel()) if place is None else place
        for prompt, place in zip(prompts, places, strict=True)
    ]
    return Start(StoppableCache(config=model.config), ids, mask, pad_left(each, model.device)[0])
