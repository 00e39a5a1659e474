"""`Compressor`: the draft alone. Question and passages in, shorter passages out.

encode -> read with the draft -> rank the units -> fit the budget. Nothing here needs a target.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DEFAULT_METHOD, OnError, SpecPC
from .errors import OutOfMemoryError, PromptError
from .kv_cache.prefix import Memory
from .models.loading import (
    AnyQuantization,
    accept,
    context_window,
    explain_out_of_memory,
    load_model,
)
from .prompt.encoder import PromptEncoder, PromptTokens
from .prompt.messages import DEFAULT_SYSTEM, Prompt
from .runtime.deadline import deadline_after, until
from .runtime.worker import Worker
from .speckv.lookahead import greedy
from .specpc.draft_scores import guess, read_draft
from .specpc.head_weights import head_weights
from .specpc.pipeline import Compressed, Shortener, asking_rows
from .specpc.result import unchanged
from .types import CompressedContext, DraftReading, Passage

logger = logging.getLogger(__name__)


class Compressor:
    """Shortens retrieved passages with a draft model's attention (SpecPC).

    Safe to use from several threads at once.

    Args:
        model: The draft, any causal model of transformers' attention interface.
        tokenizer: Its tokenizer (with a fast backend).
        template_options: Extra arguments of the chat template, such as `enable_thinking`.
        progress: Show a bar while several prompts are read, or one beyond the draft's window.
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
        self.worker = Worker()  # runs the asynchronous calls

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        quantization: AnyQuantization | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
    ) -> Compressor:
        """Load the draft: "builtin:draft", a folder, a GGUF file or a hub id (see `load_model`).

        `progress=False` turns all bars off, while loading and later.

        Raises:
            ModelNotFoundError: There is no such model.
        """
        loaded = load_model(
            model,
            gguf_file=gguf_file,
            revision=revision,
            quantization=quantization,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
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
            method: Budget and options; None means `DEFAULT_METHOD`: whole sentences, 0.35 of the
                passages' tokens. `SpecPC()` has the paper's settings: single tokens, 1,024 of the
                whole prompt.
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
        """`compress` in the compressor's worker thread; the event loop stays free.

        Such calls wait for each other. Cancelling the task ends the reading at the next layer.
        """
        return await self.worker.run(
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
        return self.compress_prompts(
            [prompt], method, on_error=on_error, max_new_tokens=[max_new_tokens]
        )[0]

    def compress_prompts(
        self,
        prompts: Sequence[Prompt],
        method: SpecPC | None = None,
        *,
        on_error: OnError = "raise",
        max_new_tokens: Sequence[int | None] | None = None,
    ) -> list[Compressed]:
        """`compress_prompt` for several prompts, which the draft reads as a batch.

        Each gets what it gets alone, and with `on_error="original"` each fails alone.

        Args:
            prompts: The prompts.
            method: As for `compress`.
            on_error: As for `compress`.
            max_new_tokens: One for each prompt, see `compress_prompt`.
        """
        method = method or DEFAULT_METHOD
        if method.head_weights is not None:  # a missing file is no fault of a single request
            head_weights(self.model, method.head_weights)
        shorten = Shortener(self.model, self.encoder, self.read)
        return shorten(prompts, method, on_error, max_new_tokens)

    def read(
        self, prompts: Sequence[PromptTokens], method: SpecPC, lookaheads: Sequence[int]
    ) -> list[DraftReading]:
        """The draft's reading of prompts as a batch.

        Args:
            prompts: What `encoder` made of the prompts; each must fit the draft's window.
            method: Options of SpecPC.
            lookaheads: Tokens that the draft guesses, one number for each prompt.
        """
        with self._bar(len(prompts)) as bar:
            return read_draft(
                self.model,
                [prompt.ids for prompt in prompts],
                method,
                lookahead_tokens=lookaheads,
                windows=[asking_rows(prompt, method.window_size) for prompt in prompts],
                done=bar.update,
            )

    def guess(self, prompt: Prompt, tokens: int, memory: Memory | None = None) -> torch.Tensor:
        """The draft's greedy answer to a prompt, (guessed,) int64 ids of the draft's tokenizer.

        Args:
            prompt: Messages and passages.
            tokens: Most tokens of the answer.
            memory: What the draft already knows of the prompt's beginning.

        Raises:
            PromptError: The prompt exceeds the draft's window.
        """
        if memory is None:
            return self.guess_many([prompt], [tokens])[0]
        ids, room = self._room(self.encoder.encode(prompt), tokens)
        return greedy(self.model, ids, room, memory.start(self.model, ids))

    def guess_many(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[int],
        known: Sequence[PromptTokens] | None = None,
    ) -> list[torch.Tensor]:
        """`guess` for several prompts, which the draft reads and answers as a batch.

        Args:
            prompts: The prompts.
            tokens: Most tokens of each answer.
            known: What this compressor's encoder makes of the prompts, where somebody knows it.
        """
        encoded = known or [self.encoder.encode(prompt) for prompt in prompts]
        asked = [self._room(*each) for each in zip(encoded, tokens, strict=True)]
        ids, room = [ids for ids, _ in asked], [room for _, room in asked]
        try:
            with self._bar(len(asked)) as bar, explain_out_of_memory(draft=self.model):
                return guess(self.model, ids, room, done=bar.update)
        except OutOfMemoryError:
            if len(asked) == 1:
                raise
        return [guess(self.model, [row], most)[0] for row, most in zip(ids, room, strict=True)]

    def _room(self, prompt: PromptTokens, tokens: int) -> tuple[torch.Tensor, int]:
        """A prompt's ids, and how many tokens its answer may have."""
        ids = prompt.ids
        window = context_window(self.model)
        if window is not None and ids.numel() >= window:
            raise PromptError(
                f"The prompt has {ids.numel()} tokens, the draft reads at most {window} and so "
                "cannot guess an answer: compress the prompt first (SpecKVPC)."
            )
        return ids, tokens if window is None else min(tokens, window - ids.numel())

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
        """`guess_answer` in the compressor's worker thread; the event loop stays free."""
        return await self.worker.run(
            self.guess_answer, question, passages, tokens, system=system, on_error=on_error
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text under the draft's tokenizer, without special tokens."""
        return self.encoder.count(text)

    def _bar(self, prompts: int) -> tqdm[Any]:
        """A bar over the prompts that the draft reads; hidden for a single one."""
        hidden = not self.progress or prompts < 2
        return tqdm(total=prompts, desc="Draft reads", leave=False, disable=hidden)

    def _unreadable(self, passages: Sequence[str | Passage], error: Exception) -> CompressedContext:
        """The originals, for a request that cannot even become a prompt."""
        logger.warning("Compression failed, the passages stay whole: %s", error)
        prompt = Prompt.from_question("?", passages)
        tokens = self.encoder.encode(prompt)
        return unchanged(prompt, tokens, fallback=f"{type(error).__name__}: {error}")
