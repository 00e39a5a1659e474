"""From prompts to shorter prompts: what SpecPC does with a batch.

open (encode, plan) -> read with the draft -> close (rank the units, fit the budget).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import Generation, OnError, SpecPC
from ..errors import ModelError, RequestTimeoutError
from ..models.loading import context_window, explain_out_of_memory
from ..prompt.encoder import PromptEncoder, PromptTokens
from ..prompt.messages import Prompt
from ..runtime.clock import Clock
from ..types import CompressedContext, DraftReading
from .chunking import Piece, group_texts, plan_groups, spread_scores
from .fitting import Budget, fit
from .ranking import only_best, rank_units
from .result import describe, unchanged

logger = logging.getLogger(__name__)
Compressed = tuple[Prompt, CompressedContext]
Read = Callable[[Sequence[PromptTokens], SpecPC, Sequence[int]], list[DraftReading]]


@dataclass(slots=True, eq=False)
class _Reading:
    """A prompt that the draft has to read before it can be shortened."""

    prompt: Prompt
    tokens: PromptTokens
    budget: Budget
    clock: Clock
    lookahead: int
    groups: list[list[Piece]]  # none, unless the prompt exceeds the draft's window
    parts: list[PromptTokens]  # what is read: the prompt, or one for each group
    found: DraftReading | Exception | None = None


@dataclass(frozen=True, slots=True)
class Shortener:
    """Shortens the passages of prompts with a draft.

    Args:
        model: The draft.
        encoder: Its prompt encoder.
        read: The draft's reading of prompts, with so many tokens of lookahead each.
    """

    model: PreTrainedModel
    encoder: PromptEncoder
    read: Read

    def __call__(
        self,
        prompts: Sequence[Prompt],
        method: SpecPC,
        on_error: OnError,
        max_new_tokens: Sequence[int | None] | None,
    ) -> list[Compressed]:
        """Arguments and results as of `Compressor.compress_prompts`."""
        lengths = max_new_tokens or [None] * len(prompts)
        opened: list[_Reading | Compressed | Exception] = []
        for prompt, more in zip(prompts, lengths, strict=True):
            with _caught(on_error, opened), explain_out_of_memory(draft=self.model):
                opened.append(self._open(prompt, method, more))
        self._read([work for work in opened if isinstance(work, _Reading)], method, on_error)
        found: list[Compressed | Exception] = []
        for work in opened:
            with _caught(on_error, found):
                found.append(self._close(work, method) if isinstance(work, _Reading) else work)
        return [
            self._whole(prompt, result) if isinstance(result, Exception) else result
            for prompt, result in zip(prompts, found, strict=True)
        ]

    def _open(
        self, prompt: Prompt, method: SpecPC, max_new_tokens: int | None
    ) -> _Reading | Compressed:
        """What the draft has to read of a prompt, or the result where it need not."""
        clock = Clock()
        with clock("encode"):
            tokens = self.encoder.encode(prompt)
            budget = Budget.of(method, tokens)
        size = int((~tokens.protected).sum())
        whole = size < method.min_tokens or budget.measure(tokens) <= budget.limit
        if not size or (whole and method.max_passages is None and method.score_mass is None):
            return prompt, unchanged(prompt, tokens, seconds=clock.seconds, method=method)
        fixed = len(self.encoder.encode(prompt.with_texts([""] * len(prompt.passages))))
        budget.require_room(fixed)
        lookahead = method.lookahead_tokens or max_new_tokens or Generation().max_new_tokens
        window = context_window(self.model) or len(tokens) + lookahead
        groups, parts = [], [tokens]
        if len(tokens) > window - lookahead:
            texts = [passage.text for passage in prompt.passages]
            groups = plan_groups(texts, tokens, fixed, window - lookahead)
            logger.info("The prompt exceeds the draft's window: %d groups are read.", len(groups))
            short = [prompt.with_texts(group_texts(len(texts), texts, group)) for group in groups]
            parts = [self.encoder.encode(part) for part in short]
        return _Reading(prompt, tokens, budget, clock, lookahead, groups, parts)

    def _read(self, works: Sequence[_Reading], method: SpecPC, on_error: OnError) -> None:
        """Let the draft read prompts as a batch; where that fails, each alone."""
        if not works:
            return
        parts = [part for work in works for part in work.parts]
        lookaheads = [work.lookahead for work in works for _ in work.parts]
        clock = Clock()
        try:
            with clock("draft"), explain_out_of_memory(_describe(works, method), draft=self.model):
                readings = iter(self.read(parts, method, lookaheads))
        except Exception as error:
            if len(works) > 1 and not isinstance(error, RequestTimeoutError):
                for work in works:
                    self._read([work], method, on_error)
                return
            if on_error == "raise":
                raise
            for work in works:
                work.found = error
            return
        for work in works:
            work.clock.add(clock.seconds)
            work.found = _whole_reading(work, [next(readings) for _ in work.parts])

    def _close(self, work: _Reading, method: SpecPC) -> Compressed:
        """Choose what stays of a prompt that has been read."""
        if isinstance(work.found, Exception):
            raise work.found
        assert work.found is not None  # `_read` leaves none out
        prompt, tokens, budget, clock = work.prompt, work.tokens, work.budget, work.clock
        reading, scores = work.found, work.found.scores
        if not bool(torch.isfinite(scores).all()):
            raise ModelError("The draft's attention is not finite; try another dtype (float32).")
        with clock("select"):
            texts = [passage.text for passage in prompt.passages]
            texts = only_best(texts, tokens, scores, method.max_passages)
            kept = fit(
                texts,
                rank_units(texts, tokens, scores, method, prompt.question),
                limit=budget.limit,
                first_guess=budget.first_guess(tokens),
                measure=lambda short: budget.measure(self.encoder.encode(prompt.with_texts(short))),
                count=self.encoder.count,
                marker=method.gap_marker if method.positions == "reset" else None,
            )
            shorter = prompt.with_texts(kept.texts)
            after = self.encoder.encode(shorter)
        context = describe(
            prompt, shorter, tokens, after, kept.bounds, scores, clock.seconds, method
        )
        return shorter, replace(context, lookahead_ids=tuple(reading.lookahead_ids.tolist()))

    def _whole(self, prompt: Prompt, error: Exception) -> Compressed:
        """The prompt as it is, for a compression that failed."""
        logger.warning("Compression failed, the passages stay whole: %s", error, exc_info=error)
        tokens = self.encoder.encode(prompt)
        return prompt, unchanged(prompt, tokens, fallback=f"{type(error).__name__}: {error}")


def asking_rows(tokens: PromptTokens, window: int) -> int:
    """At most `window` rows, and none of a passage: only what follows the passages asks."""
    passages = torch.nonzero(~tokens.protected)
    tail = len(tokens) - 1 - int(passages[-1]) if len(passages) else len(tokens)
    return max(1, min(window, tail))


def _describe(works: Sequence[_Reading], method: SpecPC) -> str:
    """What the draft reads and how large it is, for an error message."""
    longest = max(works, key=lambda work: len(work.tokens))
    limit = longest.budget.limit
    room = f"capacity {limit:,}" if longest.budget.whole_prompt else f"ratio {method.ratio}"
    many = "a prompt of" if len(works) == 1 else f"{len(works)} prompts of up to"
    return f"the draft read {many} {len(longest.tokens):,} tokens ({room})"


def _whole_reading(work: _Reading, parts: Sequence[DraftReading]) -> DraftReading:
    """Scores of all tokens; a prompt read in groups leaves no lookahead."""
    if len(parts) == 1:
        return parts[0]
    scores = torch.zeros(len(work.tokens))
    for group, read, found in zip(work.groups, work.parts, parts, strict=True):
        spread_scores(scores, work.tokens, group, read, found.scores)
    return DraftReading(scores, torch.tensor([], dtype=torch.int64))


@contextmanager
def _caught(on_error: OnError, found: list[Any]) -> Iterator[None]:
    """Note an error in place of a result, unless it is to be raised."""
    try:
        yield
    except Exception as error:
        if on_error == "raise":
            raise
        found.append(error)
