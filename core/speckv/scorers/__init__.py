"""How KV entries are scored, one file a method, chosen by name (`SpecKV(scorer=...)`).

A scorer is a function from a `LayerView` to (batch, kv_heads, columns) scores; higher stays.
Budget, protection, pooling and eviction are the same for all (`core/speckv.py`). A method's
lookahead says whose guess the target reads behind the prompt; with "request" it is a text that
`prepare` needs, which finds scores before the prompt is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...config import Method, stages
from ...kv_cache.prefix import Memory
from . import attention, h2o, key_norm, kvzip, random_scores, streaming, tova
from .view import LayerView

Lookahead = Literal["draft", "none", "compressed", "target", "request"]
Prepare = Callable[
    [PreTrainedModel, torch.Tensor, torch.Tensor, torch.Tensor, Memory | None],
    Mapping[int, torch.Tensor],
]  # target, prompt, its candidates, request, memory -> per layer (kv_heads, tokens) scores


@dataclass(frozen=True, slots=True)
class KVScorer:
    """A method that decides which KV entries stay."""

    score: Callable[[LayerView], torch.Tensor]
    lookahead: Lookahead
    pooled: bool = True  # whether `SpecKV.pool` applies
    prepare: Prepare | None = None

    @property
    def asks(self) -> bool:
        """Whether what is read behind the prompt scores its entries."""
        return self.score is attention.score


SCORERS: Mapping[str, KVScorer] = {
    "speckv": KVScorer(attention.score, "draft"),
    "snapkv": KVScorer(attention.score, "none"),
    "laq": KVScorer(attention.score, "compressed"),
    "oracle": KVScorer(attention.score, "target"),
    "kvzip": KVScorer(kvzip.score, "request", pooled=False, prepare=kvzip.reconstruct),
    "tova": KVScorer(tova.score, "none", pooled=False),
    "h2o": KVScorer(h2o.score, "none", pooled=False),
    "streaming": KVScorer(streaming.score, "none", pooled=False),
    "key_norm": KVScorer(key_norm.score, "none", pooled=False),
    "random": KVScorer(random_scores.score, "none", pooled=False),
}


def needs_draft(method: Method | None) -> bool:
    """Whether a method reads with a draft model: SpecPC does, and scorers that use its guess."""
    specpc, speckv = stages(method)
    guessing = speckv is not None and SCORERS[speckv.scorer].lookahead == "draft"
    return specpc is not None or guessing


__all__ = ["SCORERS", "KVScorer", "LayerView", "Lookahead", "Prepare", "needs_draft"]
