"""LlamaIndex, offline: a chat memory whose old turns are sieved by a draft model, not dropped.

A memory with room for 70 tokens is told more than that. What an LLM would be sent of it depends
on the latest question: the turns stay, their texts shrink to what matters. The block works with
every LLM and agent of LlamaIndex. For a model of the hub change DRAFT (no target is needed), and
LIMIT for more room.
"""

import asyncio

from llama_index.core.llms import ChatMessage
from llama_index.core.memory import Memory
from llama_index.core.utils import get_tokenizer
from sqlalchemy.ext.asyncio import create_async_engine

from draftsieve.integrations.llama_index import DraftSieveMemoryBlock

DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
LIMIT = 70
TOLD = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. He answers in the morning only. He likes tea.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns. It is going well.",
    "The ferry to Holm leaves at seven in the morning. It returns at noon, except on Sundays.",
]
QUESTIONS = ["Which badge was issued to Mira Tolen?", "When did Project Halvora begin?"]


async def chat() -> None:
    block = DraftSieveMemoryBlock(model=DRAFT)
    database = create_async_engine("sqlite+aiosqlite:///:memory:")
    memory = Memory.from_defaults(
        token_limit=LIMIT,
        chat_history_token_ratio=0.4,
        token_flush_size=20,
        memory_blocks=[block],
        async_engine=database,
    )
    for text in TOLD:
        await memory.aput_messages([ChatMessage(text), ChatMessage("Noted.", role="assistant")])
    print(f"Told: {size(TOLD)} tokens; the memory sends at most {LIMIT}.")
    for question in QUESTIONS:
        turns = await memory.aget(input=question)
        texts = [turn.content or "" for turn in turns]
        print(f"\n{question} ({size(texts)} tokens are sent)")
        for turn, text in zip(turns, texts, strict=True):
            print(f"  {turn.role.value:>9}: {text}")
    await database.dispose()


def size(texts: list[str]) -> int:
    """Tokens as LlamaIndex's memory counts them."""
    return sum(len(get_tokenizer()(text)) for text in texts)


asyncio.run(chat())
