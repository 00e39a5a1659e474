"""KVzip (arXiv 2505.23416): what the model needs to repeat the context stays.

The model reads the context, is told to repeat it, and is fed the context once more as its answer.
An entry counts as much as the repeated tokens look at it at most. The question has no part in that,
so one choice serves all questions. It costs a pass over the context and one over its repetition,
and needs the whole cache while it chooses.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from transformers import Cache, PreTrainedModel

from ...errors import ModelError
from ...kv_cache.layers import StoppableCache, has_sliding_layers
from ...kv_cache.prefix import Memory
from ...models.attention_capture import AttentionCall, attention_probabilities, observing
from ...models.loading import context_window
from .view import LayerView

REQUEST = "\n\nRepeat the previous context exactly:\n"  # stands between the context and itself
CHUNK = 2048  # context tokens that are repeated in one pass (section 3.4)
SMALLEST = 64  # below, the passes would be too many
OVERLAP = 8  # tokens in front of a later chunk that say where to go on
STEP = 256  # tokens read at once
BLOCK = 64  # queries whose attention is held at once


def score(view: LayerView) -> torch.Tensor:
    """What `reconstruct` has found before this pass."""
    if view.given is None:  # nothing competes
        return torch.zeros(view.key.shape[:3], device=view.key.device)
    return view.given


def reconstruct(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    candidates: torch.Tensor,
    request: torch.Tensor,
    memory: Memory | None = None,
) -> dict[int, torch.Tensor]:
    """How much the repeated context looks at each entry, at most (equation 2).

    A chunk's entries compete among themselves and with the repetition (section 3.4).

    Args:
        model: The target.
        prompt: (tokens,) int64.
        candidates: (tokens,) bool, at least one: the context reaches from the first to the last.
        request: (request,) int64, `REQUEST` in the target's tokens; may be empty.
        memory: What the target already knows of the prompt's beginning.

    Returns:
        Per layer with full attention (kv_heads, tokens) float32; 0 outside of the context.

    Raises:
        ModelError: The target's window has no room for a repetition.
    """
    places = candidates.nonzero()[:, 0]
    first, end = int(places[0]), int(places[-1]) + 1
    chunk = _chunk(model, end, request.numel())
    cache = _read(model, prompt[:end], memory)
    found: dict[int, torch.Tensor] = {}
    for begin in range(first, end, chunk):
        stop = min(begin + chunk, end)
        again = torch.cat([request, prompt[max(first, begin - OVERLAP) : stop]])  # (repeated,)

        def watch(call: AttentionCall, begin: int = begin, stop: int = stop) -> None:
            if call.sliding_window is None:
                heads = call.key.shape[1]
                empty = call.key.new_zeros(heads, prompt.numel(), dtype=torch.float32)
                scores = found.setdefault(call.layer, empty)[:, begin:stop]
                torch.maximum(scores, _most(call, begin, stop, end), out=scores)

        used = deepcopy(cache) if has_sliding_layers(model) else cache
        with torch.no_grad(), observing(model, watch):
            for step in range(0, again.numel(), STEP):  # a mask is as wide as the cache
                ids = again[step : step + STEP].unsqueeze(0).to(model.device)
                places = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) + end + step
                model.get_decoder()(
                    input_ids=ids, position_ids=places, past_key_values=used, use_cache=True
                )
        if used is cache:
            cache.crop(-again.numel())
    return found


def _chunk(model: PreTrainedModel, end: int, request: int) -> int:
    """Context tokens of one pass, as many as the target's window has room for."""
    window = context_window(model)
    room = CHUNK if window is None else window - end - request - OVERLAP
    if room < min(SMALLEST, end):
        raise ModelError(
            f'scorer="kvzip" lets the target repeat a context of {end} tokens behind it, but its '
            f"window holds {window}: give fewer passages, or use another scorer."
        )
    return min(CHUNK, room)


def _read(model: PreTrainedModel, context: torch.Tensor, memory: Memory | None) -> Cache:
    """A full cache of the context."""
    size = 0 if memory is None else memory.shared(context, leave=0)
    cache = StoppableCache(config=model.config) if memory is None else memory.copy(model, size)
    if size < context.numel():
        with torch.no_grad():
            model.get_decoder()(
                input_ids=context[size:].unsqueeze(0).to(model.device),
                past_key_values=cache,
                use_cache=True,
            )
    return cache


def _most(call: AttentionCall, begin: int, stop: int, end: int) -> torch.Tensor:
    """(kv_heads, stop - begin) the most that any query of any head of the group gives an entry."""
    key = torch.cat([call.key[:, :, begin:stop], call.key[:, :, end:]], dim=2)
    kv_heads, size = key.shape[1], stop - begin
    keys = torch.arange(key.shape[2], device=key.device)
    seen = key.shape[2] - call.query.shape[2]  # the chunk, and what was repeated before
    best = key.new_zeros(kv_heads, size, dtype=torch.float32)
    for row in range(0, call.query.shape[2], BLOCK):
        asking = call.query[:, :, row : row + BLOCK]
        rows = torch.arange(row, row + asking.shape[2], device=key.device).unsqueeze(1)
        visible = (keys <= seen + rows)[None, None]
        shares = attention_probabilities(
            asking, key, visible, call.scaling, call.softcap, call.sinks
        )[..., :size]  # (1, heads, rows, size)
        best = torch.maximum(best, shares.reshape(kv_heads, -1, size).amax(1))
    return best
