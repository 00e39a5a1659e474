"""Keys and values at rest: as the model made them, or as int8 with a scale for each vector.

Eight bits: every key and value vector (one token, one head) is divided by a 127th of its largest
magnitude and rounded. No number is then off by more than a 254th of that magnitude (besides what
the model's own type rounds), whatever the other tokens are, and more tokens can be added without
touching the stored ones. Size: one byte a number and one number of the model's type a vector: 28 %
of float32 with 32 numbers a head, 27 % with 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Storage = Literal["memory", "int8"]
LEVELS = 127


@dataclass(frozen=True, slots=True, eq=False)
class StoredStates:
    """One layer's keys or values."""

    data: torch.Tensor  # (1, kv_heads, tokens, head_dim), of the model's dtype or int8
    scale: torch.Tensor | None = None  # (1, kv_heads, tokens, 1) of the model's dtype, for int8

    @classmethod
    def of(cls, states: torch.Tensor, storage: Storage) -> StoredStates:
        """Put (1, kv_heads, tokens, head_dim) states of any device away on the CPU."""
        if storage == "memory":
            return cls(states.cpu())
        scale = states.abs().amax(-1, keepdim=True) / LEVELS
        steps = states.float() / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
        rounded = steps.round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return cls(rounded.cpu(), scale.cpu())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.data.shape[2]

    @property
    def bytes(self) -> int:
        """Size, scales included."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def entry_bytes(self) -> int:
        """Size of one token as the model made it."""
        made = self.data if self.scale is None else self.scale
        return self.data.shape[1] * self.data.shape[3] * made.element_size()

    def first(self, tokens: int) -> StoredStates:
        """The first tokens, as views."""
        scale = None if self.scale is None else self.scale[:, :, :tokens]
        return StoredStates(self.data[:, :, :tokens], scale)

    def whole(self, device: torch.device) -> torch.Tensor:
        """A copy as the model made it: (1, kv_heads, tokens, head_dim)."""
        kind = self.data if self.scale is None else self.scale
        heads, width = self.data.shape[1], self.data.shape[3]
        return self.in_front_of(torch.empty((1, heads, 0, width), dtype=kind.dtype, device=device))

    def in_front_of(self, new: torch.Tensor) -> torch.Tensor:
        """These states, then `new` (1, kv_heads, more, head_dim), on its device and of its dtype.

        Only this one copy is made; int8 is multiplied out into its place.
        """
        size = self.tokens
        out = new.new_empty((*new.shape[:2], size + new.shape[2], new.shape[3]))
        data = self.data.to(new.device)
        if self.scale is None:
            out[:, :, :size] = data
        else:
            torch.mul(data, self.scale.to(new.device), out=out[:, :, :size])
        out[:, :, size:] = new
        return out

    def followed_by(self, more: StoredStates) -> StoredStates:
        """These tokens, then more of the same storage."""
        data = torch.cat([self.data, more.data], dim=2)
        if self.scale is None or more.scale is None:
            return StoredStates(data)
        return StoredStates(data, torch.cat([self.scale, more.scale], dim=2))


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer's keys and values."""

    keys: StoredStates
    values: StoredStates

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.tokens

    @property
    def bytes(self) -> int:
        """Size of both."""
        return self.keys.bytes + self.values.bytes

    @property
    def entry_bytes(self) -> int:
        """Size of one token's key and value in a working cache."""
        return self.keys.entry_bytes + self.values.entry_bytes

    def first(self, tokens: int) -> StoredLayer:
        """The first tokens, as views."""
        return StoredLayer(self.keys.first(tokens), self.values.first(tokens))

    def in_front_of(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """These states and, behind them, new keys and values (1, kv_heads, more, head_dim)."""
        return self.keys.in_front_of(keys), self.values.in_front_of(values)

    def followed_by(self, more: StoredLayer) -> StoredLayer:
        """These tokens, then more of the same storage."""
        return StoredLayer(self.keys.followed_by(more.keys), self.values.followed_by(more.values))
