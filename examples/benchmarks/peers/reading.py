"""What a model expects of a known answer, as in draftsieve's `core/evaluation/likelihood.py`.

torch alone: it runs in the peers' environments.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch


def expected_answer(
    model: Any, cache: Any, feed: torch.Tensor, first: int, reference: list[int]
) -> torch.Tensor:
    """Read an answer behind a cache, as if the model had said it; the cache stays as it is.

    Args:
        model: A causal model.
        cache: What it holds of the prompt.
        feed: (1, tokens) the rest of the prompt.
        first: The position of the first of these.
        reference: The answer's tokens.

    Returns:
        (reference, vocabulary) float32, logarithms of probabilities.
    """
    told = torch.cat([feed, torch.tensor([reference[:-1]], dtype=feed.dtype)], dim=1)
    places = torch.arange(first, first + told.shape[1]).unsqueeze(0)
    out = model(input_ids=told, past_key_values=deepcopy(cache), position_ids=places)
    found: torch.Tensor = out.logits[0, -len(reference) :].float().log_softmax(-1)
    return found


def compared(full: torch.Tensor, expected: torch.Tensor, reference: list[int]) -> dict[str, float]:
    """Log-likelihood of an answer, and the divergence from what the full cache expects.

    Args:
        full: `expected_answer` behind the full cache.
        expected: The same behind another one.
        reference: The answer's tokens.

    Returns:
        Both as means over the tokens, in nats.
    """
    said = torch.tensor(reference).unsqueeze(1)  # (reference, 1)
    surplus = full.double() - expected.double()  # (reference, vocabulary)
    return {
        "log_likelihood": float(expected.gather(1, said).mean()),
        "divergence": max(0.0, float((full.double().exp() * surplus).sum(-1).mean())),
    }
