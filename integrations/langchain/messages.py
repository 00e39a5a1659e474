"""LangChain messages as the mappings that chat templates take, and answers as messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from ...core.errors import PromptError
from ...core.types import Usage

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}
# Blocks of an earlier answer that are no text of it: calls travel as `tool_calls`.
_UNSAID = frozenset({"tool_call", "tool_use", "function_call", "reasoning", "thinking"})


def as_mappings(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Turn messages into mappings with "role", "content" and what else they carry.

    Args:
        messages: System, human, AI, tool or chat messages.

    Returns:
        One mapping a message. Blocks {"type": "document", "text": ...} and LangChain's
        "text-plain" blocks stand for passages, which may be compressed; text blocks may not.

    Raises:
        PromptError: A message of another type.
    """
    return [_mapping(message) for message in messages]


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Count tokens LangChain's way: the input is what the target really read.

    Args:
        usage: The core's count.

    Returns:
        Totals, and as input details "original" (the prompt before compression) and "compressed"
        (the prompt as read, equal to the input).
    """
    details = {"original": usage.original_prompt_tokens, "compressed": usage.prompt_tokens}
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=cast(InputTokenDetails, details),
    )


def _mapping(message: BaseMessage) -> dict[str, Any]:
    role = message.role if isinstance(message, ChatMessage) else _ROLES.get(message.type)
    if role is None:
        raise PromptError(
            f"A {type(message).__name__} cannot be put into a prompt: "
            "use system, human, AI, tool or chat messages."
        )
    mapping: dict[str, Any] = {"role": role, "content": _content(message)}
    if message.name is not None:
        mapping["name"] = message.name
    if isinstance(message, ToolMessage):
        mapping["tool_call_id"] = message.tool_call_id
    if isinstance(message, AIMessage) and message.tool_calls:
        mapping["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["args"]},
            }
            for call in message.tool_calls
        ]
    return mapping


def _content(message: BaseMessage) -> str | list[Any]:
    if isinstance(message.content, str):
        return message.content
    said = [block for block in message.content if not _unsaid(message, block)]
    return [_block(block) for block in said]


def _unsaid(message: BaseMessage, block: str | dict[Any, Any]) -> bool:
    return (
        isinstance(message, AIMessage) and isinstance(block, dict) and block.get("type") in _UNSAID
    )


def _block(block: str | dict[Any, Any]) -> str | dict[Any, Any]:
    """LangChain's plain-text block is a document under another name."""
    if isinstance(block, dict) and block.get("type") == "text-plain":
        return {**block, "type": "document"}
    return block
