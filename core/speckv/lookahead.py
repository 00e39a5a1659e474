"""What the target reads behind the prompt: the draft's guess, one of its own, or nothing."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..config import SpecKV
from ..kv_cache.greedy import greedy
from ..kv_cache.prefix import Memory
from .evict import evict
from .scorers import SCORERS

NOTHING = torch.tensor([], dtype=torch.int64)


def own_lookahead(
    target: PreTrainedModel,
    prompt: torch.Tensor,
    options: SpecKV,
    capacity: int,
    tokens: int,
    protected: torch.Tensor | None = None,
    memory: Memory | None = None,
) -> torch.Tensor:
    """The target's own lookahead, for scorers that do not ask the draft.

    Args:
        target: The model that will answer.
        prompt: (tokens,) int64.
        options: Names the scorer.
        capacity: C, for LAQ's first pass.
        tokens: Most tokens of the lookahead.
        protected: (tokens,) bool, as for `evict`.
        memory: What the target already knows of the prompt's beginning.

    Returns:
        (guessed,) int64; empty where the method looks at the prompt alone.
    """
    source = SCORERS[options.scorer].lookahead
    if source == "target":
        start = None if memory is None else memory.start(target, prompt)
        return greedy(target, prompt, tokens, start)
    if source == "compressed":
        kept = None if protected is None else [protected]
        start = evict(target, [prompt], [NOTHING], options, [capacity], kept, memory).start
        return greedy(target, prompt, tokens, start)
    return NOTHING
