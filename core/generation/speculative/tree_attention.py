"""A model reads a tree of tokens in one pass: every node sees its ancestors only.

The cache holds one column for each node until `keep` leaves those of one path. Works on full and
on evicted caches, and on sliding windows; `obstacle` says where it does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from ...kv_cache.layers import attending
from ...kv_cache.trees import columns, full_layers, keep_path, windows, without_trees
from ...models.loading import context_window

_KINDS = {"full_attention", "sliding_attention"}


def obstacle(model: PreTrainedModel, cache: Cache) -> str | None:
    """Why a model with this cache cannot read trees; None if it can."""
    config = model.config.get_text_config()
    own = config._attn_implementation
    if own not in ("sdpa", "eager"):
        return f"{own} attention takes no tree mask; load the model with sdpa or eager"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    strange = without_trees(cache)
    strange += sorted(set(getattr(config, "layer_types", None) or ()) - _KINDS)
    if strange:
        return f"cache layers without support for trees: {', '.join(strange)}"
    return None


class TreeReader:
    """A model and its cache, with a tree of tokens behind what the cache holds for good.

    Args:
        model: The model; `obstacle` must be None.
        cache: What it has read: `length` tokens of one row without padding. It is changed.
        mask: (1, length) int64 as for the model, 0 at columns that an eviction has emptied.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: torch.Tensor) -> None:
        self.model, self.cache, self._mask = model, cache, mask
        self.length = mask.shape[1]  # tokens that stay
        self._ancestors: list[list[int]] = []  # of each node behind them, itself included
        self._text_mask: torch.Tensor | None = None  # of the newest pass, if it read no branches
        sliding = windows(cache)
        for layer in sliding:
            layer.wide = True
        config = model.config.get_text_config()
        self._window = sliding[0].sliding_window if sliding else None
        self._mixed = bool(sliding and full_layers(cache))
        self._additive = config._attn_implementation == "eager"
        self._limits = context_window(model), *rotation_border(config)

    def room(self) -> int:
        """How many tokens a path may have now, without changing what any of them means."""
        longest, border, fixed_after = self._limits
        if border is not None and (self.length < border or not fixed_after):
            longest = border if longest is None else min(border, longest)
        return 1 << 30 if longest is None else max(0, longest - self.length)

    def read(self, tokens: Sequence[int], parents: Sequence[int]) -> torch.Tensor:
        """Append nodes to the tree.

        Args:
            tokens: Their tokens.
            parents: For each the number of the node it follows, counted from 0 since the last
                `keep` in the order of reading; -1 for what the cache holds for good.

        Returns:
            (nodes, vocabulary) logits of what follows each node.
        """
        before = len(self._ancestors)
        for parent in parents:
            line = self._ancestors[parent] if parent >= 0 else []
            self._ancestors.append([*line, len(self._ancestors)])
        depths = [len(line) - 1 for line in self._ancestors[before:]]
        device = self._mask.device
        positions = torch.tensor([depths], device=device) + self.length  # (1, nodes)
        mask: Any
        self._text_mask = None
        if list(parents) == list(range(-1, len(tokens) - 1)) and not before:  # just a text
            mask = self._text_mask = torch.cat([self._mask, torch.ones_like(positions)], dim=1)
        else:
            mask = self._tree_mask(before, depths)
        with torch.no_grad(), attending(self.model, self.cache):
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor([list(tokens)], device=device),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        return logits[0]

    def keep(self, path: Sequence[int]) -> None:
        """Keep the nodes of a path from the root on, in their order; forget the others."""
        nodes = len(self._ancestors)
        text = self._text_mask if len(path) == nodes else None  # all of it stays where it is
        if text is None or self._window is not None:
            keep_path(self.cache, nodes, path, self.length + len(path))
        self.length += len(path)
        added = self._mask.new_ones(1, len(path))
        self._mask = torch.cat([self._mask, added], dim=1) if text is None else text
        self._ancestors = []

    def _tree_mask(self, before: int, depths: list[int]) -> Any:
        """What the nodes from `before` on may see: one mask, or one for each kind of layer."""
        nodes = len(self._ancestors)
        tree = np.zeros((len(depths), nodes), dtype=bool)
        for row, line in enumerate(self._ancestors[before:]):
            tree[row, line] = True
        masks: dict[str, torch.Tensor] = {}
        if full := full_layers(self.cache):
            past = columns(full[0]) - before
            masks["full_attention"] = self._finish(
                np.concatenate([np.ones((len(depths), past), dtype=bool), tree], axis=1)
            )
        if self._window is not None:
            past = columns(windows(self.cache)[0]) - before
            own = np.array(depths)[:, None]  # (nodes, 1), counted from `length`
            others = np.array([len(line) - 1 for line in self._ancestors])  # (nodes of the tree,)
            seen = own - np.arange(-past, 0) < self._window
            near = tree & (own - others < self._window)
            masks["sliding_attention"] = self._finish(np.concatenate([seen, near], axis=1))
        return masks if self._mixed else next(iter(masks.values()))

    def _finish(self, visible: np.ndarray[Any, np.dtype[np.bool_]]) -> torch.Tensor:
        """(1, 1, nodes, columns), bool for sdpa and added to the scores for eager attention."""
        mask = torch.from_numpy(visible).to(self._mask.device)[None, None]
        if not self._additive:
            return mask
        dtype = self.model.dtype
        lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
        return torch.where(mask, torch.zeros_like(lowest), lowest)


def rotation_border(config: Any) -> tuple[int | None, bool]:
    """Where rotary embeddings change with the length read, and whether they are fixed after it.

    A pass across that border would turn all its tokens by the longest one's frequencies.
    """
    found = getattr(config, "rope_parameters", None) or {}
    parts: Iterable[Any] = [found, *(part for part in found.values() if isinstance(part, dict))]
    for part in parts:
        kind = str(part.get("rope_type", "default"))
        if "dynamic" in kind or kind == "longrope":
            fallback = getattr(config, "original_max_position_embeddings", None)
            border = part.get("original_max_position_embeddings") or fallback
            return border or config.max_position_embeddings, kind == "longrope"
    return None, True
