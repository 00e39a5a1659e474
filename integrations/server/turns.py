"""Chat messages as turns of a conversation, and shortened turns as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.conversation.turns import Keep, ShortTurns, Turn
from .originals import hash_of

_FIXED = ("system", "developer")
_NO_REQUEST = "What are the most important facts?"  # gateways may hold the request back


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of a request and where it stands; `message` is None for what only counts."""

    turn: Turn
    message: int | None = None
    block: int | None = None


def pieces_of(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """Every text of a conversation, and what may be shortened of it.

    Whole stay system texts, the last user message, the last assistant message, and everything up
    to the last `cache_control` mark. Tool results after the last user message are shortened only
    where older texts cannot make the room.

    Args:
        messages: OpenAI's, with content as text or blocks.

    Returns:
        The texts in their order. LiteLLM holds back assistant messages and the newest request,
        which comes with the next one: there tool results stand first, so that what a text is
        remembered by does not change.
    """
    asked, said = (_last(messages, role) for role in ("user", "assistant"))
    cached = max((i for i, m in enumerate(messages) if _marked(m)), default=-1)
    found: list[Piece] = []
    for index, message in enumerate(messages):
        fixed = message.get("role") in _FIXED or index in (asked, said) or index <= cached
        keep: Keep = "always" if fixed else "newest" if index > asked else "never"
        found += _pieces(message, index, keep)
    if said < 0:
        found.sort(key=lambda piece: _role(messages, piece) != "tool")
    return found


def request_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Text of the last user message; a neutral request if there is none."""
    place = _last(messages, "user")
    texts = _texts(messages[place], place, "always") if place >= 0 else []
    return "\n".join(piece.turn.text for piece in texts).strip() or _NO_REQUEST


def shortened(
    messages: Sequence[Mapping[str, Any]], pieces: Sequence[Piece], found: ShortTurns
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages as they are sent, and the originals of what was shortened, by hash."""
    sent, originals = [dict(message) for message in messages], {}
    for piece, short in zip(pieces, found.turns, strict=True):
        if piece.message is None or not short.shortened:
            continue
        originals[hash_of(piece.turn.text)] = piece.turn.text
        message = sent[piece.message]
        if piece.block is None:
            message["content"] = short.text
        else:
            blocks = list(message["content"])
            blocks[piece.block] = {**blocks[piece.block], "text": short.text}
            message["content"] = blocks
    return sent, originals


def _pieces(message: Mapping[str, Any], index: int, keep: Keep) -> list[Piece]:
    texts = _texts(message, index, keep)
    taken = {piece.block for piece in texts}
    content = message.get("content")
    rest = content if isinstance(content, list) else []
    others = [block for place, block in enumerate(rest) if place not in taken]
    if message.get("tool_calls"):
        others.append(message["tool_calls"])
    return [*texts, *(Piece(Turn(json.dumps(other))) for other in others)]


def _texts(message: Mapping[str, Any], index: int, keep: Keep) -> list[Piece]:
    content = message.get("content")
    if isinstance(content, str):
        return [Piece(_turn(content, keep), index)]
    blocks = content if isinstance(content, list) else []
    return [
        Piece(_turn(block["text"], keep), index, place)
        for place, block in enumerate(blocks)
        if isinstance(block, Mapping)
        and block.get("type") == "text"
        and isinstance(block.get("text"), str)
    ]


def _turn(text: str, keep: Keep) -> Turn:
    return Turn(text, keep, f"[shortened; the whole text has hash={hash_of(text)}]")


def _role(messages: Sequence[Mapping[str, Any]], piece: Piece) -> object:
    return None if piece.message is None else messages[piece.message].get("role")


def _marked(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    blocks = content if isinstance(content, list) else []
    return "cache_control" in message or any(
        isinstance(block, Mapping) and "cache_control" in block for block in blocks
    )


def _last(messages: Sequence[Mapping[str, Any]], role: str) -> int:
    return max((i for i, m in enumerate(messages) if m.get("role") == role), default=-1)
