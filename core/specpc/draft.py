"""`DraftModel`: the small model with its tokenizer; it reads prompts and guesses answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SpecPC
from ..errors import OutOfMemoryError, PromptError
from ..kv_cache.greedy import greedy, guess
from ..kv_cache.prefix import Memory
from ..models.footprint import explain_out_of_memory
from ..models.loading import accept, context_window
from ..prompt.encoder import PromptEncoder, PromptTokens
from ..types import DraftReading
from .draft_scores import read_draft, read_scores

if TYPE_CHECKING:
    from .stored.passage_store import PassageStore


class DraftModel:
    """A draft and what stands around it. Safe to use from several threads at once.

    Args:
        model: Any causal model of transformers' attention interface.
        tokenizer: Its tokenizer (with a fast backend).
        template_options: Extra arguments of the chat template, such as `enable_thinking`.
        progress: Show a bar while several prompts are read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template_options: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.tokenizer = accept(model), tokenizer
        self.encoder = PromptEncoder(tokenizer, template_options)
        self.context_window = context_window(model)
        self.store: PassageStore | None = None  # passages that need not be read
        self.store_new = False  # whether those that are not in it are put there
        self.progress = progress

    def read(
        self, prompts: Sequence[PromptTokens], method: SpecPC, lookaheads: Sequence[int]
    ) -> list[DraftReading]:
        """Scores of prompts' tokens, and guessed answers; the prompts are read as a batch.

        Args:
            prompts: What `encoder` made of the prompts; each must fit the draft's window.
            method: Options of SpecPC.
            lookaheads: Tokens that the draft guesses, one number for each prompt.
        """
        windows = [asking_rows(prompt, method.window_size) for prompt in prompts]
        with self._bar(len(prompts)) as bar:
            if method.passages_apart or (method.head_weights and max(lookaheads) == 1):
                found = []
                for prompt, window in zip(prompts, windows, strict=True):
                    found.append(read_scores(self.model, prompt, method, window))
                    bar.update()
                return found
            return read_draft(
                self.model,
                [prompt.ids for prompt in prompts],
                method,
                lookahead_tokens=lookaheads,
                windows=windows,
                done=bar.update,
            )

    def guess(
        self,
        prompts: Sequence[PromptTokens],
        tokens: Sequence[int],
        memory: Memory | None = None,
    ) -> list[torch.Tensor]:
        """Greedy answers, (guessed,) int64 each; the prompts are read and answered as a batch.

        Args:
            prompts: What `encoder` made of the prompts.
            tokens: Most tokens of each answer.
            memory: What the draft already knows of the prompts' beginning; they then go one by one.

        Raises:
            PromptError: A prompt exceeds the draft's window.
        """
        limits = [self._room(*each) for each in zip(prompts, tokens, strict=True)]
        ids = [prompt.ids for prompt in prompts]
        if memory is not None:
            pairs = zip(ids, limits, strict=True)
            model = self.model
            return [greedy(model, row, most, memory.start(model, row)) for row, most in pairs]
        try:
            with self._bar(len(ids)) as bar, explain_out_of_memory(draft=self.model):
                return guess(self.model, ids, limits, done=bar.update)
        except OutOfMemoryError:
            if len(ids) == 1:
                raise
        return [guess(self.model, [row], most)[0] for row, most in zip(ids, limits, strict=True)]

    def text(self, ids: torch.Tensor | Sequence[int]) -> str:
        """What token ids say, control tokens left out."""
        return str(self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))

    def _room(self, prompt: PromptTokens, tokens: int) -> int:
        """How many tokens the answer to a prompt may have."""
        if self.context_window is None:
            return tokens
        if len(prompt) >= self.context_window:
            raise PromptError(
                f"The prompt has {len(prompt)} tokens, the draft reads at most "
                f"{self.context_window} and so cannot guess an answer: compress the prompt "
                "first (SpecKVPC)."
            )
        return min(tokens, self.context_window - len(prompt))

    def _bar(self, prompts: int) -> tqdm[Any]:
        """A bar over the prompts that the draft reads; hidden for a single one."""
        hidden = not self.progress or prompts < 2
        return tqdm(total=prompts, desc="Draft reads", leave=False, disable=hidden)


def asking_rows(tokens: PromptTokens, window: int) -> int:
    """At most `window` rows, and none of a passage: only what follows the passages asks."""
    passages = torch.nonzero(~tokens.protected)
    tail = len(tokens) - 1 - int(passages[-1]) if len(passages) else len(tokens)
    return max(1, min(window, tail))
