"""Batches of a chat model: LangChain's ways around each input, one batch of the target."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from ...core.engine import Engine
from ...core.prompt.messages import Prompt
from ...core.types import Answer

MOST_AT_ONCE = 32
"""Inputs of a batch that are asked at once where `max_concurrency` says nothing."""

Configs = RunnableConfig | Sequence[RunnableConfig] | None
_TOGETHER: ContextVar[bool] = ContextVar("draftsieve_together", default=False)


@contextmanager
def together(inputs: int) -> Iterator[None]:
    """Let `answer` ask beside the others in the threads that are started inside."""
    token = _TOGETHER.set(inputs > 1)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def answer(engine: Engine, prompt: Prompt, options: Mapping[str, Any]) -> Answer:
    """Ask for one input, alone or as one of several threads whose requests run as a batch."""
    if _TOGETHER.get():
        return asyncio.run(engine.agenerate(prompt, **options))
    return engine.generate(prompt, **options)


def all_at_once(config: Configs, inputs: int) -> list[RunnableConfig]:
    """A configuration for each input; they do not wait for each other unless they say so."""
    return [
        {**each, "max_concurrency": each.get("max_concurrency") or MOST_AT_ONCE}
        for each in get_config_list(config, inputs)
    ]
