"""Greedy continuations: the guesses that methods look ahead with, of one prompt or of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from ..models.loading import end_token_ids
from ..runtime.limits import check_deadline
from .batch import can_join
from .layers import attending
from .prefill import Observe, Start, from_scratch, read_prompts, similar

MOST_GUESSING = 32_768  # tokens, padding included, whose keys and values are held at once
Done = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Watch:
    """Who sees the attention of a batch while it is read and continued."""

    reading: Observe  # entered around each pass over prompts
    stepping: Callable[[], AbstractContextManager[None]]  # entered around all later passes
    step: Callable[[torch.Tensor, torch.Tensor], None]  # told (batch,) active and (batch, seen)


def guess(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor] | torch.Tensor,
    tokens: int | Sequence[int],
    *,
    done: Done | None = None,
) -> list[torch.Tensor]:
    """Greedy answers to prompts, read and continued as a batch.

    Args:
        model: Any causal model.
        prompts: (tokens,) int64 each, of any lengths; each gets what it gets alone.
        tokens: Most tokens to guess, of all prompts or of each; an end token stops its own row and
            is included.
        done: Told now and then how many more prompts are done.

    Returns:
        One (guessed,) int64 tensor per prompt.
    """
    rows, limits = list(prompts), each(tokens, len(prompts))
    found: dict[int, torch.Tensor] = {}
    for batch in batches(model, rows, limits):
        guesses = look_ahead(model, [rows[r] for r in batch], [limits[r] for r in batch])
        found.update(zip(batch, guesses, strict=True))
        if done is not None:
            done(len(batch))
    return [found[row] for row in range(len(rows))]


def greedy(
    model: PreTrainedModel, prompt: torch.Tensor, limit: int, start: Start | None = None
) -> torch.Tensor:
    """(new,) int64 greedy continuation of one prompt; an end token stops and is included.

    Args:
        model: Any causal model.
        prompt: (tokens,) int64.
        limit: Most tokens.
        start: A prefilled cache of any kind; None reads the prompt.
    """
    start = start or from_scratch(model, [prompt])
    with torch.no_grad(), attending(model, start.cache):
        logits = model(
            input_ids=start.feed,
            attention_mask=start.mask,
            position_ids=start.positions,
            past_key_values=start.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        places = start.positions[:, -1:]
        return _continue(model, start.cache, logits, start.mask, places, [limit])[0]


def batches(
    model: PreTrainedModel, prompts: Sequence[torch.Tensor], limits: Sequence[int]
) -> list[list[int]]:
    """Rows that look ahead together; caches that cannot be joined are read one by one."""
    if len(prompts) == 1:
        return [[0]]
    sizes = [prompt.numel() + more for prompt, more in zip(prompts, limits, strict=True)]
    return similar(sizes, MOST_GUESSING if can_join(model) else 0, padding=0.5)


def look_ahead(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    limits: Sequence[int],
    watch: Watch | None = None,
) -> list[torch.Tensor]:
    """Read prompts side by side and continue them; the last token of each is never fed.

    Returns:
        One (guessed,) int64 tensor per prompt, at least one token each.
    """
    check_deadline()
    observe = None if watch is None else watch.reading
    read = read_prompts(model, prompts, keep=max(limits) > 1, observe=observe)
    places = read.mask.sum(1, keepdim=True) - 1  # (batch, 1) of each row's newest token
    with nullcontext() if watch is None else watch.stepping(), torch.no_grad():
        return _continue(model, read.cache, read.logits, read.mask, places, limits, watch)


def _continue(
    model: PreTrainedModel,
    cache: Cache | None,
    logits: torch.Tensor,
    mask: torch.Tensor,
    places: torch.Tensor,
    limits: Sequence[int],
    watch: Watch | None = None,
) -> list[torch.Tensor]:
    """Go on from (batch, vocabulary) logits behind what a cache holds, greedily."""
    guesses = [logits.argmax(-1)]  # each (batch,)
    if max(limits) == 1:
        return list(guesses[0].cpu().unsqueeze(1))
    ends = end_token_ids(model).to(mask.device)
    lengths = torch.tensor(limits, device=mask.device)
    active = lengths > 1  # (batch,) rows still looking ahead
    for step in range(1, max(limits)):
        ended = torch.isin(guesses[-1], ends) & active
        lengths = torch.where(ended, step, lengths)
        active = active & (lengths > step)
        if not active.any():
            break
        check_deadline()
        # what a finished row is fed counts as padding: its position stands still
        mask = torch.cat([mask, active.unsqueeze(1).to(mask.dtype)], dim=1)
        places = places + active.unsqueeze(1)
        if watch is not None:
            watch.step(active, mask.bool())
        logits = model(
            input_ids=guesses[-1].unsqueeze(1),
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        guesses.append(logits.argmax(-1))
    stacked = torch.stack(guesses, dim=1).cpu()  # (batch, steps)
    return [row[:length] for row, length in zip(stacked, lengths.tolist(), strict=True)]


def each(tokens: int | Sequence[int], rows: int) -> list[int]:
    """One number for each row."""
    return [tokens] * rows if isinstance(tokens, int) else list(tokens)
