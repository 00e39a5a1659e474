"""Keys and values of a prompt's beginning, kept outside any working cache.

A memory is read once and never changed: each question copies what it needs, so that nothing one
question evicts is lost to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from .cache import full_states, require_full_attention
from .decode import Start


@dataclass(frozen=True, slots=True)
class Memory:
    """What a model made of its first tokens, on the CPU."""

    ids: torch.Tensor  # (tokens,) int64
    keys: tuple[torch.Tensor, ...]  # per layer (1, kv_heads, tokens, head_dim)
    values: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        """Size of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def shared(self, prompt: torch.Tensor, leave: int = 1) -> int:
        """How many first tokens of a prompt it holds, leaving at least `leave` to be read."""
        size = min(self.ids.numel(), prompt.numel() - leave)
        if size <= 0:
            return 0
        differs = (self.ids[:size] != prompt[:size]).nonzero()
        return int(differs[0]) if len(differs) else size

    def part(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first `size` tokens, per layer."""
        pairs = zip(self.keys, self.values, strict=True)
        return [(keys[:, :, :size], values[:, :, :size]) for keys, values in pairs]

    def start(self, model: PreTrainedModel, prompt: torch.Tensor) -> Start:
        """Where reading a prompt goes on: a copy of the shared part, and the rest to feed."""
        size = self.shared(prompt)
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(self.part(size)):
            if size:
                cache.update(keys.to(model.device), values.to(model.device), layer)
        ids = prompt.to(model.device).unsqueeze(0)
        positions = torch.arange(size, prompt.numel(), device=model.device).unsqueeze(0)
        return Start(cache, ids[:, size:], torch.ones_like(ids), positions)


def read_memory(model: PreTrainedModel, ids: torch.Tensor) -> Memory:
    """Read tokens once and keep all their keys and values.

    Args:
        model: Full attention in every layer.
        ids: (tokens,) int64.

    Raises:
        ModelError: A layer is not plain full attention.
    """
    require_full_attention(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.get_decoder()(
            input_ids=ids.unsqueeze(0).to(model.device), past_key_values=cache, use_cache=True
        )
    states = full_states(cache)
    return Memory(
        ids.cpu(),
        tuple(keys.cpu() for keys, _ in states),
        tuple(values.cpu() for _, values in states),
    )
