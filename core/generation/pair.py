"""The two models of an engine, and how what one says reads in the other's tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import NO_DRAFT, ModelError
from ..models.loading import context_window
from ..prompt.encoder import PromptEncoder
from ..specpc.draft import DraftModel


@dataclass(frozen=True, eq=False)
class Pair:
    """A target with its tokenizer, and the draft that reads first, if there is one."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: PromptEncoder
    draft: DraftModel | None = None
    context_window: int | None = field(init=False)  # most tokens that the target reads
    same_tokens: bool = field(init=False)  # whether the draft's tokens are the target's
    same_prompts: bool = field(init=False)  # whether both make the same tokens of a prompt

    def __post_init__(self) -> None:
        theirs = None if self.draft is None else self.draft.tokenizer
        same = theirs is None or theirs is self.tokenizer
        same = same or (theirs is not None and theirs.get_vocab() == self.tokenizer.get_vocab())
        prompts = self.draft is not None and self.encoder.encodes_like(self.draft.encoder)
        object.__setattr__(self, "context_window", context_window(self.target))
        object.__setattr__(self, "same_tokens", same)
        object.__setattr__(self, "same_prompts", prompts)

    @property
    def models(self) -> dict[str, PreTrainedModel | None]:
        """Both models by their roles, for messages about memory."""
        return {"target": self.target, "draft": None if self.draft is None else self.draft.model}

    def need_draft(self) -> DraftModel:
        """The draft, or a `ModelError` where there is none."""
        if self.draft is None:
            raise ModelError(NO_DRAFT)
        return self.draft

    def translated(self, guessed: torch.Tensor) -> torch.Tensor:
        """The draft's (guessed,) ids as the target's, carried over as text where they differ."""
        if self.same_tokens:
            return guessed
        text = self.need_draft().text(guessed)
        return torch.tensor(self.encoder.encode_text(text), dtype=torch.int64)
