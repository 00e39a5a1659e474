"""Stored passages stand behind each other: their keys are turned from one position to another.

Rotary embeddings compose (arXiv 2104.09864, equation 16): a key that was read at one position and
is turned by a difference is that key at the position plus the difference.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ...kv_cache.layers import StoppableCache, full_states
from .reading import Beginning

_COMPOSE = frozenset({"default", "linear", "llama3"})  # frequencies that no length changes
_SHIFT = 64  # positions by which the beginning is moved on trial
_MOST = (
    0.1  # error of a key, as a share of its length; low precision stays below, other ways do not
)


def differences(lengths: tuple[int, ...], piece: int) -> torch.Tensor:
    """(tokens,) int64: how far each stored token moves when passages stand behind each other.

    Args:
        lengths: Tokens of each passage.
        piece: Most tokens of a passage that were read at once; each piece began anew.
    """
    read_at = [torch.arange(length) % piece for length in lengths]
    return torch.arange(sum(lengths)) - torch.cat([torch.arange(0), *read_at])


def turned(model: PreTrainedModel, keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Keys as they would be at other positions.

    Args:
        model: One that `can_move` holds for.
        keys: (1, kv_heads, tokens, width).
        by: (tokens,) int64, differences of positions.
    """
    cos, sin = _rotary(model)(keys, by[None].to(keys.device))  # (1, tokens, rotated width)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    part, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    moved = part * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([moved, rest], dim=-1)


def can_move(model: PreTrainedModel, ids: torch.Tensor, beginning: Beginning) -> bool:
    """Whether turned keys are those that the model itself has at other positions, in all layers.

    Args:
        model: The draft.
        ids: (prefix,) int64 of the beginning.
        beginning: What the draft made of it.
    """
    rotary = _rotary(model)
    kind = getattr(rotary, "rope_type", None)  # a mapping where layers differ
    if not isinstance(kind, str) or kind not in _COMPOSE or rotary.attention_scaling != 1.0:
        return False
    cache, by = StoppableCache(config=model.config), torch.full((len(ids),), _SHIFT)
    places = (torch.arange(len(ids)) + _SHIFT)[None].to(model.device)
    with torch.no_grad():
        model.get_decoder()(
            input_ids=ids[None].to(model.device),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
    return all(
        float((turned(model, keys, by) - there).norm()) <= _MOST * float(there.norm())
        for (keys, _), (there, _) in zip(beginning.states, full_states(cache), strict=True)
    )


def _rotary(model: PreTrainedModel) -> Any:
    return getattr(model.get_decoder(), "rotary_emb", None)
