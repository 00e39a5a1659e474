"""The prompt that stored passages are read in: the same for every application and question.

The draft's template with the default system text, then passages without numbers, then the question.
What stands in front of the passages never changes, so that what a passage is read as depends on the
draft and on its own text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import ModelError
from ...prompt.encoder import PromptEncoder, PromptTokens
from ...prompt.messages import Prompt
from ...types import Segment

_PASSAGE = "x"  # a letter, which no tokenizer joins to a line break


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """What follows the passages."""

    ids: torch.Tensor  # (tail,) int64
    segment: torch.Tensor  # (tail,) int8
    question: torch.Tensor  # (question,) int64, places of the question's tokens in `ids`


class Frame:
    """What stands around passages when a draft reads them for a store.

    Args:
        encoder: The draft's.

    Raises:
        ModelError: The draft's template writes nothing in front of a prompt: there is nothing that
            passages could be read behind.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder
        tokens = encoder.encode(Prompt.from_question("?", [_PASSAGE]))
        first = int((tokens.segment >= int(Segment.NUMBER)).nonzero()[0])
        self.ids, self.segment = tokens.ids[:first], tokens.segment[:first]  # of the beginning
        if not first:
            raise ModelError(
                "This draft's chat template begins with the passages themselves, but a store reads "
                "them behind a fixed beginning: choose another draft."
            )

    def tail(self, question: str) -> Tail:
        """Heading, question and the template's end.

        Args:
            question: What is asked.

        Raises:
            PromptError: The question is empty.
        """
        tokens = self.encoder.encode(Prompt.from_question(question, [_PASSAGE]))
        behind = int((tokens.passage == 0).nonzero()[-1]) + 1
        segment = tokens.segment[behind:]
        places = (segment == int(Segment.QUESTION)).nonzero().squeeze(1)
        return Tail(tokens.ids[behind:], segment, places)

    def begins(self, tokens: PromptTokens) -> bool:
        """Whether a prompt's tokens begin as the passages of a store do."""
        return torch.equal(tokens.ids[: len(self.ids)], self.ids)

    def passage(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A passage's (tokens,) int64 ids and (tokens, 2) int32 characters; both may be empty."""
        ids, bounds = self.encoder.encode_text(text), self.encoder.offsets(text)
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(bounds, dtype=torch.int32).view(
            -1, 2
        )

    def tokens(self, texts: list[str], question: str) -> PromptTokens:
        """The whole prompt as tokens, passages behind each other (for reading it in one go)."""
        tail = self.tail(question)
        ids, segment = [self.ids], [self.segment]
        passage, bounds = [torch.full_like(self.ids, -1)], [torch.full((len(self.ids), 2), -1)]
        for index, text in enumerate(texts):
            own, characters = self.passage(text)
            ids.append(own)
            segment.append(torch.full_like(own, int(Segment.PASSAGE)))
            passage.append(torch.full_like(own, index))
            bounds.append(characters)
        ids.append(tail.ids)
        segment.append(tail.segment)
        passage.append(torch.full_like(tail.ids, -1))
        bounds.append(torch.full((len(tail.ids), 2), -1))
        characters = torch.cat(bounds).int()
        return PromptTokens(
            torch.cat(ids),
            torch.cat(segment).to(torch.int8),
            torch.cat(passage).int(),
            characters[:, 0],
            characters[:, 1],
        )
