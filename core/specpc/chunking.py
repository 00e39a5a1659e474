"""Prompts longer than the draft's context window: read in groups that fit, each with the question.

All groups share the same fixed part (system text, question, template) and are filled to nearly
equal size, so that their softmax scores are on one scale. Nothing is truncated: a passage longer
than a group is read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import PromptError
from ..prompt.encoder import PromptTokens

_NUMBER = 12  # tokens allowed for blank line and number in front of a piece


@dataclass(frozen=True, slots=True)
class Piece:
    """Characters start..end of one passage."""

    passage: int
    start: int
    end: int


def plan_groups(
    texts: Sequence[str], tokens: PromptTokens, fixed: int, window: int
) -> list[list[Piece]]:
    """Split the passages of a prompt that exceeds the draft's window into groups that fit.

    Args:
        texts: The passages' texts.
        tokens: The whole prompt.
        fixed: Tokens of the prompt without passages, which every group repeats.
        window: Most tokens of one group's prompt.

    Returns:
        Groups of pieces in order.

    Raises:
        PromptError: The question and system text alone do not fit.
    """
    room = window - fixed
    if room <= 4 * _NUMBER:
        raise PromptError(
            f"The question and system text take {fixed} tokens of the draft's window of {window}: "
            "no passage fits beside them. Shorten the question or choose another draft."
        )
    pieces = list(_pieces(texts, tokens, room // 2 - _NUMBER))
    sizes = [_tokens_of(piece, tokens) + _NUMBER for piece in pieces]
    return _balance(pieces, sizes, room)


def _pieces(texts: Sequence[str], tokens: PromptTokens, most: int) -> Iterator[Piece]:
    """Whole passages where they fit, else runs of at most `most` tokens."""
    passage, ends = tokens.passage.numpy(), tokens.end.numpy()
    for index, text in enumerate(texts):
        mine = ends[passage == index]
        start = 0
        for last in range(most, len(mine), most):
            stop = int(mine[last - 1])
            if stop > start:
                yield Piece(index, start, stop)
                start = stop
        if start < len(text):
            yield Piece(index, start, len(text))


def _tokens_of(piece: Piece, tokens: PromptTokens) -> int:
    inside = (tokens.start < piece.end) & (tokens.end > piece.start)
    return int((inside & (tokens.passage == piece.passage)).sum())


def _balance(pieces: Sequence[Piece], sizes: Sequence[int], room: int) -> list[list[Piece]]:
    """Consecutive groups of nearly equal size, each at most `room`."""
    share = sum(sizes) / -(-sum(sizes) // room)
    groups: list[list[Piece]] = [[]]
    used = total = 0
    for piece, size in zip(pieces, sizes, strict=True):
        share_is_full = total + size / 2 > share * len(groups)
        if groups[-1] and (used + size > room or share_is_full):
            groups.append([])
            used = 0
        groups[-1].append(piece)
        used, total = used + size, total + size
    return groups


def group_texts(count: int, texts: Sequence[str], group: Sequence[Piece]) -> list[str]:
    """Passage texts of one group's prompt; passages outside it are empty."""
    chosen = [""] * count
    for piece in group:
        chosen[piece.passage] += texts[piece.passage][piece.start : piece.end]
    return chosen


def spread_scores(
    into: torch.Tensor,
    tokens: PromptTokens,
    group: Sequence[Piece],
    read: PromptTokens,
    scores: torch.Tensor,
) -> None:
    """Copy a group's passage scores to the tokens of the whole prompt, matched by characters."""
    for piece in group:
        mine = torch.nonzero(
            (tokens.passage == piece.passage)
            & (tokens.start < piece.end)
            & (tokens.end > piece.start)
        ).squeeze(1)
        theirs = torch.nonzero(read.passage == piece.passage).squeeze(1)
        if not len(mine) or not len(theirs):
            continue
        offset = next(p.start for p in group if p.passage == piece.passage)
        places = torch.searchsorted(
            read.end[theirs] + offset, tokens.start[mine].contiguous(), right=True
        ).clamp(max=len(theirs) - 1)
        into[mine] = torch.maximum(into[mine], scores[theirs[places]])
