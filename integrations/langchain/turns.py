"""LangChain messages as turns of a conversation, and shortened turns as messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from ...core.conversation.turns import Keep, ShortTurns, Turn
from ...retrievers.provenance import KEY

RECALL = "recall"  # the tool that the notes speak of
_MEDIA = frozenset({"image", "image_url", "input_image", "audio", "input_audio", "video", "file"})
_MEDIA_TOKENS = 1000  # what a picture or recording is taken to cost
_CALLS = frozenset({"tool_call", "tool_use", "function_call"})  # blocks that repeat `tool_calls`


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of a request and where it stands: message and content block, None for no message."""

    turn: Turn
    message: int | None = None
    block: int | None = None


def message_pieces(
    message: BaseMessage, index: int | None, keep: Keep, *, noted: bool
) -> list[Piece]:
    """A message's texts, and what else of it counts.

    Args:
        message: Any message.
        index: Its place in the request; None for the system message.
        keep: Whether its texts may be shortened.
        noted: Name the recall tool behind shortened texts.
    """
    if isinstance(message.content, str):
        pieces = [Piece(_turn(message.content, keep, noted), index)]
    else:
        blocks = enumerate(message.content)
        pieces = [_block_piece(block, index, n, keep, noted) for n, block in blocks]
    if isinstance(message, AIMessage) and message.tool_calls:
        pieces.append(Piece(Turn(json.dumps(message.tool_calls, default=str))))
    return pieces


def _block_piece(
    block: str | dict[Any, Any], index: int | None, place: int, keep: Keep, noted: bool
) -> Piece:
    text = _block_text(block)
    if text is not None:
        return Piece(_turn(text, keep, noted), index, place)
    assert isinstance(block, dict)
    if block.get("type") in _CALLS:
        return Piece(Turn(""))
    if block.get("type") in _MEDIA:
        return Piece(Turn("", tokens=_MEDIA_TOKENS))
    return Piece(Turn(json.dumps(block, default=str)))


def _turn(text: str, keep: Keep, noted: bool) -> Turn:
    note = f'[shortened; {RECALL}("{key_of(text)}") returns all of it]' if noted else ""
    return Turn(text, keep, note)


def shortened(
    messages: Sequence[BaseMessage], pieces: Sequence[Piece], found: ShortTurns
) -> list[Any]:
    """The messages with the texts of shortened turns, by index; the others are the same objects.

    Args:
        messages: As they would be sent.
        pieces: Their texts, and others without a message.
        found: One turn for each piece.
    """
    sent = list(messages)
    for piece, short in zip(pieces, found.turns, strict=True):
        if piece.message is None or not short.shortened:
            continue
        told = {
            "block": piece.block,
            "tokens": short.original_tokens,
            "compressed_tokens": short.tokens,
            "spans": [{"start": start, "end": end} for start, end in short.spans],
        }
        message = sent[piece.message]
        before = message.response_metadata.get(KEY, [])
        sent[piece.message] = message.model_copy(
            update={
                "content": _content(message, piece.block, short.text),
                "response_metadata": {**message.response_metadata, KEY: [*before, told]},
            }
        )
    return sent


def _content(message: BaseMessage, place: int | None, text: str) -> str | list[Any]:
    """A message's content with another text, in a block if `place` says so."""
    if place is None:
        return text
    blocks = list(message.content)
    block = blocks[place]
    blocks[place] = text if isinstance(block, str) else {**block, "text": text}
    return blocks


def texts(message: BaseMessage) -> list[str]:
    """A message's texts, block by block."""
    if isinstance(message.content, str):
        return [message.content]
    return [text for block in message.content if (text := _block_text(block)) is not None]


def _block_text(block: str | dict[Any, Any]) -> str | None:
    if isinstance(block, str):
        return block
    text = block.get("text")
    return text if block.get("type") == "text" and isinstance(text, str) else None


def key_of(text: str) -> str:
    """A short name of a text, by content."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
