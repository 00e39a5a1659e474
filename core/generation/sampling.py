"""How a row's next token is chosen: transformers' processors and a generator of its own."""

from __future__ import annotations

from typing import cast

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..config import Generation
from .constrained import Constraint


class Sampler:
    """Chooses one row's tokens; its draws do not depend on what runs beside it.

    Args:
        prompt: (tokens,) int64, which a repetition penalty counts.
        options: Sampling options.
        constraint: Where the row stands in its grammar, or None.
    """

    def __init__(
        self, prompt: torch.Tensor, options: Generation, constraint: Constraint | None = None
    ) -> None:
        self.constraint = constraint
        self.greedy = options.temperature == 0.0
        self.processors = _processors(options)
        self.seen = prompt.tolist() if self.processors else []
        self.generator = torch.Generator()
        if options.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(options.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """Choose the next token; the grammar goes on behind it.

        Args:
            logits: (vocabulary,) of the next token.
        """
        if self.constraint is None:
            return self._pick(logits)
        token = self._pick(self.constraint.mask(logits))
        self.constraint.accept(token)
        return token

    def _pick(self, logits: torch.Tensor) -> int:
        if self.greedy and not self.processors:
            return int(logits.argmax())
        scores = logits.float().cpu().unsqueeze(0)  # (1, vocabulary)
        if self.processors:
            seen = cast(torch.LongTensor, torch.tensor([self.seen]))
            scores = self.processors(seen, cast(torch.FloatTensor, scores))
        if self.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        if self.processors:
            self.seen.append(token)
        return token


def _processors(options: Generation) -> LogitsProcessorList:
    chain = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty=options.repetition_penalty))
    if options.temperature == 0.0:
        return chain
    if options.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k > 0:
        chain.append(TopKLogitsWarper(top_k=options.top_k))
    if options.top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p=options.top_p))
    if options.min_p > 0.0:
        chain.append(MinPLogitsWarper(min_p=options.min_p))
    return chain
