"""A KV cache that is physically smaller; with `batch.py`, `trees.py` all that knows its internals.

An evicted layer holds `slots` entries a head although `seen` tokens went by. Its slots pose as the
last positions before the next token, so transformers' masks fit; keys keep the rotation of their
original positions. While the prompt is read the layer stores nothing: the attention callback tells
it what to keep, so no two layers hold their full keys and values at once.

An uneven layer may hold another number of entries in each head, so transformers' attention cannot
read it: forward passes over such a cache run inside `attending`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import ModelError
from ..models.attention_capture import AttentionCall, observing
from ..runtime.limits import check_deadline
from .ragged import HeadGroup, group_heads, select_rows, uneven_attention
from .storage import StoredLayer


class StoppableCache(DynamicCache):
    """A full cache whose layers look whether the request's time is up or it was cancelled."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicSlidingWindowLayer:
                self.layers[index] = WindowLayer(layer.sliding_window)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's newest keys and values, unless the request has ended."""
        check_deadline()
        return super().update(*args, **kwargs)


class EvictedLayer(DynamicLayer):
    """Keys and values of chosen prompt positions, (batch, kv_heads, slots, head_dim) each."""

    def __init__(self, before: StoredLayer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reading = True  # the prompt goes by; nothing is stored
        self.before = before  # keys and values of what was read earlier
        self.hidden = 0  # seen tokens that hold no slot
        self.slots = 0  # of `keys`, those that the prompt fills

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the prompt through; later append as usual."""
        if self.reading and self.before is not None:
            return self.before.in_front_of(key_states, value_states)
        if self.reading:
            return key_states, value_states
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def keep(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        seen: int,
        counts: torch.Tensor,
    ) -> None:
        """Store copies of the chosen entries and end the reading.

        Args:
            keys: (batch, kv_heads, tokens, head_dim) of the whole prompt.
            values: Same shape.
            indices: (batch, kv_heads, slots) int64, ascending per head, unfilled slots in front.
            seen: Tokens that the cache stands for.
            counts: (batch, kv_heads) int64, filled slots. Here unfilled ones are stored too; the
                caller masks them.
        """
        where = indices.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        self.lazy_initialization(keys, values)
        self.keys = keys.gather(2, where)
        where = indices.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1])
        self.values = values.gather(2, where)
        self.slots = indices.shape[-1]
        self.hidden = seen - self.slots
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
        """Take back the newest tokens; entries kept from the prompt stay."""
        _check_crop(-tokens_to_remove, self.get_seq_length() - self.hidden - self.slots)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything and read again."""
        super().reset()
        self.reading, self.hidden, self.slots = True, 0, 0


def _check_crop(removed: int, later: int) -> None:
    """Refuse to take back more tokens than came after an eviction."""
    if removed > later:
        raise ModelError(
            f"Cannot crop {removed} tokens of an evicted cache: {later} came after the eviction, "
            "and evicted ones do not come back."
        )


class UnevenLayer(EvictedLayer):
    """Entries of chosen prompt positions, as many in each head as it was given.

    They lie in `groups`, heads of equal length together. `keys` and `values` hold only what came
    later, which is the same for all heads and the only part that transformers' masks describe.
    """

    def __init__(self, before: StoredLayer | None = None) -> None:
        super().__init__(before)
        self.groups: tuple[HeadGroup, ...] = ()
        self.attended = False  # whether `attending` reads the groups

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the prompt through; later append, for `attending` to read.

        Raises:
            ModelError: The forward pass runs outside of `attending`.
        """
        if not self.reading and not self.attended:
            raise ModelError(
                "The heads of this cache hold different numbers of entries, which the model's own "
                "attention cannot read: run the forward pass inside "
                "draftsieve.core.kv_cache.layers.attending(model, cache)."
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def keep(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        indices: torch.Tensor,
        seen: int,
        counts: torch.Tensor,
    ) -> None:
        """Store copies of the filled slots only, and end the reading; see `EvictedLayer.keep`."""
        self.lazy_initialization(keys, values)
        self.groups = group_heads(keys, values, indices, counts)
        self.keys = keys.new_empty(*keys.shape[:2], 0, keys.shape[-1])
        self.values = values.new_empty(*values.shape[:2], 0, values.shape[-1])
        self.hidden = seen
        self.reading, self.before = False, None

    def reset(self) -> None:
        """Forget everything and read again."""
        super().reset()
        self.groups = ()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows of the new batch by their place in the old one."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = torch.arange(self._rows).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._select(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        rows = torch.arange(self._rows, device=indices.device)[indices]
        super().batch_select_indices(indices)
        self._select(rows)

    @property
    def _rows(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[0])

    def _select(self, rows: torch.Tensor) -> None:
        if self.groups and self.keys is not None:
            self.groups = select_rows(self.groups, rows, int(self.keys.shape[1]))


@contextmanager
def attending(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Let forward passes inside the block read a cache's uneven layers; else it does nothing."""
    layers = [layer for layer in cache.layers if isinstance(layer, UnevenLayer)]
    if not layers:
        yield
        return

    def attend(call: AttentionCall) -> torch.Tensor | None:
        layer: Any = cache.layers[call.layer]
        if isinstance(layer, DummyLayer):  # looks at the keys of an earlier layer
            layer = next((la for la in layers if la.keys is call.key), None)
        if not isinstance(layer, UnevenLayer) or layer.reading:
            return None
        visible = None  # a single new token without a mask sees everything
        if call.mask is not None or call.query.shape[2] > 1:
            real = torch.ones(call.key.shape[0], call.key.shape[2], dtype=torch.bool)
            visible = call.visible(real.to(call.key.device)).visible
        return uneven_attention(call, layer.groups, visible)

    for layer in layers:
        layer.attended = True
    try:
        with observing(model, attend):
            yield
    finally:
        for layer in layers:
            layer.attended = False


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding window, small by itself, that can wait for its prompt's end and hold a tree.

    While it is `reading` nothing is stored until `keep_newest`: what the target read behind the
    prompt (the lookahead, the last token) must leave no trace. While it is `wide` it shows all it
    holds, the window before a tree of tokens and the whole tree, until `trees.keep_path`.
    """

    def __init__(self, sliding_window: int, reading: bool = False) -> None:
        super().__init__(sliding_window)
        self.reading = self.waits = reading
        self.wide = False
        self.seen = 0  # tokens that cannot be taken back

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pass the prompt through; later append as usual, or without letting go of anything."""
        if self.reading:
            return key_states, value_states
        if self.wide:
            self.cumulative_length += key_states.shape[-2]
            return DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def keep_newest(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        """Store copies of the last window - 1 of the first `seen` tokens; end the reading."""
        self.lazy_initialization(keys, values)
        first = max(0, seen - self.sliding_window + 1)
        self.keys, self.values = keys[:, :, first:seen].clone(), values[:, :, first:seen].clone()
        self.cumulative_length, self.seen, self.reading = seen, seen, False

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, as far as the other layers can."""
        _check_crop(-tokens_to_remove, self.get_seq_length() - self.seen)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; a prompt that was waited for is waited for again."""
        super().reset()
        self.reading, self.seen = self.waits, 0


def evicting_cache(
    model: PreTrainedModel, before: Sequence[StoredLayer] | None = None, uneven: bool = False
) -> Cache:
    """A cache whose layers all wait to be told what to keep.

    Args:
        model: The target.
        before: Per layer the keys and values (1, kv_heads, tokens, head_dim) of tokens that were
            read earlier; they are not changed.
        uneven: Whether heads or layers may keep different numbers of entries.

    Raises:
        ModelError: No layer has full attention, or one has neither full nor sliding attention.
    """
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    known = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
    strange = sorted(kind.__name__ for kind in kinds - known)
    if strange or DynamicLayer not in kinds:
        raise ModelError(
            "SpecKV evicts full-attention layers and keeps sliding windows, but this model has "
            + (f"{strange} too" if strange else "sliding windows only: nothing to evict")
            + ". Use SpecPC."
        )
    states: Sequence[StoredLayer | None]
    states = before or [None] * len(cache.layers)
    evicted = UnevenLayer if uneven else EvictedLayer
    for index, (layer, state) in enumerate(zip(cache.layers, states, strict=True)):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[index] = WindowLayer(layer.sliding_window, reading=True)
        elif isinstance(layer, DynamicLayer):  # others look at an earlier layer's keys
            cache.layers[index] = evicted(state)
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
            f"{sorted(kinds - {'DynamicLayer'})}: these forget what is behind them, so a question "
            "cannot go on from any place in the documents. Use Engine.answer."
        )


def full_states(cache: Cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (batch, kv_heads, tokens, head_dim) of every full-attention layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return [(la.keys, la.values) for la in layers if la.keys is not None and la.values is not None]


def cache_bytes(cache: Cache) -> int:
    """Bytes of storage that a cache's keys and values keep alive."""
    pairs = full_states(cache)
    for layer in cache.layers:
        if isinstance(layer, UnevenLayer):
            pairs += [(group.keys, group.values) for group in layer.groups]
    return sum(t.untyped_storage().nbytes() for pair in pairs for t in pair)
