"""A prompt becomes tokens that remember where they come from.

The prompt is rendered into pieces and tokenised as one text; then each token is told the segment,
passage and characters that it stands for. No text (passage, question, system text, tool result)
can become a control token, and a harmless prompt gets the ids that
`tokenizer.apply_chat_template` gives it. The limits are those of `rendering.py` (what a template
may do to a text) and `plain_text.py` (what counts as a control token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..types import Segment, TensorValue
from .messages import Prompt
from .safe_tokenizer import Encoded, Ints, PlainText
from .template import DEFAULT_TEMPLATE_OPTIONS, PLAIN_TEMPLATE, ChatTemplate, Piece

__all__ = ["DEFAULT_TEMPLATE_OPTIONS", "PLAIN_TEMPLATE", "PromptEncoder"]


@dataclass(frozen=True, slots=True, eq=False)
class PromptTokens(TensorValue):
    """A tokenised prompt that remembers where each token comes from.

    `start` and `end` are character offsets into the original text of the token's passage; they are
    -1 for tokens of other segments. Tokens of one multi-byte character share its span.
    """

    ids: torch.Tensor  # (tokens,) int64
    segment: torch.Tensor  # (tokens,) int8, values of Segment
    passage: torch.Tensor  # (tokens,) int32, index of the passage or -1
    start: torch.Tensor  # (tokens,) int32
    end: torch.Tensor  # (tokens,) int32

    def __len__(self) -> int:
        return int(self.ids.numel())

    @property
    def protected(self) -> torch.Tensor:
        """(tokens,) bool: True where the token must be kept."""
        return self.segment != int(Segment.PASSAGE)


class PromptEncoder:
    """Turns prompts into tokens with one tokenizer; safe to share between threads.

    Args:
        tokenizer: A tokenizer backed by the `tokenizers` library. One without a chat template
            gets `PLAIN_TEMPLATE`. It is read once and never changed.
        template_options: Variables for the chat template; {"enable_thinking": False} by default.

    Raises:
        ModelError: The tokenizer has no `tokenizers` backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._options = tokenizer, template_options
        self._plain = PlainText(tokenizer)
        self._template = ChatTemplate(tokenizer, template_options, self._plain.control_pattern)

    def encode(self, prompt: Prompt) -> PromptTokens:
        """Render and tokenise a prompt, up to and including the generation prompt.

        A token is its passage's if it covers any character of it, else it belongs to the last
        segment it touches. Each character of a passage lies in the span of one of its tokens;
        what no token covers (trimmed or normalised away) is added to the token before. System
        text that the template refuses or drops is put in front of the first user message.

        Args:
            prompt: What to encode.

        Returns:
            The tokens, with their segment, passage and character span in the passage's text.

        Raises:
            PromptError: The template fails, or drops or repeats the text of a message.
        """
        pieces = self._template.render(prompt)
        text = "".join(piece.text for piece in pieces)
        bounds = np.cumsum([0, *(len(piece.text) for piece in pieces)])
        spans = zip(pieces, pairwise(bounds.tolist()), strict=True)
        trusted = [span for piece, span in spans if piece.trusted]
        return _locate(self._plain.encode_rendered(text, trusted), pieces, bounds, prompt)

    def render(self, prompt: Prompt) -> str:
        """The text that `encode` tokenises, up to and including the generation prompt.

        Args:
            prompt: What to render.

        Raises:
            PromptError: As for `encode`.
        """
        return "".join(piece.text for piece in self._template.render(prompt))

    def encodes_like(self, other: PromptEncoder) -> bool:
        """Whether both surely give every prompt the same tokens.

        Args:
            other: The encoder of another model.
        """
        ours, theirs = self._tokenizer, other._tokenizer
        if self._options != other._options:
            return False
        return ours is theirs or (
            ours.chat_template == theirs.chat_template
            and ours.special_tokens_map == theirs.special_tokens_map
            and ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
        )

    def encode_text(self, text: str) -> list[int]:
        """Tokenise plain text: no control tokens, nothing added.

        Args:
            text: Any text.

        Returns:
            Token ids.
        """
        ids: list[int] = self._plain.encode_text(text).ids.tolist()
        return ids

    def count(self, text: str) -> int:
        """Count the tokens of plain text.

        Args:
            text: Any text.

        Returns:
            The length of `encode_text(text)`.
        """
        return len(self._plain.encode_text(text).ids)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Say which characters each token of `encode_text(text)` covers.

        Args:
            text: Any text.

        Returns:
            A (start, end) for each token, ascending. Tokens that share a character share a
            span; the different spans follow each other without gap or overlap and cover the text.
        """
        encoded = self._plain.encode_text(text)
        start, end = _cover(encoded.start, 0, len(text))
        return list(zip(start.tolist(), end.tolist(), strict=True))


def _cover(start: Ints, base: int, length: int) -> tuple[Ints, Ints]:
    """Spans, counted from `base`, that cover 0..length; gaps go to the token before them.

    Args:
        start: Ascending starts of the tokens; tokens of one group share theirs.
        base: Where the covered text starts.
        length: Its length.
    """
    start = np.maximum(start - base, 0)
    start = np.where(start == start[:1], 0, start)
    following = np.searchsorted(start, start, side="right")
    return start, np.append(start, length)[following]


def _locate(
    encoded: Encoded, pieces: Sequence[Piece], bounds: Ints, prompt: Prompt
) -> PromptTokens:
    """Say of each token which segment, passage and characters it stands for."""
    segments = np.array([piece.segment for piece in pieces], dtype=np.int8)
    segment = segments[np.searchsorted(bounds[:-1], encoded.end - 1, side="right") - 1]
    passage, start, end = (np.full(len(segment), -1, dtype=np.int32) for _ in range(3))
    for piece, (first, stop) in zip(pieces, pairwise(bounds.tolist()), strict=True):
        if piece.passage < 0:
            continue
        low = int(np.searchsorted(encoded.end, first, side="right"))
        own = slice(low, int(np.searchsorted(encoded.start, stop, side="left")))
        starts, ends = _cover(encoded.start[own], first, stop - first)
        at_end = ends == stop - first
        if piece.origin is not None and len(piece.origin):
            starts, ends = piece.origin[starts], piece.origin[ends - 1] + 1
        segment[own], passage[own] = int(Segment.PASSAGE), piece.passage
        start[own] = starts
        end[own] = np.where(at_end, len(prompt.passages[piece.passage].text), ends)
    columns = map(torch.from_numpy, (encoded.ids, segment, passage, start, end))
    return PromptTokens(*columns)
