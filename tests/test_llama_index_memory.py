"""The memory block over a tiny real draft: old turns shrink, nothing else changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock
from llama_index.core.memory import Memory
from sqlalchemy.ext.asyncio import create_async_engine

from draftsieve.core.compressor import Compressor
from draftsieve.core.config import SpecPC
from draftsieve.core.errors import ConfigError, ModelNotFoundError, PromptError
from draftsieve.core.types import CompressedContext
from draftsieve.integrations.llama_index import DraftSieveMemoryBlock

from .adapters_fixtures import (
    QUESTION,
    TEXTS,
    counted,
    tiny_compressor,
    tiny_model,
    tiny_tokenizer,
)

METHOD = SpecPC(unit="word")


def block(**options: Any) -> DraftSieveMemoryBlock:
    given = {"compressor": tiny_compressor(), "method": METHOD, "tokenizer_fn": str.split}
    return DraftSieveMemoryBlock(**{**given, **options})


def turns() -> list[ChatMessage]:
    """A user, an assistant that calls a tool, its result, an answer: 15, 15 and 16 words."""
    call = ToolCallBlock(tool_call_id="c1", tool_name="look", tool_kwargs={"id": 3})
    return [
        ChatMessage(TEXTS[0], role="user"),
        ChatMessage([call], role="assistant"),
        ChatMessage(TEXTS[1], role="tool", additional_kwargs={"tool_call_id": "c1"}),
        ChatMessage(TEXTS[2], role="assistant"),
    ]


def words(messages: list[ChatMessage]) -> int:
    return sum(len((message.content or "").split()) for message in messages)


async def remembered(memory_block: DraftSieveMemoryBlock) -> list[ChatMessage]:
    return await memory_block.aget([ChatMessage("Hello."), ChatMessage(QUESTION)])


async def test_turns_come_back_whole_while_there_is_room() -> None:
    kept = block()
    await kept.aput(turns())
    with counted(tiny_compressor()) as calls:
        assert await remembered(kept) == turns()
    assert calls == []


async def test_truncation_shortens_texts_and_nothing_else() -> None:
    kept = block()
    await kept.aput(turns())
    content = await remembered(kept)
    before = deepcopy(content)
    with counted(tiny_compressor()) as calls:
        found = await kept.atruncate(content, 26)
    assert calls == ["acompress"]
    assert content == before
    assert found is not None
    assert words(found) <= words(before) - 26
    room = words(before) - 26
    method = SpecPC(unit="word", ratio=0.9 * room / words(before))
    context = tiny_compressor().compress(QUESTION, TEXTS, method)
    texts = [p.text or "…" for p in context.passages]
    assert [m.content for m in found if m.content] == texts
    assert len(found) == len(before)
    for old, new in zip(before, found, strict=True):
        assert new.role == old.role
        assert new.additional_kwargs == old.additional_kwargs
        assert [b for b in new.blocks if not isinstance(b, TextBlock)] == [
            b for b in old.blocks if not isinstance(b, TextBlock)
        ]


async def test_system_messages_stay_whole() -> None:
    kept = block()
    rules = ChatMessage("Be brief and polite.", role="system")
    await kept.aput([rules, *turns()])
    found = await kept.atruncate(await remembered(kept), 26)
    assert found is not None
    assert found[0] == rules


async def test_what_cannot_be_met_is_left_to_the_memory() -> None:
    kept = block()
    await kept.aput(turns())
    content = await remembered(kept)
    assert await kept.atruncate(content, words(content)) is None
    assert await kept.atruncate([], 5) is None
    barely = await kept.atruncate(content, words(content) - 3)
    assert barely is not None
    assert words(barely) <= 3


async def test_a_failed_compression_drops_the_oldest_texts_or_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = block()
    await kept.aput(turns())
    content = await kept.aget([])  # nobody asks anything
    found = await kept.atruncate(content, 5)
    assert found is not None
    assert [m.content for m in found if m.content] == ["…", TEXTS[1], TEXTS[2]]
    assert any(record.levelname == "WARNING" for record in caplog.records)
    strict = block(on_error="raise")
    with pytest.raises(PromptError, match="question is empty"):
        await strict.atruncate(content, 5)


async def test_it_never_saves_less_than_asked() -> None:
    kept = block(tokenizer_fn=list)  # counts characters, far from the draft's tokens
    await kept.aput(turns())
    content = await remembered(kept)
    size = sum(map(len, TEXTS))
    for wanted in (1, 40, 120, size - 20):
        found = await kept.atruncate(content, wanted)
        assert found is not None
        assert sum(len(m.content or "") for m in found) <= size - wanted


async def test_sessions_do_not_see_each_other() -> None:
    kept = block()
    await kept.aput([ChatMessage("mine")], session_id="a")
    await kept.aput([ChatMessage("yours")], session_id="b")
    (own,) = await kept.aget([], session_id="a")
    assert (own.content, own.additional_kwargs) == ("mine", {})
    assert await kept.aget([]) == []


class Held(Compressor):
    """A compressor that goes on only when it is let go."""

    go = threading.Event()

    def compress(self, *args: Any, **options: Any) -> CompressedContext:
        assert self.go.wait(10), "the event loop was blocked"
        return super().compress(*args, **options)


async def test_the_event_loop_stays_free() -> None:
    kept = block(compressor=Held(tiny_model(32, seed=1), tiny_tokenizer()))
    await kept.aput(turns())
    task = asyncio.create_task(kept.atruncate(await remembered(kept), 26))
    await asyncio.sleep(0.05)
    assert not task.done()
    Held.go.set()
    assert await task is not None


def test_wrong_options_and_models_fail_at_construction() -> None:
    with pytest.raises(ConfigError, match="capacty"):
        block(capacty=3)
    with pytest.raises(ModelNotFoundError):
        DraftSieveMemoryBlock(model="./gone")
    assert block().priority == 1  # 0 would mean that it is never shortened


async def test_a_block_can_be_stored() -> None:
    kept = block(name="old")
    await kept.aput(turns(), session_id="a")
    stored = kept.model_dump()
    assert "compressor" not in stored
    again = block(**stored)
    assert again.model_dump() == stored
    assert await again.aget([], session_id="a") == turns()


# -- inside a memory ----------------------------------------------------------------------------


@asynccontextmanager
async def memory(kept: DraftSieveMemoryBlock, token_limit: int) -> AsyncIterator[Memory]:
    database = create_async_engine("sqlite+aiosqlite:///:memory:")
    yield Memory.from_defaults(
        session_id="s",
        token_limit=token_limit,
        chat_history_token_ratio=0.4,
        token_flush_size=10,
        memory_blocks=[kept],
        tokenizer_fn=str.split,
        async_engine=database,
    )
    await database.dispose()


async def test_a_memory_keeps_its_limit_and_all_turns() -> None:
    kept = block()
    given = [*turns(), ChatMessage(QUESTION, role="user")]
    async with memory(kept, token_limit=40) as history:
        for message in given:
            await history.aput(message)
        assert len(kept.messages) == 4
        with counted(tiny_compressor()) as calls:
            found = await history.aget()
    assert calls == ["acompress"]
    assert words(found) <= 40 < words(given)
    assert [m.role for m in found] == [m.role for m in given]
    assert found[-1].content == QUESTION
    assert words(found[:-1]) > 10
    assert all("session_id" not in m.additional_kwargs for m in found[:-1])


async def test_a_memory_with_room_returns_everything() -> None:
    given = [*turns(), ChatMessage(QUESTION, role="user")]
    async with memory(block(), token_limit=100) as history:
        for message in given:
            await history.aput(message)
        with counted(tiny_compressor()) as calls:
            assert [m.content for m in await history.aget()] == [m.content for m in given]
    assert calls == []


async def test_the_question_is_the_latest_input() -> None:
    thanks = [ChatMessage("Thanks."), ChatMessage("Welcome.", role="assistant")]
    async with memory(block(), token_limit=36) as history:
        await history.aput_messages([*turns(), *thanks])
        first = await history.aget(input=QUESTION)
        second = await history.aget(input="What does the museum show of 1887?")
    assert first != second
    assert max(words(first), words(second)) <= 36
