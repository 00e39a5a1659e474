"""Batches of a chat model: LangChain's ways around each input, one core call for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor, get_config_list

from ...core.engine import Engine
from ...core.runtime.micro_batch import Member, members_of_batch

MOST_AT_ONCE = 32
"""Rows of a batch where `max_concurrency` says nothing."""

Configs = RunnableConfig | Sequence[RunnableConfig] | None
_MEMBER: ContextVar[Member | None] = ContextVar("draftsieve_member", default=None)


def asked_by(engine: Engine) -> Engine | Member:
    """Whom a call asks: the engine alone, or as a member of the batch that it belongs to."""
    member = _MEMBER.get()
    return member if member is not None and member.engine is engine else engine


def run_together(
    engine: Engine,
    invoke: Callable[[Any, RunnableConfig], Any],
    inputs: Sequence[Any],
    config: Configs,
    return_exceptions: bool,
) -> list[Any]:
    """Invoke each input in a thread of its own (callbacks, cache, tracing); they ask as one batch.

    Args:
        engine: Whom `invoke` asks, through `asked_by`.
        invoke: Answers one input.
        inputs: The inputs.
        config: As for `Runnable.batch`; at most `max_concurrency` (32 without) run at once.
        return_exceptions: Put an input's exception in its place instead of raising it.
    """

    def one(value: Any, own: RunnableConfig, member: Member) -> Any:
        _MEMBER.set(member)  # in this thread's copy of the context
        try:
            return invoke(value, own)
        except Exception as error:
            if not return_exceptions:
                raise
            return error
        finally:
            member.leave()

    found: list[Any] = []
    for part, configs in _parts(inputs, config):
        members = members_of_batch(engine, len(part))
        with ContextThreadPoolExecutor(len(part)) as pool:
            found += pool.map(one, part, configs, members)
    return found


async def arun_together(
    engine: Engine,
    invoke: Callable[[Any, RunnableConfig], Awaitable[Any]],
    inputs: Sequence[Any],
    config: Configs,
    return_exceptions: bool,
) -> list[Any]:
    """`run_together` with a task for each input."""

    async def one(value: Any, own: RunnableConfig, member: Member) -> Any:
        _MEMBER.set(member)  # in this task's copy of the context
        try:
            return await invoke(value, own)
        finally:
            await member.aleave()

    found: list[Any] = []
    for part, configs in _parts(inputs, config):
        asking = map(one, part, configs, members_of_batch(engine, len(part)))
        found += await asyncio.gather(*asking, return_exceptions=return_exceptions)
    return found


def _parts(
    inputs: Sequence[Any], config: Configs
) -> Iterator[tuple[Sequence[Any], list[RunnableConfig]]]:
    """Inputs and their configurations, as many as run at once."""
    if not inputs:
        return
    configs = get_config_list(config, len(inputs))
    size = configs[0].get("max_concurrency") or MOST_AT_ONCE
    for first in range(0, len(inputs), size):
        yield inputs[first : first + size], configs[first : first + size]
