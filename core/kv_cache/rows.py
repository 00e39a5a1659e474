"""Rows that a model continues side by side: they join while others go on, and leave at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from ..runtime.limits import check_deadline
from .batch import columns_of, join_caches, trim
from .layers import attending
from .prefill import Start


class Rows:
    """A batch with its KV cache, which lives as long as this object, and what each row feeds next.

    Args:
        model: Any causal model.
        start: Where it begins; all rows end in the same column.
    """

    def __init__(self, model: PreTrainedModel, start: Start) -> None:
        self.model, self.cache = model, start.cache
        self.next = start.feed  # (rows, new) int64
        self.mask = start.mask  # (rows, seen + new) int64, 0 at padding
        self.positions = start.positions  # (rows, new) int64

    def read(self) -> torch.Tensor:
        """Read what each row feeds; (rows, vocabulary) logits of what follows."""
        check_deadline()
        with torch.no_grad(), attending(self.model, self.cache):
            logits: torch.Tensor = self.model(
                input_ids=self.next,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    def feed(self, tokens: Sequence[int]) -> None:
        """Give each row its next token, which is read in the next pass."""
        self.next = torch.tensor(tokens, device=self.mask.device).unsqueeze(1)
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Sequence[int]) -> None:
        """Let only some rows go on; the others' share of the cache is freed."""
        if len(rows) == len(self.mask):
            return
        places = torch.tensor(rows, device=self.mask.device)
        # it selects too, and every kind of layer has it
        self.cache.reorder_cache(cast(torch.LongTensor, places))
        self.next, self.mask = self.next[places], self.mask[places]
        self.positions = self.positions[places]
        spare = int(self.mask.any(0).long().argmax())  # columns that are padding in every row
        if spare and trim(self.cache, spare):
            self.mask = self.mask[:, spare:]

    def drop(self) -> None:
        """Free the cache; nothing can be read any more."""
        self.cache = Cache(layers=[])

    def join(self, other: Rows) -> None:
        """Take in other rows behind these; they are empty afterwards.

        Both caches are such as `can_go_on_together` names, and both feed one token.
        """
        counts = len(self.mask), len(other.mask)
        sizes = columns_of(self.cache), columns_of(other.cache)
        places = [list(range(counts[0])), list(range(counts[0], sum(counts)))]
        self.cache = join_caches(self.model, [self.cache, other.cache], places)
        columns = max(sizes) + 1
        masks = [
            functional.pad(rows.mask[:, -size - 1 :], (columns - size - 1, 0))
            for rows, size in zip((self, other), sizes, strict=True)
        ]
        self.mask, self.next = torch.cat(masks), torch.cat([self.next, other.next])
        self.positions = torch.cat([self.positions, other.positions])
