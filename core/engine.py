"""`Engine`: questions and their passages, and documents that are read once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from .config import Generation, Method, OnError, SpecPC
from .kv_cache.storage import Storage
from .prompt.messages import DEFAULT_SYSTEM, Prompt
from .prompt_engine import PromptEngine, require_equal
from .runtime.limits import deadline_after, until
from .session import Session, load_session, open_session
from .types import Answer, Chunk, CompressedContext, Passage


class Engine(PromptEngine):
    """A target model with an optional draft. Safe to use from several threads at once.

    Asynchronous twins take what the others take and do not block the event loop.

    Args: see `PromptEngine`, which answers chat prompts (`generate`, ...).
    """

    def answer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> Answer:
        """Answer a question from passages.

        Args:
            question: The user's question.
            passages: Retrieved texts.
            method: How to compress; None reads everything.
            generation: Decoding options and the request's timeout; greedy by default.
            system: System text.
            on_error: What a failed compression does: "raise", or "original" to go on with the
                whole passages (logged, and told in `answer.context.stats.fallback`).

        Raises:
            PromptError: The question is empty, or the prompt exceeds the target's window.
            BudgetError: Question and system text exceed the capacity.
            ModelError: A method was given, but the engine has no draft.
            OutOfMemoryError: Names both models' footprints.
            RequestTimeoutError: The generation's timeout has passed.
        """
        prompt = Prompt.from_question(question, passages, system=system)
        return self.generate(prompt, method, generation=generation, on_error=on_error)

    async def aanswer(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> Answer:
        """`answer` without blocking the event loop."""
        prompt = Prompt.from_question(question, passages, system=system)
        return await self.agenerate(prompt, method, generation=generation, on_error=on_error)

    def answer_many(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[str | Passage]],
        method: Method | None = None,
        *,
        generation: Generation | Sequence[Generation] | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> list[Answer]:
        """`answer` for several questions with passages of their own, decoded as one batch."""
        prompts = _prompts(questions, passages, system)
        return self.generate_many(prompts, method, generation=generation, on_error=on_error)

    async def aanswer_many(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[str | Passage]],
        method: Method | None = None,
        *,
        generation: Generation | Sequence[Generation] | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> list[Answer]:
        """`answer_many` without blocking the event loop."""
        prompts = _prompts(questions, passages, system)
        return await self.agenerate_many(prompts, method, generation=generation, on_error=on_error)

    def stream(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> Iterator[Chunk]:
        """`answer` piece by piece; the last chunk carries the `Answer`. Close it to cancel."""
        prompt = Prompt.from_question(question, passages, system=system)
        return self.stream_prompt(prompt, method, generation=generation, on_error=on_error)

    def astream(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: Method | None = None,
        *,
        generation: Generation | None = None,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
    ) -> AsyncIterator[Chunk]:
        """`stream` without blocking the event loop."""
        prompt = Prompt.from_question(question, passages, system=system)
        return self.astream_prompt(prompt, method, generation=generation, on_error=on_error)

    def compress(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: SpecPC | None = None,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> CompressedContext:
        """What the target would be given: `Compressor.compress` with this engine's draft."""
        compress = self._need_compressor().compress
        return compress(
            question, passages, method, system=system, on_error=on_error, timeout=timeout
        )

    async def acompress(
        self,
        question: str,
        passages: Sequence[str | Passage],
        method: SpecPC | None = None,
        *,
        system: str | None = DEFAULT_SYSTEM,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> CompressedContext:
        """`compress` without blocking the event loop."""
        compress = self._need_compressor().acompress
        return await compress(
            question, passages, method, system=system, on_error=on_error, timeout=timeout
        )

    def session(
        self,
        passages: Sequence[str | Passage],
        *,
        system: str | None = DEFAULT_SYSTEM,
        storage: Storage = "memory",
        timeout: float | None = None,
    ) -> Session:
        """Read documents once, ask many questions (see `Session`).

        Args:
            passages: The documents; their keys and values stay on the CPU, outside any cache.
            system: System text in front of them.
            storage: "memory" for the models' own numbers, or "int8" for a rounded quarter of their
                size in float32 (half in bfloat16); answers may then differ in rare words.
            timeout: Seconds after which the reading fails, checked between the models' layers;
                None for no limit.

        Raises:
            PromptError: There is nothing to read, or more than the target's window holds.
            ModelError: A layer of a model is not plain full attention.
            RequestTimeoutError: The time is up.
        """
        scheduler = self._need_scheduler()
        with until(deadline_after(timeout)):
            return open_session(scheduler, passages, system, self.model_name, storage)

    async def asession(
        self,
        passages: Sequence[str | Passage],
        *,
        system: str | None = DEFAULT_SYSTEM,
        storage: Storage = "memory",
        timeout: float | None = None,
    ) -> Session:
        """`session` without blocking the event loop."""
        return await self._worker.run(
            self.session, passages, system=system, storage=storage, timeout=timeout
        )

    def load_session(self, path: str | Path, *, mmap: bool = True) -> Session:
        """Open what `Session.save` wrote; the same target must be loaded.

        Args:
            path: The session's folder.
            mmap: Leave keys and values in the file, from where the system pages them in as they
                are used; False reads them into memory.

        Raises:
            ModelError: There is no session, it is damaged, or it was made with other weights.
        """
        return load_session(self._need_scheduler(), path, self.model_name, mmap)


def _prompts(
    questions: Sequence[str],
    passages: Sequence[Sequence[str | Passage]],
    system: str | None,
) -> list[Prompt]:
    require_equal("questions", questions, "lists of passages", passages)
    each = zip(questions, passages, strict=True)
    return [Prompt.from_question(question, found, system=system) for question, found in each]
