"""Methods on bare token ids, with every intermediate: for plots, debugging and parity tests."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .config import Generation, Method, SpecKV, SpecKVPC, SpecPC
from .decode import Start, next_tokens
from .draft import end_token_ids, guess, read_draft
from .speckv import Eviction, evict, token_capacity
from .specpc import select
from .types import DraftReading, Selection, Trace


def trace(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    input_ids: torch.Tensor,
    method: Method | None,
    max_new_tokens: int,
) -> Trace:
    """Run a method as the paper has it; see `Engine.trace`.

    Args:
        target: The model that answers.
        draft: The model that reads first; needed by every method.
        input_ids: (1, tokens) int64.
        method: None for the target alone.
        max_new_tokens: Most tokens generated, greedily.
    """
    prompt = input_ids[0].cpu()
    specpc, speckv = stages(method)
    if draft is None or method is None:
        return Trace(output_ids=_greedy(target, prompt, max_new_tokens))
    reading: DraftReading | None = None
    chosen: Selection | None = None
    if specpc is not None:
        tokens = specpc.lookahead_tokens or max_new_tokens
        reading = read_draft(draft, input_ids, specpc, lookahead_tokens=tokens)[0]
        chosen = select(reading.scores, specpc)
        lookahead = reading.lookahead_ids
        prompt = prompt[chosen.indices]
    else:
        assert speckv is not None  # a method has at least one stage
        lookahead = guess(draft, input_ids, speckv.lookahead_tokens or max_new_tokens)[0]
    done: Eviction | None = None
    if speckv is not None and prompt.numel() > token_capacity(speckv, prompt.numel()):
        capacity = token_capacity(speckv, prompt.numel())
        done = evict(target, [prompt], [lookahead], speckv, [capacity])
    start = None if done is None else done.start
    rivals = max(0, prompt.numel() - (0 if speckv is None else speckv.window_size) - 1)
    return Trace(
        output_ids=_greedy(target, prompt, max_new_tokens, start),
        draft_scores=None if reading is None else reading.scores,
        pooled_scores=None if chosen is None else chosen.pooled_scores,
        kept_prompt_indices=None if chosen is None else chosen.indices,
        lookahead_ids=lookahead,
        kv_scores=() if done is None else [layer[0, :, :rivals] for layer in done.scores],
        kept_kv_indices=() if done is None else [list(layer[0]) for layer in done.kept],
    )


def stages(method: Method | None) -> tuple[SpecPC | None, SpecKV | None]:
    """The prompt stage and the cache stage of a method."""
    if isinstance(method, SpecKVPC):
        return method.specpc, method.speckv
    if isinstance(method, SpecKV):
        return None, method
    return method, None


def _greedy(
    target: PreTrainedModel, prompt: torch.Tensor, max_new_tokens: int, start: Start | None = None
) -> torch.Tensor:
    """(new,) int64; an end token stops and is included."""
    ends = set(end_token_ids(target).tolist())
    tokens: list[int] = []
    options = Generation(max_new_tokens=max_new_tokens)
    for (token,) in next_tokens(target, [prompt], options, start):
        tokens.append(token)
        if token in ends:
            break
    return torch.tensor(tokens)
