"""Requests that come from several threads or tasks at once, answered as one batch."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

from ..config import Generation
from ..engine import Engine
from ..errors import RequestTimeoutError
from ..prompt.messages import Prompt
from ..types import Answer

logger = logging.getLogger(__name__)


class _BatchFailedError(Exception):
    """Some member's fault; never leaves this file."""


@dataclass(frozen=True, slots=True)
class _Asked:
    prompt: Prompt
    generation: Generation
    options: dict[str, Any]
    answer: Future[Answer]


def _running() -> Future[Answer]:
    """A future that a waiting task's end does not cancel."""
    future: Future[Answer] = Future()
    future.set_running_or_notify_cancel()
    return future


class Member:
    """One of those who ask together: asks once or leaves; further requests go alone.

    The last member to ask or leave runs the batch, the others wait for it. All must give the same
    options besides prompt and generation. If the batch fails, each asks alone, so that only faulty
    requests fail; a timeout is everyone's.
    """

    def __init__(self, engine: Engine, batch: _Batch) -> None:
        self.engine, self._batch, self._done = engine, batch, False

    def generate(self, prompt: Prompt, *, generation: Generation, **options: Any) -> Answer:
        """`Engine.generate` as a member; blocks until the batch is answered."""
        if self._done:
            return self.engine.generate(prompt, generation=generation, **options)
        mine = _Asked(prompt, generation, options, _running())
        self._run(self._arrive(mine))
        try:
            return mine.answer.result()
        except _BatchFailedError:
            return self.engine.generate(prompt, generation=generation, **options)

    async def agenerate(self, prompt: Prompt, *, generation: Generation, **options: Any) -> Answer:
        """`generate` for tasks of one event loop."""
        if self._done:
            return await self.engine.agenerate(prompt, generation=generation, **options)
        mine = _Asked(prompt, generation, options, _running())
        await self._arun(self._arrive(mine))
        try:
            return await asyncio.wrap_future(mine.answer)
        except _BatchFailedError:
            return await self.engine.agenerate(prompt, generation=generation, **options)

    def leave(self) -> None:
        """Say that nothing will be asked (any more)."""
        if not self._done:
            self._run(self._arrive(None))

    async def aleave(self) -> None:
        """`leave` for tasks."""
        if not self._done:
            await self._arun(self._arrive(None))

    def _arrive(self, asked: _Asked | None) -> list[_Asked]:
        self._done = True
        return self._batch.arrive(asked)

    def _run(self, batch: list[_Asked]) -> None:
        if not batch:
            return
        try:
            _tell(batch, self.engine.generate_many(**_request(batch)))
        except BaseException as error:  # noqa: BLE001 - it is passed on to those who wait
            _fail(batch, error)

    async def _arun(self, batch: list[_Asked]) -> None:
        if not batch:
            return
        try:
            _tell(batch, await self.engine.agenerate_many(**_request(batch)))
        except BaseException as error:  # noqa: BLE001 - it is passed on to those who wait
            _fail(batch, error)


class _Batch:
    """Who is still missing, and what the others asked."""

    def __init__(self, members: int) -> None:
        self._missing, self._lock = members, Lock()
        self._asked: list[_Asked] = []

    def arrive(self, asked: _Asked | None) -> list[_Asked]:
        """Note a member; the last one gets what all asked, the others an empty list."""
        with self._lock:
            self._missing -= 1
            if asked is not None:
                self._asked.append(asked)
            return self._asked if self._missing == 0 else []


def members_of_batch(engine: Engine, count: int) -> list[Member]:
    """Make the members of one batch; each of them must ask or leave.

    Args:
        engine: Who answers.
        count: How many members.
    """
    batch = _Batch(count)
    return [Member(engine, batch) for _ in range(count)]


def _request(batch: list[_Asked]) -> dict[str, Any]:
    prompts, generation = [a.prompt for a in batch], [a.generation for a in batch]
    return {"prompts": prompts, "generation": generation, **batch[0].options}


def _tell(batch: list[_Asked], answers: list[Answer]) -> None:
    for asked, answer in zip(batch, answers, strict=True):
        asked.answer.set_result(answer)


def _fail(batch: list[_Asked], error: BaseException) -> None:
    """Tell those who wait; what is no `Exception` (a cancellation, say) is raised here too."""
    shared = len(batch) == 1 or isinstance(error, RequestTimeoutError)
    for asked in batch:
        asked.answer.set_exception(error if shared else _BatchFailedError())
    if not isinstance(error, Exception):
        raise error
    if not shared:
        logger.warning("A batch of %d failed, each is asked alone: %s", len(batch), error)
