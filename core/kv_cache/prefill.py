"""Reads the prompts of a batch: side by side where that is faster, else apart; then joined.

On a CPU a long prompt keeps all cores busy by itself, and padding rules out the causal shortcut of
the attention kernels, so a padded pass takes longer than its rows one after the other. Short
prompts, and all prompts on an accelerator, gain from each other's company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from .batch import can_join, join_caches
from .layers import StoppableCache

TOGETHER = {"cpu": 512}  # tokens of one pass over several prompts, padding included, by device
# Layers that look at another layer's keys run only the rows of the logits that are wanted, unless
# those are named by their places: all rows are observed, and one row gets logits.
LAST_ROW = torch.tensor([-1])
MOST_TOGETHER = 16_384  # on other devices
MOST_PADDING = 0.125  # of a row of such a pass

Observe = Callable[[Sequence[int], torch.Tensor], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Prompts that have been read; all end in the same column."""

    logits: torch.Tensor  # (batch, vocabulary) behind each prompt's last token
    cache: Cache | None
    mask: torch.Tensor  # (batch, columns) int64, 0 at padding


def read_prompts(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    *,
    keep: bool = True,
    observe: Observe | None = None,
) -> Prompts:
    """Read prompts of any lengths; each gets what it gets alone.

    Args:
        model: Any causal model.
        prompts: (tokens,) int64 each.
        keep: Whether their keys and values are wanted.
        observe: Called with the rows of each pass and their mask (rows, columns); entered around
            the pass.
    """
    lengths = [prompt.numel() for prompt in prompts]
    passes = passes_of(model, lengths)
    if keep and len(prompts) > 1 and not can_join(model):
        passes = [list(range(len(prompts)))]
    logits: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    caches: list[Cache] = []
    for rows in passes:
        ids, mask = pad_left([prompts[row] for row in rows], model.device)
        cache = StoppableCache(config=model.config) if keep else None
        with torch.no_grad(), nullcontext() if observe is None else observe(rows, mask):
            found = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=keep,
                logits_to_keep=1 if observe is None else LAST_ROW,
            ).logits[:, -1]
        for row, its in zip(rows, found, strict=True):
            logits[row] = its
        if cache is not None:
            caches.append(cache)
    if keep and len(prompts) > 1:
        caches = [join_caches(model, caches, passes)]
    return Prompts(
        torch.stack(logits), caches[0] if keep else None, mask_left(lengths, model.device)
    )


def passes_of(model: PreTrainedModel, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of each pass over a batch of prompts, as suits the model's device."""
    return similar(lengths, TOGETHER.get(model.device.type, MOST_TOGETHER), MOST_PADDING)


def similar(lengths: Sequence[int], limit: int, padding: float) -> list[list[int]]:
    """Share rows of a batch out among passes, longest first.

    Args:
        lengths: Tokens of each row.
        limit: Most tokens of a pass over several rows, padding included.
        padding: Largest share of padding in a row.

    Returns:
        Row numbers of each pass; every row is in one of them.
    """
    passes: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if passes:
            longest = lengths[passes[-1][0]]
            fits = longest * (len(passes[-1]) + 1) <= limit
            if fits and lengths[row] >= longest * (1 - padding):
                passes[-1].append(row)
                continue
        passes.append([row])
    return passes


def pad_left(
    prompts: Sequence[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows of different length: (batch, longest) ids and their int64 attention mask."""
    lengths = [prompt.numel() for prompt in prompts]
    ids = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[row.numel() - prompt.numel() :] = prompt
    return ids.to(device), mask_left(lengths, device)


def mask_left(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(batch, longest) int64, 0 at the padding in front of each row."""
    sizes = torch.tensor(lengths, device=device).unsqueeze(1)
    columns = max(lengths)
    return (torch.arange(columns, device=device) >= columns - sizes).long()


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """Where decoding begins: a cache, and the tokens to feed next."""

    cache: Cache
    feed: torch.Tensor  # (batch, new) int64
    mask: torch.Tensor  # (batch, seen + new) int64, 0 at padding
    positions: torch.Tensor  # (batch, new) int64


def from_scratch(model: PreTrainedModel, prompts: Sequence[torch.Tensor]) -> Start:
    """An empty cache and the prompt to feed; of a batch, all is read but each last token."""
    ids, mask = pad_left(prompts, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if len(prompts) == 1 or min(prompt.numel() for prompt in prompts) == 1:
        return Start(StoppableCache(config=model.config), ids, mask, positions)
    cache = read_prompts(model, [prompt[:-1] for prompt in prompts]).cache
    assert cache is not None  # it was asked for
    return Start(cache, ids[:, -1:], mask, positions[:, -1:])
