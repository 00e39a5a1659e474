"""`Engine.session`: read documents once, ask many questions.

The full keys and values of the documents stay outside (on the CPU, or in a file); for each question
the draft's lookahead selects, and only the selected entries make up the small working cache. A
question loses nothing that an earlier one evicted. While the target reads a question, one layer at
a time is brought to its device as a whole, since the question's tokens attend to all of it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .config import Generation, Method, SpecKV
from .errors import ConfigError, ModelError, PromptError
from .generation.eviction import evict_beginning
from .generation.pair import Pair
from .generation.remember import remember
from .generation.scheduler import Scheduler
from .kv_cache.evicted_memory import EvictedMemory
from .kv_cache.files import SavedSession, read_files, write_files
from .kv_cache.storage import Storage
from .models.loading import fingerprint
from .prompt.messages import Prompt
from .request import Memories
from .runtime.limits import Clock, deadline_after, until
from .types import Answer, Chunk, Passage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionStats:
    """What a session holds and what it cost to get; compare with `Answer.timings`.

    A full working cache of the documents takes `tokens * entry_bytes`; the one of an answer takes
    `Answer.cache_bytes` when its decoding starts.
    """

    tokens: int  # of the documents and what stands before them, by the target's tokenizer
    storage: Storage
    mapped: bool  # the bytes lie in a file and are paged in as they are used
    target_bytes: int
    draft_bytes: int  # 0 where the draft reads the documents anew for every question
    entry_bytes: int  # of one token in a working cache of the target: all layers and heads
    # "read", "open" or "compress"
    seconds: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def bytes(self) -> int:
        """Stored keys and values of both models."""
        return self.target_bytes + self.draft_bytes


@dataclass(frozen=True, slots=True)
class Session:
    """Documents that have been read; made by `Engine.session` or `Engine.load_session`.

    Safe to use from several threads: asking changes nothing.
    """

    scheduler: Scheduler  # of the engine
    passages: tuple[Passage, ...]
    system: str | None
    memories: Memories
    model_name: str
    storage: Storage
    mapped: bool
    seconds: Mapping[str, float] = field(hash=False)

    def answer(
        self,
        question: str,
        method: SpecKV | None = None,
        *,
        generation: Generation | None = None,
    ) -> Answer:
        """Answer a question about the documents without reading them again.

        Args:
            question: The user's question.
            method: Selects cache entries per question; None uses all of them.
            generation: Decoding options and the request's timeout; greedy by default.

        Returns:
            What `Engine.answer` returns for the same documents and method; with `storage="int8"`
            up to the rounding of keys and values.

        Raises:
            ModelError: The method compresses text, which would have to be read again.
        """
        *_, last = self.stream(question, method, generation=generation)
        assert last.answer is not None  # the last chunk carries it
        return last.answer

    async def aanswer(
        self,
        question: str,
        method: SpecKV | None = None,
        *,
        generation: Generation | None = None,
    ) -> Answer:
        """`answer` without blocking the event loop, in turns with the engine's other requests."""
        prompt, options = self._asked(question, method), generation or Generation()
        return await self.scheduler.answer(prompt, method, options, "raise", self.memories)

    def stream(
        self,
        question: str,
        method: SpecKV | None = None,
        *,
        generation: Generation | None = None,
    ) -> Iterator[Chunk]:
        """`answer` piece by piece; the last chunk carries the `Answer`. Close it to cancel."""
        prompt, options = self._asked(question, method), generation or Generation()
        pipeline = self.scheduler.pipeline
        return pipeline.stream(prompt, method, options, "raise", self.memories)

    def astream(
        self,
        question: str,
        method: SpecKV | None = None,
        *,
        generation: Generation | None = None,
    ) -> AsyncIterator[Chunk]:
        """`stream` without blocking the event loop, in turns with the engine's other requests."""
        prompt, options = self._asked(question, method), generation or Generation()
        return self.scheduler.stream(prompt, method, options, "raise", self.memories)

    def extend(self, passages: Sequence[str | Passage], *, timeout: float | None = None) -> Session:
        """A session with more documents behind these; only the new ones are read.

        This session stays as it is and can still be asked.

        Args:
            passages: What is added; numbers and default ids go on from the last passage.
            timeout: Seconds after which the reading fails; None for no limit.

        Raises:
            PromptError: There is nothing to read, or all together exceed the target's window.
            RequestTimeoutError: The time is up.
        """
        self._need_whole("extended")
        if not Prompt.from_question("?", passages).passages:
            raise PromptError("There are no passages to add: give at least one.")
        prompt = Prompt.from_question("?", [*self.passages, *passages], system=self.system)
        clock = Clock()
        with clock("read"), until(deadline_after(timeout)):
            pair = self.scheduler.pipeline.pair
            memories = remember(pair, prompt, self.storage, self.memories)
        return replace(
            self,
            passages=prompt.passages,
            memories=memories,
            mapped=False,
            seconds=clock.seconds,
        )

    def compress(self, method: SpecKV, *, timeout: float | None = None) -> Session:
        """A session that holds only a part of the documents' KV entries, for all its questions.

        Unlike a method that is given with each question, this chooses once and forgets the rest:
        answers need no further choosing, and the stored bytes shrink. This session stays as it is.

        Args:
            method: How much stays, and its scorer: "kvzip", or another that needs no question.
            timeout: Seconds after which it fails; None for no limit.

        Raises:
            ModelError: The scorer looks ahead at an answer, or this session is compressed already.
            BudgetError: What is protected exceeds the capacity.
            RequestTimeoutError: The time is up.
        """
        self._need_whole("compressed further")
        pair, clock = self.scheduler.pipeline.pair, Clock()
        ids = self.memories.target.ids
        prompt = Prompt.from_question("?", self.passages, system=self.system)
        protected = pair.encoder.encode(prompt).protected[: ids.numel()]
        with clock("compress"), until(deadline_after(timeout)):
            kept = evict_beginning(pair, self.memories.target, protected, method)
        memories = Memories(kept, self.memories.draft)
        return replace(self, memories=memories, mapped=False, seconds=clock.seconds)

    async def acompress(self, method: SpecKV, *, timeout: float | None = None) -> Session:
        """`compress` without blocking the event loop."""
        return await self.scheduler.worker.run(self.compress, method, timeout=timeout)

    def _need_whole(self, what: str) -> None:
        if isinstance(self.memories.target, EvictedMemory):
            raise ModelError(
                f"This session is compressed and cannot be {what}: use the one that it was made of."
            )

    async def aextend(
        self, passages: Sequence[str | Passage], *, timeout: float | None = None
    ) -> Session:
        """`extend` without blocking the event loop."""
        return await self.scheduler.worker.run(self.extend, passages, timeout=timeout)

    def _asked(self, question: str, method: Method | None) -> Prompt:
        if method is not None and not isinstance(method, SpecKV):
            raise ModelError(
                f"A session holds keys and values of whole documents; {type(method).__name__} "
                "shortens their text, which would have to be read again. Use SpecKV, or "
                "Engine.answer."
            )
        if method is not None:
            self._need_whole("evicted by another method")
        return Prompt.from_question(question, self.passages, system=self.system)

    @property
    def stats(self) -> SessionStats:
        """Tokens, bytes and seconds."""
        target, draft = self.memories.target, self.memories.draft
        return SessionStats(
            tokens=target.ids.numel(),
            storage=self.storage,
            mapped=self.mapped,
            target_bytes=target.bytes,
            draft_bytes=0 if draft is None else draft.bytes,
            entry_bytes=target.entry_bytes,
            seconds=dict(self.seconds),
        )

    @property
    def bytes(self) -> int:
        """Size of the stored keys and values, the draft's included."""
        return self.stats.bytes

    def save(self, path: str | Path) -> None:
        """Write the session into a folder: safetensors and JSON, no code.

        A session that was saved there before is replaced; one that is mapped from it goes on
        working with the old bytes. Metadata is kept as JSON has it: tuples come back as lists.

        Raises:
            PromptError: Some passage's metadata is no JSON (a date, say); nothing is written.
        """
        self._need_whole("saved")
        saved = SavedSession(
            model=self.model_name,
            weights=_fingerprints(self.scheduler.pipeline.pair),
            system=self.system,
            storage=self.storage,
            passages=self.passages,
            memories={"target": self.memories.target, "draft": self.memories.draft},
        )
        write_files(saved, Path(path))


