"""Caches of prompts that were read apart, side by side as one cache of a left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from .layers import EvictedLayer, StoppableCache, WindowLayer

_FULL = {DynamicLayer, DynamicSlidingWindowLayer, WindowLayer}


def can_join(model: PreTrainedModel) -> bool:
    """Whether `join_caches` knows all layers of this model's cache."""
    return _kinds(DynamicCache(config=model.config)) <= _FULL


def can_go_on_together(cache: Cache) -> bool:
    """Whether rows of a cache can be decoded beside those of any other of which this is true.

    Full layers can, and evicted ones do not differ from them once the prompt is read. Where
    sliding windows count the columns of all that went by, evicted layers have too few.
    """
    kinds = _kinds(cache)
    return kinds <= _FULL or kinds == {EvictedLayer}


def columns_of(cache: Cache) -> int:
    """Columns that the mask of a decoding step needs, besides that of the new token."""
    layers = [la for la in cache.layers if isinstance(la, DynamicLayer) and la.keys is not None]
    windows = [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return windows[0].get_seq_length() if windows else layers[0].get_mask_sizes(0)[0]


def trim(cache: Cache, columns: int) -> bool:
    """Drop first columns, which are padding in every row; says whether this cache can do that."""
    if not _kinds(cache) <= _FULL:
        return False
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            continue
        first = columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= columns
            first = max(0, layer.keys.shape[2] - layer.cumulative_length)
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
    return True


def _kinds(cache: Cache) -> set[type]:
    """The kinds of its layers, but for those that look at another layer's keys."""
    return {type(layer) for layer in cache.layers} - {DummyLayer}


def join_caches(
    model: PreTrainedModel, parts: Sequence[Cache], rows: Sequence[Sequence[int]]
) -> Cache:
    """Caches side by side as a full one; all rows end in the same column. The parts are emptied.

    Args:
        model: Whose caches they are.
        parts: `can_go_on_together` each, unless there is only one. Of an evicted one the slots
            become columns, so the masks say which of them are filled.
        rows: Of each part, its rows' places in the joined batch.
    """
    if len(parts) == 1 and list(rows[0]) == sorted(rows[0]):
        return parts[0]
    joined = StoppableCache(config=model.config)
    columns = max(map(columns_of, parts))
    for index, layer in enumerate(joined.layers):
        if isinstance(layer, DummyLayer):  # looks at another layer's keys
            continue
        size = columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            size = min(columns, layer.sliding_window - 1)
            layer.cumulative_length = columns
        pieces = [it for part in parts if isinstance(it := part.layers[index], DynamicLayer)]
        assert isinstance(layer, DynamicLayer)  # for the type checker: the caller has looked
        keys = _aligned([piece.keys for piece in pieces], rows, size)
        values = _aligned([piece.values for piece in pieces], rows, size)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        for piece in pieces:
            piece.keys = piece.values = None
    return joined


def join_evicted(parts: Sequence[Cache], rows: Sequence[Sequence[int]]) -> Cache:
    """Evicted caches side by side as one; unfilled slots stand in front. The parts are emptied.

    Args:
        parts: Caches whose layers are plain `EvictedLayer`s with nothing behind the prompt.
        rows: As for `join_caches`.
    """
    joined = Cache(
        layers=[EvictedLayer() if isinstance(la, EvictedLayer) else la for la in parts[0].layers]
    )
    seen = max(part.get_seq_length() for part in parts)
    for index, layer in enumerate(joined.layers):
        pieces = [it for part in parts if isinstance(it := part.layers[index], EvictedLayer)]
        if not isinstance(layer, EvictedLayer):  # looks at another layer's keys
            continue
        size = max(piece.keys.shape[2] for piece in pieces if piece.keys is not None)
        keys = _aligned([piece.keys for piece in pieces], rows, size)
        values = _aligned([piece.values for piece in pieces], rows, size)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.hidden, layer.slots, layer.reading = seen - size, size, False
        for piece in pieces:
            piece.keys = piece.values = None
    return joined


def _aligned(
    parts: Sequence[torch.Tensor | None], rows: Sequence[Sequence[int]], size: int
) -> torch.Tensor:
    """(batch, kv_heads, size, head_dim): the parts' rows at their places, zeros in front."""
    states = [part for part in parts if part is not None]
    batch = sum(map(len, rows))
    whole = states[0].new_zeros(batch, states[0].shape[1], size, states[0].shape[3])
    for part, places in zip(states, rows, strict=True):
        whole[list(places), :, size - part.shape[2] :] = part
    return whole
