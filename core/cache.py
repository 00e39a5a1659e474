"""The one file that knows transformers' cache internals: a KV cache that is physically smaller.

An evicted layer holds `slots` entries a head although `seen` tokens went by. Its slots pose as the
last positions before the next token, so transformers' masks fit; keys keep the rotation of their
original positions. While the prompt is read the layer stores nothing: the attention callback tells
it what to keep, so no two layers hold their full keys and values at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .errors import ModelError
from .stored import StoredLayer


class EvictedLayer(DynamicLayer):
    """Keys and values of chosen prompt positions, (batch, kv_heads, slots, head_dim) each."""

    def __init__(self, before: StoredLayer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reading = True  # the prompt goes by; nothing is stored
        self.before = before  # keys and values of what was read earlier
        self.hidden = 0  # seen tokens that hold no slot

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the prompt through; later append as usual."""
        if self.reading and self.before is not None:
            return self.before.before(key_states, value_states)
        if self.reading:
            return key_states, value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def keep(
        self, keys: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, seen: int
    ) -> None:
        """Store copies of the chosen entries and end the reading.

        Args:
            keys: (batch, kv_heads, tokens, head_dim) of the whole prompt.
            values: Same shape.
            indices: (batch, kv_heads, slots) int64, ascending per head.
            seen: Tokens that the cache stands for.
        """
        where = indices.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        self.lazy_initialization(keys, values)
        self.keys = keys.gather(2, where)
        where = indices.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
        self.values = values.gather(2, where)
        self.hidden = seen - indices.shape[-1]
        self.reading, self.before = False, None

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, kept or not."""
        if self.reading or self.keys is None:
            return 0 if self.before is None else self.before.tokens
        return self.hidden + int(self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(physical length, offset): the slots are the newest positions of the mask."""
        if self.reading or self.keys is None:
            return self.get_seq_length() + query_length, 0
        return int(self.keys.shape[-2]) + query_length, self.hidden

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens; entries kept from the prompt cannot be told apart."""
        generated = self.get_seq_length() - self.hidden
        if -tokens_to_remove >= generated > 0:
            raise ModelError(
                f"Cannot crop {-tokens_to_remove} tokens of an evicted cache: it holds only "
                f"{generated} entries, and evicted ones do not come back."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything and read again."""
        super().reset()
        self.reading, self.hidden = True, 0


class NewestLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer, small by itself, that keeps the prompt's newest tokens only.

    What the target read behind them (the lookahead, the last token) must leave no trace.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.reading = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the prompt through; later append as usual."""
        if self.reading:
            return key_states, value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def keep_newest(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """Store copies of the last window - 1 of the first `seen` tokens; end the reading."""
        self.lazy_initialization(keys, values)
        first = max(0, seen - self.sliding_window + 1)
        self.keys, self.values = keys[:, :, first:seen].clone(), values[:, :, first:seen].clone()
        self.cumulative_length, self.reading = seen, False


def evicting_cache(
    model: PreTrainedModel, before: Sequence[StoredLayer] | None = None
) -> Cache:
    """A cache whose layers all wait to be told what to keep.

    Args:
        model: The target.
        before: Per layer the keys and values (1, kv_heads, tokens, head_dim) of tokens that were
            read earlier; they are not changed.

    Raises:
        ModelError: No layer has full attention, or one has neither full nor sliding attention.
    """
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    strange = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if strange or DynamicLayer not in kinds:
        raise ModelError(
            "SpecKV evicts full-attention layers and keeps sliding windows, but this model has "
            + (f"{strange} too" if strange else "sliding windows only: nothing to evict")
            + ". Use SpecPC."
        )
    states: Sequence[StoredLayer | None]
    states = before or [None] * len(cache.layers)
    cache.layers = [
        NewestLayer(layer.sliding_window)
        if isinstance(layer, DynamicSlidingWindowLayer)
        else EvictedLayer(state)
        for layer, state in zip(cache.layers, states, strict=True)
    ]
    return cache


def has_sliding_layers(model: PreTrainedModel) -> bool:
    """Whether some layers see a window only; their rows cannot be padded apart when evicting."""
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)


def require_full_attention(model: PreTrainedModel) -> None:
    """Raise `ModelError` where a layer is not plain full attention."""
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if kinds != {"DynamicLayer"}:
        raise ModelError(
            f"Sessions need full attention in every layer, but this model's cache has "
            f"{sorted(kinds - {'DynamicLayer'})}. Use Engine.answer."
        )


def full_states(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (batch, kv_heads, tokens, head_dim) of every full-attention layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [(la.keys, la.values) for la in layers if la.keys is not None and la.values is not None]


def cache_bytes(cache: Cache) -> int:
    """Bytes of storage that a cache's tensors keep alive."""
    return sum(t.untyped_storage().nbytes() for pair in full_states(cache) for t in pair)
