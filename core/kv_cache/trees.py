"""Caches while a tree of tokens stands behind what they hold for good, a column for each node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DummyLayer, DynamicLayer

from .layers import EvictedLayer, UnevenLayer, WindowLayer

_KNOWN = {DynamicLayer, EvictedLayer, UnevenLayer, WindowLayer, DummyLayer}


def without_trees(cache: Cache) -> list[str]:
    """Kinds of layers that cannot hold a tree; their newest columns may not be the last ones."""
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _KNOWN})


def windows(cache: Cache) -> list[WindowLayer]:
    """The layers that see a window only."""
    return [layer for layer in cache.layers if isinstance(layer, WindowLayer)]


def full_layers(cache: Cache) -> list[Any]:
    """The layers that see everything; those that look at another layer's keys hold none."""
    return [la for la in cache.layers if not isinstance(la, WindowLayer | DummyLayer)]


def columns(layer: Any) -> int:
    """Entries of the part that masks describe; none before the first pass."""
    return 0 if layer.keys is None else int(layer.keys.shape[-2])


def keep_path(cache: Cache, nodes: int, path: Sequence[int], length: int) -> None:
    """Leave one path of the tree, and of a window what is still seen.

    Args:
        cache: Holds the tree in its newest columns; it is changed.
        nodes: Of the tree.
        path: Numbers of the nodes that stay, in their order.
        length: Tokens that the cache stands for afterwards.
    """
    moved = list(path) != list(range(len(path)))
    for layer in (*full_layers(cache), *windows(cache)):
        if layer.keys is None:  # nothing was read
            continue
        past = columns(layer) - nodes
        end, first = past + len(path), 0
        if isinstance(layer, WindowLayer):
            first = max(0, end - layer.sliding_window + 1)
            layer.cumulative_length = length
        if not moved and first == 0 and len(path) == nodes:
            continue  # all of it stays where it is
        where = torch.tensor(path, device=layer.keys.device) + past
        for name in ("keys", "values"):
            states = getattr(layer, name)  # (1, kv_heads, columns, head_dim), owned by the cache
            if moved:
                states[:, :, past:end] = states[:, :, where]
            setattr(layer, name, states[:, :, first:end])
