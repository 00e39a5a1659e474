"""Methods on bare token ids, with every intermediate: for plots, debugging and parity tests."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..config import Method, stages
from ..errors import NO_DRAFT, ModelError
from ..kv_cache.greedy import greedy, guess
from ..speckv.evict import Eviction, evict, token_capacity
from ..speckv.lookahead import own_lookahead
from ..speckv.scorers import needs_draft
from ..specpc.draft_scores import read_draft
from ..specpc.head_weights import settled
from ..specpc.selection import select
from ..specpc.sparse_positions import start_at
from ..types import DraftReading, Selection, Trace


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
        draft: The model that reads first; SpecKV's baseline scorers do without it.
        input_ids: (1, tokens) int64.
        method: None for the target alone.
        max_new_tokens: Most tokens generated, greedily.
    """
    prompt = input_ids[0].cpu()
    specpc, speckv = stages(method)
    if method is None:
        return Trace(output_ids=greedy(target, prompt, max_new_tokens))
    reading: DraftReading | None = None
    chosen: Selection | None = None
    if specpc is not None:
        draft = _need(draft)
        specpc = settled(specpc, draft)
        tokens = specpc.lookahead_tokens or max_new_tokens
        reading = read_draft(draft, input_ids, specpc, lookahead_tokens=tokens)[0]
        chosen = select(reading.scores, specpc)
        lookahead = reading.lookahead_ids
        prompt = prompt[chosen.indices]
    else:
        assert speckv is not None  # a method has at least one stage
        capacity = token_capacity(speckv, prompt.numel())
        tokens = speckv.lookahead_tokens or max_new_tokens
        if needs_draft(speckv):
            lookahead = guess(_need(draft), input_ids, tokens)[0]
        else:
            lookahead = own_lookahead(target, prompt, speckv, capacity, tokens)
    done: Eviction | None = None
    start = None
    if specpc is not None and specpc.positions == "keep":
        assert chosen is not None  # a prompt stage has chosen
        start = start_at(target, [prompt], [chosen.indices])
    if speckv is not None and prompt.numel() > token_capacity(speckv, prompt.numel()):
        capacity = token_capacity(speckv, prompt.numel())
        done = evict(target, [prompt], [lookahead], speckv, [capacity])
        start = done.start
    candidates = max(0, prompt.numel() - (0 if speckv is None else speckv.window_size) - 1)
    return Trace(
        output_ids=greedy(target, prompt, max_new_tokens, start),
        draft_scores=None if reading is None else reading.scores,
        pooled_scores=None if chosen is None else chosen.pooled_scores,
        kept_prompt_indices=None if chosen is None else chosen.indices,
        lookahead_ids=lookahead,
        kv_scores=() if done is None else [layer[0, :, :candidates] for layer in done.scores],
        kept_kv_indices=() if done is None else done.entries(0),
    )


def _need(draft: PreTrainedModel | None) -> PreTrainedModel:
    if draft is None:
        raise ModelError(NO_DRAFT)
    return draft
