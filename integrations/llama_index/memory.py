"""A LlamaIndex memory block that keeps old turns and shortens them, where others drop them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock
from llama_index.core.memory.memory import BaseMemoryBlock
from llama_index.core.utils import get_tokenizer
from pydantic import Field

from ...core.config import DEFAULT_METHOD
from ...retrievers.options import SieveOptions

logger = logging.getLogger(__name__)
_AIM = 0.9  # of the room: the draft and the memory count tokens differently
_GONE = "…"  # stands where nothing of a text was kept; some models refuse empty texts
_SYSTEM = (MessageRole.SYSTEM, MessageRole.DEVELOPER)


class Turns(list[ChatMessage]):
    """Old turns, and the question for which they are remembered."""

    question: str = ""


class DraftSieveMemoryBlock(SieveOptions, BaseMemoryBlock[list[ChatMessage]]):
    """Keeps the turns that leave the chat history and gives them back in front of it.

    While all fit into the memory's token limit they come back whole. Where they do not, a draft
    model shortens them to what the latest user message needs: turns, roles, order and tool calls
    stay, system messages stay whole, and a text of which nothing is kept becomes "…". Should that
    not suffice (or fail), the oldest texts go first.

    Each session of a shared block gets its own turns. They are kept in `messages`.

    Args:
        name: Name of the block in the memory.
        priority: From which priority on other blocks are shortened first; 0 would never shorten.
        tokenizer_fn: Counts tokens; give the same one to `Memory`. Default: LlamaIndex's.
        method: How texts are read and cut; its budget is replaced by what the memory asks for.

    Other options: see `SieveOptions`.
    """

    name: str = "EarlierTurns"
    priority: int = 1
    tokenizer_fn: Callable[[str], Sequence[Any]] = Field(
        default_factory=get_tokenizer, exclude=True, repr=False
    )
    messages: list[ChatMessage] = Field(default_factory=list)

    async def _aget(
        self,
        messages: list[ChatMessage] | None = None,
        session_id: str | None = None,
        **block_kwargs: Any,
    ) -> list[ChatMessage]:
        turns = Turns(_unmarked(m) for m in self.messages if _session(m) == session_id)
        asked = [m.content for m in messages or () if m.role == MessageRole.USER and m.content]
        turns.question = asked[-1] if asked else ""
        return turns

    async def _aput(self, messages: list[ChatMessage]) -> None:
        self.messages = [*self.messages, *(m.model_copy(deep=True) for m in messages)]

    async def atruncate(
        self, content: list[ChatMessage], tokens_to_truncate: int
    ) -> list[ChatMessage] | None:
        """Shorten turns by a number of tokens.

        Args:
            content: What `aget` returned; it is not changed.
            tokens_to_truncate: How many tokens have to go, at least.

        Returns:
            The turns with shorter texts; None where not even that is enough.

        Raises:
            DraftSieveError: The request failed and `on_error` is "raise".
        """
        found = {(i, j): text for i, m in enumerate(content) for j, text in _texts(m)}
        texts = list(found.values())
        before = self._count(texts)
        room = before - tokens_to_truncate
        if not texts or room < self._count([_GONE] * len(texts)):
            return None
        budget = {"capacity": None, "ratio": _AIM * room / before, "min_tokens": 0}
        method = (self.method or DEFAULT_METHOD).model_copy(update={**budget, "drop_empty": False})
        question = content.question if isinstance(content, Turns) else ""
        context = await self.loaded.acompress(question, texts, method, **self.asking())
        kept = [passage.text or _GONE for passage in context.passages]
        sizes, gone = [self._count([text]) for text in kept], self._count([_GONE])
        for index in range(len(kept)):  # the oldest first
            if sum(sizes) <= room:
                break
            kept[index], sizes[index] = _GONE, gone
        logger.info("Earlier turns: %d of %d tokens are kept.", sum(sizes), before)
        return _with_texts(content, dict(zip(found, kept, strict=True)))

    def _count(self, texts: Sequence[str]) -> int:
        return sum(len(self.tokenizer_fn(text)) for text in texts)


def _texts(message: ChatMessage) -> list[tuple[int, str]]:
    """Blocks that may be shortened: their places and texts."""
    if message.role in _SYSTEM:
        return []
    blocks = enumerate(message.blocks)
    return [(j, b.text) for j, b in blocks if isinstance(b, TextBlock) and b.text.strip()]


def _with_texts(
    messages: Sequence[ChatMessage], texts: dict[tuple[int, int], str]
) -> list[ChatMessage]:
    """Copies of messages with other texts at the places named by message and block."""
    return [
        message.model_copy(
            update={
                "blocks": [
                    TextBlock(text=texts[i, j]) if (i, j) in texts else block
                    for j, block in enumerate(message.blocks)
                ]
            }
        )
        for i, message in enumerate(messages)
    ]


def _session(message: ChatMessage) -> str | None:
    """`Memory` marks what it hands over with its session."""
    return message.additional_kwargs.get("session_id")


def _unmarked(message: ChatMessage) -> ChatMessage:
    extra = {k: v for k, v in message.additional_kwargs.items() if k != "session_id"}
    return message.model_copy(update={"additional_kwargs": extra})
