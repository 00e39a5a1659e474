"""`Compressor`: the draft alone. Question and passages in, shorter passages out.

encode -> read with the draft -> rank the units -> fit the budget. Nothing here needs a target.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import DEFAULT_METHOD, NEWEST_PRESET, Generation, OnError, SpecPC
from .errors import PromptError
from .models.loading import AnyQuantization, load_model
from .prompt.encoder import PromptEncoder
from .prompt.messages import DEFAULT_SYSTEM, Prompt
from .request import GREEDY, Request
from .runtime.limits import deadline_after, until
from .runtime.worker import Worker
from .specpc.draft import DraftModel
from .specpc.pipeline import compress
from .specpc.result import failed
from .specpc.stored.passage_store import PassageStore, store_of
from .types import CompressedContext, Passage

logger = logging.getLogger(__name__)


class Compressor:
    """Shortens retrieved passages with a draft model's attention (SpecPC).

    Safe to use from several threads at once.

    Args:
        model: The draft, any causal model of transformers' attention interface.
        tokenizer: Its tokenizer (with a fast backend).
        template_options: Extra arguments of the chat template, such as `enable_thinking`.
        progress: Show a bar while several prompts are read, or one beyond the draft's window.
        store: Passages that the draft has read before: a `PassageStore`, or the folder of one.
        store_new: Whether passages that are not in the store are put there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template_options: Mapping[str, Any] | None = None,
        progress: bool = True,
        store: PassageStore | str | Path | None = None,
        store_new: bool = False,
    ) -> None:
        self.draft = DraftModel(model, tokenizer, template_options, progress)
        if store is not None:
            self.draft.store = store_of(store, self.draft)
            self.draft.store_new = store_new
        self.worker = Worker()  # runs the asynchronous calls

    @classmethod
    def of(cls, draft: DraftModel) -> Compressor:
        """A compressor around a draft that somebody else holds too."""
        found = cls.__new__(cls)
        found.draft, found.worker = draft, Worker()
        return found

    def with_store(
        self, store: PassageStore | str | Path | None, store_new: bool = False
    ) -> Compressor:
        """The same draft, not loaded again, with another store; this compressor stays as it is.

        Args:
            store: See the class; None for none.
            store_new: See the class.

        Raises:
            StoreError: The store is another draft's, or none.
        """
        draft = copy(self.draft)
        draft.store = None if store is None else store_of(store, draft)
        draft.store_new = store_new
        return Compressor.of(draft)

    @property
    def model(self) -> PreTrainedModel:
        """The draft's model."""
        return self.draft.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The draft's tokenizer."""
        return self.draft.tokenizer

    @property
    def encoder(self) -> PromptEncoder:
        """What turns prompts into the draft's tokens."""
        return self.draft.encoder

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
        store: PassageStore | str | Path | None = None,
        store_new: bool = False,
    ) -> Compressor:
        """Load the draft: "builtin:draft", a folder, a GGUF file or a hub id (see `load_model`).

        `progress=False` turns all bars off, while loading and later.

        Args:
            store: See the class.
            store_new: See the class.

        Raises:
            ModelNotFoundError: There is no such model.
            StoreError: The store is another draft's, or none.
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
            loaded.model,
            loaded.tokenizer,
            template_options=template_options,
            progress=progress,
            store=store,
            store_new=store_new,
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
        except PromptError as error:
            if on_error == "raise":
                raise
            logger.warning("Compression failed, the passages stay whole: %s", error)
            return failed(Prompt.from_question("?", passages), self.encoder.count, error)
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
    ) -> list[tuple[Prompt, CompressedContext]]:
        """`compress_prompt` for several prompts, which the draft reads as a batch.

        Each gets what it gets alone, and with `on_error="original"` each fails alone.

        Args:
            prompts: The prompts.
            method: As for `compress`.
            on_error: As for `compress`.
            max_new_tokens: One for each prompt, see `compress_prompt`.
        """
        lengths = max_new_tokens or [None] * len(prompts)
        requests = [
            Request(prompt, Generation(max_new_tokens=more) if more else GREEDY)
            for prompt, more in zip(prompts, lengths, strict=True)
        ]
        compress(self.draft, requests, method or DEFAULT_METHOD, on_error)
        return [(request.shorter, request.context) for request in requests if request.context]

    def guess(self, prompt: Prompt, tokens: int) -> torch.Tensor:
        """The draft's greedy answer to a prompt, (guessed,) int64 ids of the draft's tokenizer.

        A store that holds all layers of all of its passages answers one question with the default
        system text; any other prompt is read.

        Args:
            prompt: Messages and passages.
            tokens: Most tokens of the answer.

        Raises:
            PromptError: The prompt exceeds the draft's window.
        """
        encoded, store = self.encoder.encode(prompt), self.draft.store
        if store is not None and store.guesses(prompt) and store.frame.begins(encoded):
            return store.guess(prompt, tokens)
        return self.draft.guess([encoded], [tokens])[0]

    def guess_answer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        tokens: int = 16,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> str:
        """The draft's own answer from passages, right or wrong, as words for a second search.

        Args:
            question: The user's question.
            passages: Retrieved texts; sieved first where the draft cannot read all of them.
            tokens: Most tokens of the answer.
            system: As for `compress`.
            on_error: "raise", or "original" for no answer where the draft fails, with a warning.
            timeout: As for `compress`.

        Returns:
            The answer's text; "" if there is none.
        """
        try:
            prompt = Prompt.from_question(question, passages, system=system)
            with until(deadline_after(timeout)):
                if self.draft.context_window is not None:
                    room = self._room(self.draft.context_window - tokens)
                    prompt = self.compress_prompt(prompt, room)[0]
                return self.draft.text(self.guess(prompt, tokens)).strip()
        except Exception as error:
            if on_error == "raise":
                raise
            logger.warning("The draft guessed no answer: %s", error)
            logger.debug("The failure in full:", exc_info=error)
            return ""

    def _room(self, capacity: int) -> SpecPC:
        """How a prompt is made to fit the draft's window, from the store where there is one."""
        if self.draft.store is None:
            return SpecPC(capacity=capacity)
        return SpecPC.preset(NEWEST_PRESET, capacity=capacity)

    async def aguess_answer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        tokens: int = 16,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> str:
        """`guess_answer` in the compressor's worker thread; the event loop stays free."""
        return await self.worker.run(
            self.guess_answer,
            question,
            passages,
            tokens,
            system=system,
            on_error=on_error,
            timeout=timeout,
        )

    def count_tokens(self, text: str) -> int:
        """Tokens of a text under the draft's tokenizer, without special tokens."""
        return self.encoder.count(text)
