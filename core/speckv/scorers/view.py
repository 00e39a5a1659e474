"""What a scorer may look at in one layer while the target reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...config import Pool


@dataclass(frozen=True, slots=True, eq=False)
class LayerView:
    """One attention layer over left-padded prompts and, behind them, lookaheads.

    Shapes: `key` is (batch, kv_heads, columns, head_dim), prompt columns only; `real` (batch,
    columns) is False at padding; `observes` (batch, rows) says which of the newest `rows` queries
    observe. `attention(first, last)` gives the probabilities of queries first..last-1, counted over
    prompt and lookahead, as (batch, heads, last - first, columns) float32; queries below `begin`
    went by in an earlier pass and cannot be asked. `given` (batch, kv_heads, columns) is what the
    scorer's `prepare` has found.
    """

    layer: int
    key: torch.Tensor
    real: torch.Tensor
    observes: torch.Tensor
    begin: int  # first query of the pass
    queries: int  # end of the pass, lookahead included
    reduction: Pool
    seed: int
    attention: Callable[[int, int], torch.Tensor]
    given: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of newest queries among which the observers are."""
        return self.observes.shape[1]

    def per_kv_head(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(batch, heads, rows, columns) -> (batch, kv_heads, group x rows, columns)."""
        batch, heads, rows, columns = probabilities.shape
        kv_heads = self.key.shape[1]
        return probabilities.reshape(batch, kv_heads, heads // kv_heads * rows, columns)
