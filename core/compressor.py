"""`Compressor`: the draft alone. Question and passages in, shorter passages out.

encode -> read with the draft -> rank the units -> fit the budget. Nothing here needs a target.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .budget import Budget
from .clock import Clock
from .config import Generation, Quantization, SpecPC
from .context import describe, unchanged
from .deadline import deadline_after, until
from .draft import read_draft
from .encoding import PromptEncoder
from .errors import ModelError, PromptError
from .kept import fit, only_best, rank_units
from .lookahead import greedy
from .memory import Memory
from .models import accept, context_window, explain_out_of_memory, load_model
from .prompt import DEFAULT_SYSTEM, Prompt
from .types import CompressedContext, DraftReading, Passage, PromptTokens
from .windows import group_texts, plan_groups, spread_scores

logger = logging.getLogger(__name__)
OnError = Literal["raise", "original"]


class Compressor:
    """Shortens retrieved passages with a draft model's attention (SpecPC).

    Safe to use from several threads at once.

    Args:
        model: The draft, any causal model of transformers' attention interface.
        tokenizer: Its tokenizer (with a fast backend).
        template_options: Extra arguments of the chat template, such as `enable_thinking`.
        progress: Show a bar while a prompt longer than the draft's window is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_options: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.model = accept(model)
        self.progress = progress
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, template_options)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        quantization: Quantization | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        template_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
    ) -> Compressor:
        """Load the draft: "builtin:draft", a folder or a hub id (see `load_model`).

        `progress=False` turns all bars off, while loading and later.

        Raises:
            ModelNotFoundError: There is no such model.
        """
        loaded = load_model(
            model,
            quantization=quantization,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        return cls(
            loaded.model, loaded.tokenizer, template_options=template_options, progress=progress
        )

    def compress(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: SpecPC | None = None,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> CompressedContext:
        """Shorten passages to what the draft finds important for the question.

        Args:
            question: The user's question, never shortened.
            passages: Retrieved texts, in the order in which the target shall see them.
            method: Budget and options; `SpecPC()` keeps 1,024 draft tokens of the whole prompt.
            system: System text that stands in the prompt, never shortened.
            on_error: "raise", or "original" to get the passages back unchanged, with a logged
                warning and the reason in `stats.fallback`.
            timeout: Seconds after which the request fails, checked between the draft's layers;
                None for no limit.

        Returns:
            Passages in their order, kept spans in characters of the originals, and sizes. No
            passages give an empty context. No passage ever grows.

        Raises:
            PromptError: The question is empty, or cannot be put into a prompt.
            BudgetError: Question and system text exceed the capacity.
            OutOfMemoryError: The draft's pass does not fit into memory.
            RequestTimeoutError: The time is up.
        """
        try:
            prompt = Prompt.from_question(question, passages, system=system)
        except ValueError as error:
            if on_error == "raise":
                raise
            return self._unreadable(passages, error)
        with until(deadline_after(timeout)):
            return self.compress_prompt(prompt, method, on_error=on_error)[1]

    async def acompress(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: SpecPC | None = None,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> CompressedContext:
        """`compress` in a worker thread; the event loop stays free."""
        return await asyncio.to_thread(
            self.compress,
            question,
            passages,
            method,
            system=system,
            on_error=on_error,
            timeout=timeout,
        )

    def compress_prompt(
        self,
        prompt: Prompt,
        method: SpecPC | None = None,
        *,
        on_error: OnError = "raise",
        max_new_tokens: int | None = None,
    ) -> tuple[Prompt, CompressedContext]:
        """Shorten the passages of a chat prompt; everything else stays as it is.

        Args:
            prompt: Messages and passages.
            method: As for `compress`.
            on_error: As for `compress`.
            max_new_tokens: Length of the lookahead when `method.lookahead_tokens` is None.

        Returns:
            The prompt with shorter passages, and the context that describes them.
        """
        try:
            with explain_out_of_memory(draft=self.model):
                return self._compress(prompt, method or SpecPC(), max_new_tokens)
        except Exception as error:
            if on_error == "raise":
                raise
            logger.warning("Compression failed, the passages stay whole: %s", error, exc_info=True)
            tokens = self.encoder.encode(prompt)
            return prompt, unchanged(prompt, tokens, fallback=f"{type(error).__name__}: {error}")

    def guess(self, prompt: Prompt, tokens: int, memory: Memory | None = None) -> torch.Tensor:
        """The draft's greedy answer to a prompt, (guessed,) int64 ids of the draft's tokenizer.

        Args:
            prompt: Messages and passages.
            tokens: Most tokens of the answer.
            memory: What the draft already knows of the prompt's beginning.

        Raises:
            PromptError: The prompt exceeds the draft's window.
        """
        ids = self.encoder.encode(prompt).ids
        window = context_window(self.model)
        if window is not None and ids.numel() >= window:
            raise PromptError(
                f"The prompt has {ids.numel()} tokens, the draft reads at most {window} and so "
                "cannot guess an answer: compress the prompt first (SpecKVPC)."
            )
        room = tokens if window is None else min(tokens, window - ids.numel())
        if memory is not None:
            return greedy(self.model, ids, room, memory.start(self.model, ids))
        return greedy(self.model, ids, room)

    def guess_answer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        tokens: int = 16,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> str:
        """The draft's own answer from passages, right or wrong, as words for a second search.

        Args:
            question: The user's question.
            passages: Retrieved texts; sieved first where the draft cannot read all of them.
            tokens: Most tokens of the answer.
            system: As for `compress`.
            on_error: "raise", or "original" for no answer where the draft fails, with a warning.

        Returns:
            The answer's text; "" if there is none.
        """
        try:
            prompt = Prompt.from_question(question, passages, system=system)
            window = context_window(self.model)
            if window is not None:
                prompt = self.compress_prompt(prompt, SpecPC(capacity=window - tokens))[0]
            with explain_out_of_memory(draft=self.model):
                ids = self.guess(prompt, tokens)
        except Exception as error:
            if on_error == "raise":
                raise
            logger.warning("The draft guessed no answer: %s", error, exc_info=True)
            return ""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    async def aguess_answer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        tokens: int = 16,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> str:
        """`guess_answer` in a worker thread; the event loop stays free."""
        return await asyncio.to_thread(
            self.guess_answer, question, passages, tokens, system=system, on_error=on_error
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text under the draft's tokenizer, without special tokens."""
        return self.encoder.count(text)

    def _compress(
        self, prompt: Prompt, method: SpecPC, max_new_tokens: int | None
    ) -> tuple[Prompt, CompressedContext]:
        clock = Clock()
        with clock("encode"):
            tokens = self.encoder.encode(prompt)
            budget = Budget.of(method, tokens)
        size = int((~tokens.protected).sum())
        whole = size < method.min_tokens or budget.measure(tokens) <= budget.limit
        if not size or (whole and method.max_passages is None):
            return prompt, unchanged(prompt, tokens, seconds=clock.seconds, method=method)
        fixed = len(self.encoder.encode(prompt.with_texts([""] * len(prompt.passages))))
        budget.require_room(fixed)
        room = f"capacity {budget.limit:,}" if budget.whole_prompt else f"ratio {method.ratio}"
        work = f"the draft read a prompt of {len(tokens):,} tokens ({room})"
        with clock("draft"), explain_out_of_memory(work, draft=self.model):
            lookahead = method.lookahead_tokens or max_new_tokens or Generation().max_new_tokens
            reading = self._read(prompt, tokens, fixed, method, lookahead)
            scores = reading.scores
        with clock("select"):
            texts = [passage.text for passage in prompt.passages]
            texts = only_best(texts, tokens, scores, method.max_passages)
            kept = fit(
                texts,
                rank_units(texts, tokens, scores, method),
                limit=budget.limit,
                first_guess=budget.first_guess(tokens),
                measure=lambda short: budget.measure(self.encoder.encode(prompt.with_texts(short))),
                count=self.encoder.count,
                marker=method.gap_marker,
            )
            shorter = prompt.with_texts(kept.texts)
            after = self.encoder.encode(shorter)
        context = describe(
            prompt, shorter, tokens, after, kept.bounds, scores, clock.seconds, method
        )
        return shorter, replace(context, lookahead_ids=tuple(reading.lookahead_ids.tolist()))

    def _read(
        self, prompt: Prompt, tokens: PromptTokens, fixed: int, method: SpecPC, lookahead: int
    ) -> DraftReading:
        """Scores of all tokens; long prompts are read in groups and leave no lookahead."""
        window = context_window(self.model) or len(tokens) + lookahead
        texts = [passage.text for passage in prompt.passages]
        groups = plan_groups(texts, tokens, fixed, window - lookahead)
        if len(groups) == 1:
            return self._read_once(tokens, method, lookahead)
        logger.info("The prompt exceeds the draft's window: %d groups are read.", len(groups))
        scores = torch.zeros(len(tokens))
        for group in tqdm(groups, "Draft reads", leave=False, disable=not self.progress):
            part = self.encoder.encode(prompt.with_texts(group_texts(len(texts), texts, group)))
            found = self._read_once(part, method, lookahead)
            spread_scores(scores, tokens, group, part, found.scores)
        return DraftReading(scores, torch.tensor([], dtype=torch.int64))

    def _read_once(self, tokens: PromptTokens, method: SpecPC, lookahead: int) -> DraftReading:
        options = method.model_copy(update={"window_size": _asking(tokens, method.window_size)})
        ids = tokens.ids.unsqueeze(0)
        reading = read_draft(self.model, ids, options, lookahead_tokens=lookahead)[0]
        if not bool(torch.isfinite(reading.scores).all()):
            raise ModelError("The draft's attention is not finite; try another dtype (float32).")
        return reading

    def _unreadable(self, passages: Sequence[str | Passage], error: Exception) -> CompressedContext:
        """The originals, for a request that cannot even become a prompt."""
        logger.warning("Compression failed, the passages stay whole: %s", error)
        prompt = Prompt.from_question("?", passages)
        tokens = self.encoder.encode(prompt)
        return unchanged(prompt, tokens, fallback=f"{type(error).__name__}: {error}")


def _asking(tokens: PromptTokens, window: int) -> int:
    """At most `window` rows, and none of a passage: only what follows the passages asks."""
    passages = torch.nonzero(~tokens.protected)
    tail = len(tokens) - 1 - int(passages[-1]) if len(passages) else len(tokens)
    return max(1, min(window, tail))
