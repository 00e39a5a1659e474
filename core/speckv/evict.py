"""SpecKV, KV-cache eviction by the draft's lookahead (arXiv 2506.08373, Algorithm 1).

The target reads prompt + lookahead once; in every layer the queries of the last prompt tokens and
of the lookahead score the prompt's keys per KV head, and only the best entries stay. The last
prompt token is then fed again, so that decoding starts from the evicted cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..config import SpecKV
from ..errors import ModelError
from ..kv_cache.layers import (
    EvictedLayer,
    UnevenLayer,
    WindowLayer,
    evicting_cache,
    has_sliding_layers,
)
from ..kv_cache.prefill import Start, pad_left
from ..kv_cache.prefix import Memory
from ..models.attention_capture import AttentionCall, observing
from .budgets import choose_entries, layer_budgets
from .scorers import SCORERS, LayerView, Prepare
from .sparse_prefill import SparsePrefill, plan_sparse


@dataclass(frozen=True, slots=True, eq=False)
class Eviction:
    """What SpecKV did to a batch of prompts."""

    start: Start  # where decoding goes on
    scores: tuple[torch.Tensor, ...]  # per layer (batch, kv_heads, columns), pooled; -inf: none
    kept: tuple[torch.Tensor, ...]  # per layer (batch, kv_heads, slots) columns
    counts: tuple[torch.Tensor, ...]  # per layer (batch, kv_heads) slots filled; others in front
    slots: torch.Tensor  # (batch, C) bool, False where a row keeps fewer, C on average if uneven
    pads: torch.Tensor  # (batch,) columns in front of each prompt

    def entries(self, row: int) -> list[list[torch.Tensor]]:
        """Per layer and KV head the prompt positions that a row keeps, ascending."""
        pad = int(self.pads[row])
        return [
            [
                head[head.numel() - int(filled) :] - pad
                for head, filled in zip(kept[row], counts[row], strict=True)
            ]
            for kept, counts in zip(self.kept, self.counts, strict=True)
        ]


def evict(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    lookaheads: Sequence[torch.Tensor],
    options: SpecKV,
    capacities: Sequence[int],
    protected: Sequence[torch.Tensor] | None = None,
    memory: Memory | None = None,
) -> Eviction:
    """Prefill a target and keep a number of KV entries per layer and KV head.

    Prompts end in the same column (shorter ones are padded on the left), lookaheads start in the
    next one; a prompt of at most C + 1 tokens keeps all its entries.

    Args:
        model: The target. Sliding-window layers keep their windows; they allow no padding.
        prompts: (tokens,) int64 each, at least 2 tokens.
        lookaheads: (tokens,) int64 each, the draft's guessed answers, or what the scorer prepares
            with; may be empty.
        options: Window, kernel, pooling and reduction.
        capacities: C of each row, window included. Below the window the newest C are kept.
        protected: (tokens,) bool each, entries that always stay; at most C of them.
        memory: What the target already knows of a single prompt's beginning.
    """
    scorer = SCORERS[options.scorer]
    behind = lookaheads if scorer.prepare is None else [row[:0] for row in lookaheads]
    ids, mask = pad_left(prompts, model.device)  # (batch, columns)
    guess, guess_mask = _pad_right(behind, model.device)
    padding = torch.cat([mask, guess_mask], dim=1)
    columns = ids.shape[1]
    lengths = mask.sum(1)
    if bool((lengths < columns).any()) and has_sliding_layers(model):
        raise ModelError(
            "Prompts of different lengths cannot be evicted as one batch in a model with "
            "sliding-window layers: give them one by one."
        )
    limits = torch.tensor(list(capacities), device=mask.device)
    slots = torch.minimum(lengths - 1, limits)  # (batch,) entries each row keeps
    evictor = _Evictor(padding.bool(), columns, lengths, slots, options)
    if protected is not None:
        evictor.protect(pad_left([row.long() for row in protected], model.device)[0].bool())
    known = 0  # the observing rows are always read anew
    if memory is not None and len(prompts) == 1:
        known = memory.shared(prompts[0].cpu(), leave=min(options.window_size + 1, columns))
    before = None if memory is None or not known else memory.part(known)
    cache = evicting_cache(model, before, options.uneven)
    evictor.cache, evictor.begin = cache, known
    if options.uneven:
        evictor.share_out()
    if scorer.prepare is not None:
        evictor.prepare(scorer.prepare, model, prompts, lookaheads, memory)
    if options.prefill_vertical_size is not None:
        evictor.sparse = plan_sparse(options, padding.bool(), slots < lengths - 1, known)
    with torch.no_grad(), observing(model, evictor):
        model.get_decoder()(
            input_ids=torch.cat([ids, guess], dim=1)[:, known:],
            attention_mask=padding,
            position_ids=(padding.cumsum(-1) - 1).clamp(min=0)[:, known:],
            past_key_values=cache,
            use_cache=True,
        )
    if len(evictor.kept) < len(cache.layers):
        raise ModelError(
            f"Only {len(evictor.kept)} of {len(cache.layers)} layers of this model "
            f"({model.config.model_type}) call transformers' attention interface, so SpecKV cannot "
            "see what they look at. Use SpecPC, or a model whose layers do."
        )
    filled = evictor.filled
    start_mask = mask.clone()  # sliding windows see every token, evicted layers only the slots
    if not options.uneven:  # uneven layers need no mask
        start_mask[:, columns - 1 - filled.shape[1] : columns - 1] = filled.long()
    start = Start(cache, ids[:, -1:], start_mask, (lengths - 1).unsqueeze(1))
    pads = columns - lengths
    kept, counts = tuple(evictor.kept), tuple(evictor.counts)
    return Eviction(start, tuple(evictor.scores), kept, counts, filled, pads)


def token_capacity(options: SpecKV, tokens: int, fixed: int = 0) -> int:
    """The one place where a cache budget becomes an integer.

    Args:
        options: `capacity`, or `ratio` of the entries that compete.
        tokens: Of the prompt.
        fixed: Protected ones among them, which a ratio does not count.
    """
    if options.ratio is None:
        assert options.capacity is not None  # the options' validator sets one of the two
        return options.capacity
    return fixed + max(1, round((tokens - fixed) * options.ratio))


def _pad_right(
    rows: Sequence[torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max((row.numel() for row in rows), default=0)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : row.numel()] = row
        mask[index, : row.numel()] = 1
    return ids.to(device), mask.to(device)


class _Evictor:
    """Attention callback: scores a layer's keys and tells its cache what to keep."""

    def __init__(
        self,
        padding: torch.Tensor,
        columns: int,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        options: SpecKV,
    ) -> None:
        self.cache: Any = None
        self.begin = 0  # columns read in an earlier pass
        self.sparse: SparsePrefill | None = None  # None: the model's own, dense attention
        self.padding, self.columns, self.options = padding, columns, options
        self.scorer = SCORERS[options.scorer]
        self.capacity = int(slots.max())
        place = torch.arange(columns, device=padding.device)
        self.real = place >= (columns - lengths).unsqueeze(1)  # (batch, columns)
        # the window: the last W prompt tokens before the final one, cut to what the row may keep
        self.window = torch.clamp(slots, max=options.window_size).unsqueeze(1)
        self.slots = slots.unsqueeze(1)
        self.before_last = self.real & (place < columns - 1)
        self.fixed = self.before_last & (place >= columns - 1 - self.window)
        self.candidates = self.before_last & ~self.fixed
        self.always = torch.zeros_like(self.fixed)  # seen by all later queries of a sparse prefill
        self.filled = torch.arange(self.capacity, device=padding.device) >= (
            self.capacity - self.slots
        )
        rows = min(options.window_size + 1 + padding.shape[1] - columns, padding.shape[1])
        newest = torch.arange(padding.shape[1] - rows, padding.shape[1], device=padding.device)
        # a row observes if it is no padding and, in the prompt, within W + 1 of its end
        self.observes = padding[:, newest] & (newest >= columns - 1 - options.window_size)
        self.scores: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self.holders: dict[int, int] = {}  # address of a layer's keys -> the layer
        self.given: dict[int, torch.Tensor] = {}  # layer -> (batch, kv_heads, columns) prepared
        self.budgets: dict[int, torch.Tensor] = {}  # uneven layer -> (batch,) entries a head

    def protect(self, entries: torch.Tensor) -> None:
        """Keep these (batch, columns) instead of the window, which then competes like the rest."""
        self.fixed = self.always = self.before_last & entries
        self.candidates = self.before_last & ~self.fixed

    def prepare(
        self,
        prepare: Prepare,
        model: PreTrainedModel,
        prompts: Sequence[torch.Tensor],
        requests: Sequence[torch.Tensor],
        memory: Memory | None,
    ) -> None:
        """Let the scorer look at each prompt by itself before they are read."""
        for row, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
            begin = self.columns - prompt.numel()
            candidates = self.candidates[row, begin:].to(prompt.device)
            if not bool(candidates.any()):
                continue
            known = memory if len(prompts) == 1 else None
            for layer, scores in prepare(model, prompt, candidates, request, known).items():
                empty = scores.new_zeros(len(prompts), scores.shape[0], self.columns)
                self.given.setdefault(layer, empty)[row, :, begin:] = scores

    def share_out(self) -> None:
        """Settle how much each uneven layer of the cache may keep."""
        places = [i for i, la in enumerate(self.cache.layers) if isinstance(la, UnevenLayer)]
        slope = self.options.pyramid_slope if self.options.layer_budgets == "pyramid" else 0.0
        rows = torch.stack([self.slots[:, 0], self.fixed.sum(1), self.candidates.sum(1)], dim=1)
        shares = [
            layer_budgets(capacity, fixed, candidates, len(places), slope)
            for capacity, fixed, candidates in rows.tolist()
        ]
        for layer, budget in zip(places, zip(*shares, strict=True), strict=True):
            self.budgets[layer] = torch.tensor(budget, device=self.slots.device)

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        key, value, queries = call.key, call.value, self.begin + call.query.shape[2]
        layer = self.cache.layers[call.layer]
        if not isinstance(layer, EvictedLayer):
            nothing = torch.empty(*key.shape[:2], 0)
            kept, counts = nothing.long(), torch.zeros(key.shape[:2], dtype=torch.int64)
            if isinstance(layer, WindowLayer):
                layer.keep_newest(key, value, self.columns - 1)
            else:  # looks at the keys of an earlier layer, and so at what that keeps
                source = self.holders[key.data_ptr()]
                kept, counts = self.kept[source], self.counts[source]
            self._note(call, nothing, kept, counts)
            return None

        def attention(first: int, last: int) -> torch.Tensor:
            found, _ = call.probabilities(self.padding, queries - first, last - first)
            return found[..., : self.columns]

        view = LayerView(
            layer=call.layer,
            key=key[:, :, : self.columns],
            real=self.real,
            observes=self.observes,
            begin=self.begin,
            queries=queries,
            reduction=self.options.reduction,
            seed=self.options.seed,
            attention=attention,
            given=self.given.get(call.layer),
        )
        pooled = self._pool(self.scorer.score(view))
        if isinstance(layer, UnevenLayer):
            floor = self.options.head_floor if self.options.head_budgets == "adaptive" else 1.0
            kept, counts = choose_entries(pooled, self.fixed, self.budgets[call.layer], floor)
        else:
            kept, counts = self._choose(pooled), self.slots.expand(-1, key.shape[1])
        layer.keep(key, value, kept, self.columns - 1, counts)
        self._note(call, pooled, kept, counts)
        if self.sparse is None:
            return None
        return self.sparse.attend(call, pooled, self.always)

    def _note(
        self, call: AttentionCall, scores: torch.Tensor, kept: torch.Tensor, counts: torch.Tensor
    ) -> None:
        self.holders[call.key.data_ptr()] = len(self.kept)
        self.scores.append(scores.cpu())
        self.kept.append(kept.cpu())
        self.counts.append(counts.cpu())

    def _pool(self, scores: torch.Tensor) -> torch.Tensor:
        """Pool over candidates only: nothing outside for max, zeros outside for mean."""
        size, how = self.options.kernel_size, self.options.pool
        how = how if self.scorer.pooled else None
        outside = ~self.candidates.unsqueeze(1)
        if how == "max":
            scores = scores.masked_fill(outside, float("-inf"))
            scores = functional.max_pool1d(scores, size, stride=1, padding=size // 2)
        elif how == "mean":
            scores = scores.masked_fill(outside, 0.0)
            scores = functional.avg_pool1d(scores, size, stride=1, padding=size // 2)
        return scores.masked_fill(outside, float("-inf"))

    def _choose(self, pooled: torch.Tensor) -> torch.Tensor:
        """(batch, kv_heads, slots) columns, ascending; unfilled slots stand in front."""
        wanted = torch.where(self.fixed.unsqueeze(1), float("inf"), pooled)
        order = wanted.argsort(dim=-1, descending=True, stable=True)[..., : self.capacity]
        place = torch.arange(self.capacity, device=order.device)
        spare = (place >= self.slots).unsqueeze(1)  # (batch, 1, slots)
        return order.masked_fill(spare, -1).sort(-1).values.clamp(min=0)
