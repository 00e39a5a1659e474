"""What was kept of a prompt's beginning once, for all questions that follow it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import ModelError
from .layers import cache_bytes
from .prefill import Start
from .prefix import Memory


@dataclass(frozen=True, slots=True, eq=False)
class EvictedMemory(Memory):
    """A beginning of which only some KV entries are left; they cannot be evicted further."""

    kept: Start  # where reading goes on: the evicted cache, and the beginning's last token
    whole_entry: int  # bytes of one token in a full cache

    @property
    def bytes(self) -> int:
        """Size of the keys and values that are left."""
        return cache_bytes(self.kept.cache)

    @property
    def entry_bytes(self) -> int:
        """Size of one token in a working cache: keys and values of all layers and heads."""
        return self.whole_entry

    def start(self, model: PreTrainedModel, prompt: torch.Tensor) -> Start:
        """Where reading a prompt goes on: a copy of what is left, and what follows it.

        Raises:
            ModelError: The prompt does not begin with what was read.
        """
        size = self.ids.numel()
        if self.shared(prompt, leave=0) < size:
            raise ModelError(
                "The prompt differs from what was read before its end, and of that only a part is "
                "left: read the passages again."
            )
        kept = deepcopy(self.kept)
        more = prompt[size:].to(model.device).unsqueeze(0)  # (1, new)
        places = torch.arange(size, prompt.numel(), device=model.device).unsqueeze(0)
        return Start(
            kept.cache,
            torch.cat([kept.feed, more], dim=1),
            torch.cat([kept.mask, torch.ones_like(more)], dim=1),
            torch.cat([kept.positions, places], dim=1),
        )
