"""Keys and values of a prompt's beginning, kept outside any working cache.

A memory is read once and never changed: each question copies what it needs, so that nothing one
question evicts is lost to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from .layers import StoppableCache, full_states, require_full_attention
from .prefill import Start
from .storage import Storage, StoredLayer, StoredStates


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What a model made of its first tokens, on the CPU."""

    ids: torch.Tensor  # (tokens,) int64
    layers: tuple[StoredLayer, ...]

    @property
    def bytes(self) -> int:
        """Size of keys and values as they are stored."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def entry_bytes(self) -> int:
        """Size of one token in a working cache: keys and values of all layers and heads."""
        return sum(layer.entry_bytes for layer in self.layers)

    def shared(self, prompt: torch.Tensor, leave: int = 1) -> int:
        """How many first tokens of a prompt it holds, leaving at least `leave` to be read."""
        size = min(self.ids.numel(), prompt.numel() - leave)
        if size <= 0:
            return 0
        differs = (self.ids[:size] != prompt[:size]).nonzero()
        return int(differs[0]) if len(differs) else size

    def part(self, size: int) -> list[StoredLayer]:
        """Keys and values of the first `size` tokens, per layer; views, nothing is copied."""
        return [layer.first(size) for layer in self.layers]

    def start(self, model: PreTrainedModel, prompt: torch.Tensor) -> Start:
        """Where reading a prompt goes on: a copy of the shared part, and the rest to feed."""
        size = self.shared(prompt)
        ids = prompt.to(model.device).unsqueeze(0)
        positions = torch.arange(size, prompt.numel(), device=model.device).unsqueeze(0)
        return Start(self.copy(model, size), ids[:, size:], torch.ones_like(ids), positions)

    def copy(self, model: PreTrainedModel, size: int) -> DynamicCache:
        """A working cache of the first `size` tokens."""
        cache = StoppableCache(config=model.config)
        for index, layer in enumerate(self.part(size) if size else []):
            cache.update(layer.keys.whole(model.device), layer.values.whole(model.device), index)
        return cache


def read_memory(
    model: PreTrainedModel,
    ids: torch.Tensor,
    storage: Storage = "memory",
    known: Memory | None = None,
) -> Memory:
    """Read tokens once and keep all their keys and values.

    Args:
        model: Full attention in every layer.
        ids: (tokens,) int64.
        storage: "memory" keeps the model's own numbers, "int8" rounds them (see `storage.py`).
        known: A memory of the same storage; what it shares with the tokens is not read again.

    Raises:
        ModelError: A layer is not plain full attention.
    """
    require_full_attention(model)
    size = 0 if known is None else known.shared(ids)
    cache = StoppableCache(config=model.config) if known is None else known.copy(model, size)
    with torch.no_grad():
        model.get_decoder()(
            input_ids=ids[size:].unsqueeze(0).to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
    new = [
        StoredLayer(*(StoredStates.of(states[:, :, size:], storage) for states in pair))
        for pair in full_states(cache)
    ]
    if known is not None:
        pairs = zip(known.part(size), new, strict=True)
        new = [old.followed_by(more) for old, more in pairs]
    return Memory(ids.cpu(), tuple(new))
