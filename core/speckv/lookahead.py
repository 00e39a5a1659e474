"""Whose guess the target reads behind the prompt: the draft's, its own, or nobody's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..config import Generation, SpecKV
from ..generation.decode import next_tokens
from ..kv_cache.prefill import Start
from ..kv_cache.prefix import Memory
from ..models.loading import end_token_ids
from .evict import evict
from .scorers import SCORERS

DraftGuess = Callable[[int], torch.Tensor]  # tokens -> (guessed,) ids of the target's tokenizer


def look_ahead(
    target: PreTrainedModel,
    prompt: torch.Tensor,
    options: SpecKV,
    capacity: int,
    tokens: int,
    draft: DraftGuess,
    protected: torch.Tensor | None = None,
    memory: Memory | None = None,
) -> torch.Tensor:
    """The lookahead that `options.scorer` asks for.

    Args:
        target: The model that will answer.
        prompt: (tokens,) int64.
        options: Names the scorer.
        capacity: C, for LAQ's first pass.
        tokens: Most tokens of the lookahead.
        draft: Called only where the draft guesses.
        protected: (tokens,) bool, as for `evict`.
        memory: What the target already knows of the prompt's beginning.

    Returns:
        (guessed,) int64; empty where the method looks at the prompt alone.
    """
    source = SCORERS[options.scorer].lookahead
    if source == "draft":
        return draft(tokens)
    if source == "target":
        start = None if memory is None else memory.start(target, prompt)
        return greedy(target, prompt, tokens, start)
    if source == "compressed":
        nothing = torch.tensor([], dtype=torch.int64)
        kept = None if protected is None else [protected]
        start = evict(target, [prompt], [nothing], options, [capacity], kept, memory).start
        return greedy(target, prompt, tokens, start)
    return torch.tensor([], dtype=torch.int64)


def greedy(
    target: PreTrainedModel, prompt: torch.Tensor, max_new_tokens: int, start: Start | None = None
) -> torch.Tensor:
    """(new,) int64 greedy continuation; an end token stops and is included."""
    ends = set(end_token_ids(target).tolist())
    tokens: list[int] = []
    options = Generation(max_new_tokens=max_new_tokens)
    for (token,) in next_tokens(target, [prompt], options, start):
        tokens.append(token)
        if token in ends:
            break
    return torch.tensor(tokens, dtype=torch.int64)
