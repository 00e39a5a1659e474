"""SpecKV for a batch: prompts are read side by side or apart, and decoded side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..config import SpecKV
from ..kv_cache.batch import join_evicted
from ..kv_cache.prefill import Start, passes_of
from ..kv_cache.prefix import Memory
from .evict import evict


def start_evicted(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    lookaheads: Sequence[torch.Tensor],
    options: SpecKV,
    capacities: Sequence[int],
    protected: Sequence[torch.Tensor],
    memory: Memory | None = None,
) -> Start:
    """Where decoding goes on once `evict` has read the prompts; takes the same arguments.

    Uneven budgets are shared out in one pass over all prompts, because heads of equal length are
    stored together.
    """
    lengths = [a.numel() + b.numel() for a, b in zip(prompts, lookaheads, strict=True)]
    passes = passes_of(model, lengths)
    if len(passes) == 1 or options.uneven:
        passes = [list(range(len(prompts)))]
    starts = [
        evict(
            model,
            [prompts[row] for row in rows],
            [lookaheads[row] for row in rows],
            options,
            [capacities[row] for row in rows],
            [protected[row] for row in rows],
            memory,
        ).start
        for rows in passes
    ]
    return starts[0] if len(starts) == 1 else _side_by_side(starts, passes)


def _side_by_side(starts: Sequence[Start], passes: Sequence[Sequence[int]]) -> Start:
    """Rows at their places, all ending in the same column."""
    slots = [start.cache.get_mask_sizes(0, 0)[0] for start in starts]
    cache = join_evicted([start.cache for start in starts], passes)  # empties the parts
    columns = max(start.mask.shape[1] for start in starts)
    batch = sum(map(len, passes))
    mask = starts[0].mask.new_zeros(batch, columns)
    feed, positions = mask.new_zeros(batch, 1), mask.new_zeros(batch, 1)
    for start, rows, filled in zip(starts, passes, slots, strict=True):
        places = list(rows)
        feed[places], positions[places] = start.feed, start.positions
        kept = start.mask[:, -1 - filled :]  # the slots and the token fed again
        mask[places, columns - kept.shape[1] :] = kept
    return Start(cache, feed, mask, positions)