def open_session(
    scheduler: Scheduler,
    passages: Sequence[str | Passage],
    system: str | None,
    model_name: str,
    storage: Storage = "memory",
) -> Session:
    """Read the documents with the target, and with the draft where there is one."""
    if storage not in ("memory", "int8"):
        raise ConfigError(f"There is no storage {storage!r}; there are 'memory' and 'int8'.")
    prompt, clock = Prompt.from_question("?", passages, system=system), Clock()
    with clock("read"):
        memories = remember(scheduler.pipeline.pair, prompt, storage)
    return Session(
        scheduler, prompt.passages, system, memories, model_name, storage, False, clock.seconds
    )


def load_session(
    scheduler: Scheduler, path: str | Path, model_name: str, mmap: bool = True
) -> Session:
    """Open what `Session.save` wrote.

    Raises:
        ModelError: There is no session, it is damaged, or it was made with other weights.
    """
    clock = Clock()
    with clock("open"):
        saved = read_files(Path(path), mmap)
    ours = _fingerprints(scheduler.pipeline.pair)
    if saved.weights.get("target") != ours["target"]:
        raise ModelError(
            f"The session was read by {saved.model!r}, whose weights (or their quantisation) are "
            f"not those of this engine's target {model_name!r}: load the same model, or read the "
            "passages again."
        )
    target, draft = saved.memories["target"], saved.memories.get("draft")
    assert target is not None  # checked by read_files
    if saved.weights.get("draft") != ours.get("draft"):
        draft = None
    if "draft" in ours and draft is None:
        logger.warning(
            "The session in %s was not read by this engine's draft, which will therefore read the "
            "documents anew for every question. Save it once more from this engine.",
            path,
        )
    return Session(
        scheduler,
        saved.passages,
        saved.system,
        Memories(target, draft),
        model_name,
        saved.storage,
        mmap,
        clock.seconds,
    )


def _fingerprints(pair: Pair) -> dict[str, str]:
    """Of the target's weights and, where there is one, of the draft's."""
    models = pair.models.items()
    return {role: fingerprint(model) for role, model in models if model is not None}
