"""LlamaIndex messages as the mappings that chat templates take, and answers as responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    ContentBlock,
    DocumentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from ...core.config import Method
from ...core.errors import PromptError
from ...core.prompt.messages import Prompt
from ...core.types import Answer
from ...retrievers.llama_index import Document, as_passages
from .._shared.report import report as shared_report
from .tools import call_mapping

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
# Blocks of an earlier answer that are no text of it: calls travel as `tool_calls`.
_UNSAID = (ToolCallBlock, ThinkingBlock, CitationBlock)
_PLAIN_TYPES = ("text/", "application/json", "application/xml", "application/yaml")


def as_prompt(
    messages: Sequence[ChatMessage],
    documents: Sequence[Document] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    schema: Mapping[str, Any] | None = None,
) -> Prompt:
    """Turn messages into a prompt.

    Args:
        messages: Text, document, citable and tool-call blocks are read. Document and citable
            blocks stand for passages, which may be compressed; text blocks may not.
        documents: A call's own documents, to stand in front of the last user message. Of a node,
            its text and id are taken.
        tools: Schemas of tools that may be called.
        schema: JSON schema that the prompt states.

    Returns:
        The prompt.

    Raises:
        PromptError: A block of another kind, or a document that is not plain text.
    """
    said = [_mapping(message) for message in messages]
    return Prompt.from_messages(said, as_passages(documents), tools, schema)


def report(answer: Answer, model: str, method: Method | None) -> dict[str, Any]:
    """What a response's `raw` says about an answer; plain values only.

    Args:
        answer: The core's answer.
        model: The target's name.
        method: The method that was asked for.

    Returns:
        "usage" ("prompt_tokens" is what the target really read, "original_prompt_tokens" the
        prompt before compression), "model", what the shared report says, and "broken_calls"
        (tool calls that were cut off or cannot be read).
    """
    return {
        "usage": {
            **token_counts(answer),
            "original_prompt_tokens": answer.usage.original_prompt_tokens,
        },
        "model": model,
        **shared_report(answer, method),
        "broken_calls": list(answer.broken_calls),
    }


def token_counts(answer: Answer) -> dict[str, int]:
    """Tokens under the names that LlamaIndex looks for."""
    return {
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "total_tokens": answer.usage.total_tokens,
    }


def _mapping(message: ChatMessage) -> dict[str, Any]:
    mapping: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role.value),
        "content": _content(message),
    }
    for name in ("name", "tool_call_id"):
        if message.additional_kwargs.get(name) is not None:
            mapping[name] = message.additional_kwargs[name]
    calls = [call_mapping(b) for b in message.blocks if isinstance(b, ToolCallBlock)]
    if calls:
        mapping["tool_calls"] = calls
    return mapping


def _content(message: ChatMessage) -> list[dict[str, Any]]:
    """Adjoining texts are joined by a line break, as in `ChatMessage.content`."""
    said: list[dict[str, Any]] = []
    for block in message.blocks:
        if isinstance(block, CachePoint) or (
            isinstance(block, _UNSAID) and message.role not in (MessageRole.USER, MessageRole.TOOL)
        ):
            continue
        found = _block(block)
        if found["type"] == "text" and said and said[-1]["type"] == "text":
            found = {"type": "text", "text": f"{said.pop()['text']}\n{found['text']}"}
        said.append(found)
    return said


def _block(block: ContentBlock) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    if isinstance(block, CitableBlock):
        text = "\n".join(_block(part)["text"] for part in block.content)
        return {"type": "document", "text": text, "id": block.source, "title": block.title}
    if isinstance(block, DocumentBlock):
        return {"type": "document", "text": _plain_text(block), "title": block.title}
    raise PromptError(
        f"A {type(block).__name__} cannot be put into a prompt: use text, document, citable and "
        "tool-call blocks."
    )


def _plain_text(block: DocumentBlock) -> str:
    """The text that a document block holds; paths and addresses are not opened."""
    kind = block.document_mimetype
    if block.data is None or (kind is not None and not kind.startswith(_PLAIN_TYPES)):
        raise PromptError(
            f"The document block {block.title!r} holds no plain text (type {kind}): read the file "
            "and give its text as DocumentBlock(data=text.encode())."
        )
    try:
        return bytes(block.resolve_document().read()).decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"The document block {block.title!r} is not UTF-8 text: decode the file yourself and "
            "give its text as DocumentBlock(data=text.encode())."
        ) from error
