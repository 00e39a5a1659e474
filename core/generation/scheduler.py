"""Asynchronous requests of one engine: read one after another, decoded as one batch.

admit (the draft's reading, then the target's) -> join the batch -> step -> tell, and leave.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from ..config import Generation, Method, OnError
from ..errors import RequestTimeoutError
from ..kv_cache.prefill import MOST_TOGETHER, TOGETHER
from ..prompt.messages import Prompt
from ..request import Memories, Request
from ..runtime.limits import RequestCancelledError, check_deadline, until, waiting
from ..runtime.worker import Inbox, Worker
from ..types import Answer, Chunk
from .answer import AnswerChunks
from .decode import Batch, Row
from .pipeline import Pipeline

MOST_ROWS = 32  # answers that are decoded at once
CHARACTERS = 4  # of a token, roughly
SHARE = 0.25  # of the time that reading takes, given to those who are being answered


@dataclass(slots=True, eq=False)
class _Asked:
    """A request, who waits for it, and how far it is."""

    prompt: Prompt
    method: Method | None
    generation: Generation
    on_error: OnError
    memories: Memories | None
    inbox: Inbox[Chunk] = field(default_factory=Inbox)
    context: Context = field(default_factory=copy_context)
    alone: bool = False  # it is never read beside others
    request: Request | None = None  # once the draft has read
    chunks: AnswerChunks | None = None

    def __post_init__(self) -> None:
        self.alone = self.memories is not None or self.generation.drafting is not None

    @property
    def size(self) -> int:
        """Characters to be read."""
        parts = (self.prompt.layout(message) for message in self.prompt.messages)
        return sum(len(part.text) for each in parts for part in each)

    def goes_with(self, other: _Asked) -> bool:
        """Whether both models may read the two side by side."""
        same = self.method == other.method and self.on_error == other.on_error
        stages = (self.request is None) == (other.request is None)
        return same and stages and not self.alone and not other.alone

    @property
    def deadline(self) -> float | None:
        """Time in the queue counts."""
        timeout = self.generation.timeout
        return None if timeout is None else self.inbox.asked + timeout


class Scheduler:
    """Answers asynchronous requests in the worker's thread, turn by turn.

    A turn brings the first waiting request one stage further (short ones side by side) and lets
    all running ones say tokens for a share of that time, so that no stream stalls for longer than
    one stage. Rows whose caches do not go together (uneven budgets, evictions beside sliding
    windows, drafting) are stepped apart. Each request gets what it gets alone, and its failure is
    its own.

    Args:
        pipeline: The stages of a request.
        worker: The engine's thread. Everything but the coroutines runs in it.
    """

    def __init__(self, pipeline: Pipeline, worker: Worker) -> None:
        self.pipeline, self.worker = pipeline, worker
        self._waiting: list[_Asked] = []
        self._batches: list[Batch] = []
        self._owners: dict[Row, _Asked] = {}  # of the rows in these batches

    async def stream(
        self,
        prompt: Prompt,
        method: Method | None,
        generation: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> AsyncIterator[Chunk]:
        """One request piece by piece; the last chunk carries the answer."""
        asked = _Asked(prompt, method, generation, on_error, memories)
        self.worker.post(lambda: self._arrive(asked))
        try:
            async for chunk in asked.inbox.listen():
                yield chunk
        finally:
            asked.inbox.gone.set()

    async def answer(
        self,
        prompt: Prompt,
        method: Method | None,
        generation: Generation,
        on_error: OnError,
        memories: Memories | None = None,
    ) -> Answer:
        """One request."""
        answer = None
        async for chunk in self.stream(prompt, method, generation, on_error, memories):
            answer = chunk.answer
        assert answer is not None  # the last chunk carries it
        return answer

    async def answer_many(
        self,
        prompts: Sequence[Prompt],
        method: Method | None,
        generation: Sequence[Generation],
        on_error: OnError,
    ) -> list[Answer]:
        """Several requests; the first failure ends all of them."""
        asked = [
            asyncio.create_task(self.answer(prompt, method, options, on_error))
            for prompt, options in zip(prompts, generation, strict=True)
        ]
        try:
            return await asyncio.gather(*asked)
        finally:
            for task in asked:
                task.cancel()

    def _arrive(self, asked: _Asked) -> None:
        idle = not self._waiting and not self._batches
        self._waiting.append(asked)
        if idle:
            self.worker.post(self._turn)

    def _turn(self) -> None:
        """One stage of a waiting request, tokens of all running ones; then the queue goes on."""
        try:
            began = time.monotonic()
            self._admit()
            now = time.monotonic()
            end = now + SHARE * (now - began)
            self._decode()
            while self._waiting and self._batches and time.monotonic() < end:
                self._decode()
            if self._waiting or self._batches:
                self.worker.post(self._turn)
        except Exception as error:  # noqa: BLE001 - else everybody would wait for ever
            for asked in (*self._waiting, *self._owners.values()):
                asked.inbox.tell(error)
            self._waiting, self._batches, self._owners = [], [], {}

    def _admit(self) -> None:
        """The draft reads for the first waiting requests, or the target reads their prompts."""
        self._waiting = [asked for asked in self._waiting if not _ended(asked)]
        room = MOST_ROWS - len(self._owners)
        if not self._waiting or room <= 0:
            return
        group = self._first(room)
        try:
            batch = group[0].context.run(self._read, group)
        except (RequestCancelledError, Exception) as error:  # noqa: BLE001 - they are told
            self._refuse(group, error)
            return
        if batch is None:
            return
        self._waiting = [asked for asked in self._waiting if asked not in group]
        beside = next((other for other in self._batches if other.can_join(batch)), None)
        if not batch.rows:  # their first tokens were their last ones
            return
        if beside is None:
            self._batches.append(batch)
        else:
            beside.join(batch)

    def _first(self, room: int) -> list[_Asked]:
        """The first waiting request, and more where side by side they are read in no more time."""
        device = self.pipeline.pair.target.device.type
        left = TOGETHER.get(device, MOST_TOGETHER) * CHARACTERS
        group: list[_Asked] = []
        for asked in self._waiting[:room]:
            left -= asked.size
            if group and (left < 0 or not group[0].goes_with(asked)):
                break
            group.append(asked)
        return group

    def _refuse(self, group: Sequence[_Asked], error: BaseException) -> None:
        """A single request is told; of several each is read once more, alone."""
        if len(group) == 1:
            self._waiting.remove(group[0])
            group[0].inbox.tell(error)
        for asked in group:
            asked.alone, asked.request = True, None

    def _read(self, group: Sequence[_Asked]) -> Batch | None:
        """Their rows, once the target has read; None while only the draft has done so."""
        requests = [asked.request for asked in group if asked.request is not None]
        with waiting(_AllGone(group), max(asked.inbox.asked for asked in group)):
            if not requests:
                self._prepare(group)
                return None
            batch, said = self.pipeline.prefill(requests)
        self._owners.update(
            (request.row, asked) for asked, request in zip(group, requests, strict=True)
        )
        self._tell(said)
        return batch

    def _prepare(self, group: Sequence[_Asked]) -> None:
        first = group[0]
        requests = self.pipeline.prepare(
            [asked.prompt for asked in group],
            first.method,
            [asked.generation for asked in group],
            first.on_error,
            first.memories,
        )
        for asked, request in zip(group, requests, strict=True):
            asked.request, asked.chunks = request, AnswerChunks(request)

    def _decode(self) -> None:
        """Let every running request say its next token, unless it has ended meanwhile."""
        for batch in self._batches:
            self._forget(batch, [row for row in batch.rows if _ended(self._owners[row])])
            if batch.rows:
                self._step(batch)
        self._batches = [batch for batch in self._batches if batch.rows]

    def _step(self, batch: Batch) -> None:
        asked = [self._owners[row] for row in batch.rows]
        requests = [each.request for each in asked if each.request is not None]
        try:
            with waiting(_AllGone(asked), 0.0):
                said = self.pipeline.step(batch, requests, _latest(asked))
        except (RequestCancelledError, Exception) as error:  # noqa: BLE001 - all ask for this step
            self._forget(batch, batch.rows)
            for each in asked:
                each.inbox.tell(error)
            return
        self._tell(said)

    def _tell(self, said: Iterable[tuple[Row, str]]) -> None:
        """Hand out what was said; who is finished gets the answer and is forgotten."""
        for row, piece in said:
            asked = self._owners[row]
            assert asked.chunks is not None  # made before the row was
            if row.error is not None:
                asked.inbox.tell(row.error)
            else:
                for chunk in asked.chunks.of(piece):
                    asked.inbox.tell(chunk)
                if row.finished:
                    asked.inbox.tell(asked.chunks.last())
                    asked.inbox.tell(None)
            if row.finished:
                del self._owners[row]

    def _forget(self, batch: Batch, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._owners[row]
        batch.leave(rows)


class _AllGone:
    """Set once nobody waits for any of these any more."""

    def __init__(self, asked: Sequence[_Asked]) -> None:
        self._asked = asked

    def is_set(self) -> bool:
        return all(each.inbox.gone.is_set() for each in self._asked)


def _latest(asked: Sequence[_Asked]) -> float | None:
    """When none of these may go on any more; None where one may for ever."""
    moments = [each.deadline for each in asked if each.deadline is not None]
    return max(moments) if len(moments) == len(asked) else None


def _ended(asked: _Asked) -> bool:
    """Whether a request is out of time, which it is told, or nobody waits for it."""
    try:
        with waiting(asked.inbox.gone, asked.inbox.asked), until(asked.deadline):
            check_deadline()
    except RequestTimeoutError as error:
        asked.inbox.tell(error)
        return True
    except RequestCancelledError:
        return True
    return False
