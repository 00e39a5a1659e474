"""How likely a target finds a known answer: much finer than whether its own answer is right.

The answer is fed token by token as if the target had said it (teacher forcing), in one pass and
without generating; every figure is a mean over the answer's tokens, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import PromptError
from ..kv_cache.layers import attending
from ..kv_cache.prefill import Start, from_scratch


@dataclass(frozen=True, slots=True, eq=False)
class AnswerReading:
    """What a target expected at each token of an answer, given what it had read before."""

    answer: torch.Tensor  # (answer,) int64
    expected: torch.Tensor  # (answer, vocabulary) float32, logarithms of probabilities

    @property
    def log_likelihood(self) -> float:
        """Mean log-probability of the answer's tokens."""
        return float(self.expected.gather(1, self.answer.unsqueeze(1)).mean())


def read_answer(
    target: PreTrainedModel, begun: torch.Tensor | Start, answer: torch.Tensor
) -> AnswerReading:
    """Let a target read an answer behind a prompt, or behind what a method kept of it.

    Args:
        target: The model that would answer.
        begun: (tokens,) int64 the whole or a shortened prompt; or where decoding of one prompt
            would begin, such as an evicted cache, to which prompt and answer are appended.
        answer: (answer,) int64, the target's tokens, at least one.

    Raises:
        PromptError: The answer has no token.
    """
    if not answer.numel():
        raise PromptError("The reference answer has no token: give one to be read.")
    start = begun if isinstance(begun, Start) else from_scratch(target, [begun])
    said = answer.to(start.feed.device).unsqueeze(0)  # (1, answer)
    more = torch.arange(1, said.shape[1], device=said.device)
    with torch.no_grad(), attending(target, start.cache):
        logits = target(
            input_ids=torch.cat([start.feed, said[:, :-1]], dim=1),
            attention_mask=torch.cat([start.mask, torch.ones_like(said[:, :-1])], dim=1),
            position_ids=torch.cat([start.positions, start.positions[:, -1:] + more], dim=1),
            past_key_values=start.cache,
            use_cache=True,
            logits_to_keep=said.shape[1],
        ).logits[0]  # (answer, vocabulary)
    return AnswerReading(answer.cpu(), logits.float().log_softmax(-1).cpu())


def divergence(full: AnswerReading, other: AnswerReading) -> float:
    """Mean Kullback-Leibler divergence of what is expected after `other` from what is after `full`.

    Args:
        full: After the whole context.
        other: After what a method kept of it; the same answer.

    Returns:
        At least 0; 0 where both expect the same.
    """
    surplus = full.expected.double() - other.expected.double()  # (answer, vocabulary)
    return max(0.0, float((full.expected.double().exp() * surplus).sum(-1).mean()))
