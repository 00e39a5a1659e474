"""Target decoding: one loop for greedy and sampled answers, alone or in left-padded batches.

Our own loop instead of `model.generate`: each row draws from its own seeded generator (so a
request's output does not depend on what runs beside it), a consumer cancels by closing the
iterator, and nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import (
    Cache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..config import Generation
from ..kv_cache.layers import attending
from ..kv_cache.prefill import Start, from_scratch
from ..runtime.deadline import check_deadline
from .constrained import Constraint
from .speculative.tree_attention import TreeReader, obstacle
from .speculative.verify import Speculation, verified_tokens


def next_tokens(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    generation: Generation | Sequence[Generation],
    start: Start | None = None,
    constraints: Sequence[Constraint | None] | None = None,
    speculation: Speculation | None = None,
) -> Iterator[list[int]]:
    """Generate token by token; close the iterator to stop, which frees the KV cache.

    Args:
        model: The target.
        prompts: One (tokens,) int64 tensor per row.
        generation: Sampling options, of all rows or one for each; the largest `max_new_tokens`
            bounds the steps, end tokens do not.
        start: A prefilled cache; None reads the prompts.
        constraints: Where each row stands in its grammar, or None for rows without one.
        speculation: Drafts for a single row; where the model or the cache cannot verify them, its
            tally says why and decoding goes on without.

    Yields:
        The next token of every row.
    """
    start = start or from_scratch(model, prompts)
    options = _each(generation, len(prompts))
    grammars = constraints or [None] * len(prompts)
    samplers = [_Sampler(*row) for row in zip(prompts, options, grammars, strict=True)]
    feed, mask, positions = start.feed, start.mask, start.positions
    steps = max(row.max_new_tokens for row in options)
    for step in range(steps):
        check_deadline()
        with torch.no_grad(), attending(model, start.cache):
            logits = model(
                input_ids=feed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=start.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]  # (batch, vocabulary)
        chosen = [sampler.choose(row) for sampler, row in zip(samplers, logits, strict=True)]
        yield chosen
        if speculation is not None and _can_verify(model, start.cache, speculation):
            reader = TreeReader(model, start.cache, mask)
            said = prompts[0].tolist()
            rest = verified_tokens(
                reader, samplers[0].choose, speculation, said, chosen[0], steps - 1
            )
            for token in rest:
                yield [token]
            return
        if step + 1 < steps:
            feed = torch.tensor(chosen, device=mask.device).unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1


def _can_verify(model: PreTrainedModel, cache: Cache, speculation: Speculation) -> bool:
    speculation.tally.note = speculation.tally.note or obstacle(model, cache)
    return speculation.tally.note is None


def _each(generation: Generation | Sequence[Generation], rows: int) -> Sequence[Generation]:
    return [generation] * rows if isinstance(generation, Generation) else generation


class _Sampler:
    """Chooses one row's tokens with transformers' logits processors and its own generator."""

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
        """Args: logits (vocabulary,). Returns: a token id."""
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


@dataclass(slots=True)
class RowText:
    """Turns one row's tokens into text as they come, and knows when the row is finished.

    A character whose last bytes never come is left out. Text that may become a stop string is
    held back until that is decided. Where a grammar leaves nothing to say, the row is finished.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    stop: tuple[str, ...]
    limit: int
    constraint: Constraint | None = None
    tokens: int = 0
    finish_reason: str | None = None
    _held: str = ""
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain (often empty)."""
        if self.finish_reason is not None:
            return ""
        self.tokens += 1
        if token in self.ends:
            return self._finish("stop")
        self._held += self._stream.step(self.tokenizer, token) or ""
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            return self._finish("stop_string")
        if self.constraint is not None and self.constraint.complete:
            return self._finish("stop")
        if self.tokens >= self.limit:
            return self._finish("length")
        ready = len(self._held) - self._undecided()
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        text, self._held = self._held, ""
        return text

    def _undecided(self) -> int:
        """Length of the longest tail that a stop string starts with."""
        longest = 0
        for text in self.stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        return longest


def decode_text(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    generation: Generation | Sequence[Generation],
    rows: Sequence[RowText],
    start: Start | None = None,
    speculation: Speculation | None = None,
) -> Iterator[list[str]]:
    """Generate until every row is finished; yields each row's new text at every step."""
    grammars = [row.constraint for row in rows]
    steps = next_tokens(model, prompts, generation, start, grammars, speculation)
    try:
        for chosen in steps:
            yield [row.push(token) for row, token in zip(rows, chosen, strict=True)]
            if all(row.finish_reason is not None for row in rows):
                return
    finally:
        steps.close()  # type: ignore[attr-defined]
