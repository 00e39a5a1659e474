"""The draft writes an answer from stored passages: only the question goes through it.

The stored keys and values are the draft's working cache. Each passage was read alone behind the
fixed beginning; where the model's embedding of positions allows it they then stand behind each
other, else all where they were read, with the question behind the longest (docs/results.md has what
that does to answers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...errors import ConfigError, PromptError
from ...kv_cache.greedy import greedy
from ...kv_cache.layers import StoppableCache
from ...kv_cache.prefill import Start
from ...models.loading import context_window
from ...prompt.messages import SYSTEM_ROLES, Prompt
from ...store.codec import decode
from ...store.entries import Entry
from .frame import Tail
from .layout import Layout
from .moving import differences, turned
from .reading import Beginning, Parts, StoredTokens, joined


def asks_once(prompt: Prompt) -> bool:
    """Whether a prompt is one question: no tools, and nothing was said before."""
    roles = [m.role for m in prompt.messages if m.role not in SYSTEM_ROLES]
    return roles == ["user"] and not prompt.tools and bool(prompt.question.strip())


def guess_stored(
    model: PreTrainedModel,
    beginning: Beginning,
    layout: Layout,
    entries: Sequence[Entry | None],
    tail: Tail,
    tokens: int,
    piece: int,
    moved: bool,
) -> torch.Tensor:
    """A greedy answer from stored passages.

    Args:
        model: The draft.
        beginning: Of the fixed prompt.
        layout: What is stored: the draft's whole cache.
        entries: The passages; None for those without tokens.
        tail: The question and what stands around it.
        tokens: Most tokens; an end token stops and is included.
        piece: Most tokens of a passage that were read at once.
        moved: Whether passages stand behind each other, where the window holds all of them.

    Returns:
        (guessed,) int64.

    Raises:
        ConfigError: The store lacks layers.
        PromptError: The question exceeds the draft's window.
    """
    if not layout.whole:
        raise ConfigError(
            "The draft guesses from all of its layers, and the store lacks some: open a new one "
            'with layers="all" and first_layer=0.'
        )
    stored, asked, window = joined(entries), len(tail.ids), context_window(model)
    begin, total = beginning.tokens, sum(stored.lengths)
    moved = moved and (window is None or begin + total + asked + tokens <= window)
    first = begin + (total if moved else min(piece, max(stored.lengths, default=0)))
    if window is not None and first + asked >= window:
        raise PromptError(
            f"The question has {asked} tokens behind {first}, the draft's window {window}, so that "
            "it cannot guess an answer: ask a shorter one."
        )
    by = differences(stored.lengths, piece) if moved else None
    cache, device = working_cache(model, beginning, layout, stored, by), model.device
    start = Start(
        cache,
        tail.ids[None].to(device),
        torch.ones((1, begin + total + asked), dtype=torch.int64, device=device),
        torch.arange(first, first + asked, device=device)[None],
    )
    room = tokens if window is None else min(tokens, window - first - asked)
    return greedy(model, tail.ids, room, start)


def working_cache(
    model: PreTrainedModel,
    beginning: Beginning,
    layout: Layout,
    stored: StoredTokens,
    by: torch.Tensor | None = None,
) -> StoppableCache:
    """Beginning and passages as one cache of the draft's own type.

    Args:
        model: The draft.
        beginning: Of the fixed prompt.
        layout: What is stored: the draft's whole cache.
        stored: The passages.
        by: (tokens,) int64, how far each one moves; None leaves them where they were read.
    """
    cache = beginning.cache(model, 1)
    if not sum(stored.lengths):
        return cache
    for layer, (own, _) in enumerate(beginning.states):
        keys = _states(stored.keys, layout, layout.key_range(layer)).to(own.device)
        values = _states(stored.values, layout, layout.value_range(layer))
        keys = keys if by is None else turned(model, keys, by)
        cache.update(keys.to(own), values.to(own), layer)
    return cache


def _states(parts: Parts, layout: Layout, heads: slice) -> torch.Tensor:
    """(1, kv_heads, tokens, width) float32."""
    return decode(parts, layout.codec, heads).transpose(0, 1)[None]
